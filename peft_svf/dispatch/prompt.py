"""PromptDispatcher: the base model itself says which expert a prompt needs (Transformer², section 3.2, strategy A)."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from torch import Tensor

from peft_svf.dispatch.decision import Decision
from peft_svf.dispatch.label_scoring import LabelScorer
from peft_svf.dispatch.locking import PicklableLock
from peft_svf.dispatch.route import Prompt, Route, check_prompts, user_text
from peft_svf.dispatch.template import RoutingTemplate, default_instruction
from peft_svf.experts.bank import BASE_LABEL, ExpertBank, ExpertEntry


CONTENT_FREE = ("N/A", "[MASK]", "")  # Zhao et al. 2021, section 5
QuestionKey: TypeAlias = tuple[tuple[tuple[str, ExpertEntry], ...], str | None, int, str]

logger = logging.getLogger(__name__)


class PromptDispatcher:
    """
    Routes each prompt to one expert, to a mixture, or to the base model, by the probabilities of the labels under the
    base model.

    The labels are the experts' labels and "others". Their log-probabilities after instruction and prompt come from one
    forward (see [`LabelScorer`]) and are normalised over the labels. The paper generates the label instead
    (arXiv 2501.06252, section 3.2), which costs several forwards and gives no probability.

    Labels, descriptions and instruction are the bank's at the time of each call: experts may come and go. Several
    threads may use one dispatcher.

    Args:
        bank (`ExpertBank`): the experts.
        margin (`float`, *optional*, defaults to 0.0):
            In [0, 1]. If the best probability exceeds the second best by less, the base model answers.
        instruction (`str`, *optional*):
            Replaces the bank's instruction, which replaces the default one, written from labels and descriptions.
        calibrate (`bool`, *optional*, defaults to `False`):
            Divide out what the model thinks of the labels before it has read anything: their mean probabilities after
            the prompts "N/A", "[MASK]" and "" (Zhao et al. 2021, "Calibrate before use", arXiv 2102.09690). It can
            make routing worse: "others" is the right label of such prompts, which a good router then undervalues.
        mode (`str`, *optional*, defaults to `"best"`):
            `"best"` takes the most probable label. `"soft"` mixes all experts by their probabilities; that of "others"
            stays with the base model.
        top_k (`int`, *optional*): for `mode="soft"`, the most experts in a mixture; they share the others' weights.
        temperature (`float`, *optional*, defaults to 1.0): of the probabilities; above 1 they get more even.

    Raises:
        ValueError: an option outside its range or without a meaning in this mode (see [`Decision`]).
        TypeError: not a bank.
    """

    def __init__(
        self,
        bank: ExpertBank,
        margin: float = 0.0,
        instruction: str | None = None,
        *,
        calibrate: bool = False,
        mode: str = "best",
        top_k: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        if not isinstance(bank, ExpertBank):
            raise TypeError(
                f"{type(self).__name__} needs an ExpertBank, not {type(bank).__name__}: pass ExpertBank(model) or "
                "ExpertBank.from_pretrained(folder)."
            )
        self.bank = bank
        self.decision = Decision(mode, margin, top_k, temperature)
        self.calibrate = calibrate
        self._instruction = instruction
        self._lock = PicklableLock()
        self._question: Question | None = None
        _ = self.question  # what is wrong with the labels shows here, not in the first call

    @property
    def question(self) -> Question:
        """What is asked about every prompt, by the bank as it is now."""
        with self._lock:
            if self._question is None or self._question.key != Question.key_of(self.bank, self._instruction):
                self._question = Question(self.bank, self._instruction)
            return self._question

    @property
    def labels(self) -> list[str]:
        """The labels of the experts, and "others"."""
        return self.question.labels

    @property
    def instruction(self) -> str:
        """The instruction that precedes the prompt."""
        return self.question.instruction

    @property
    def scorer(self) -> LabelScorer:
        """Scores the labels, in whatever state the model is then."""
        return self.question.scorer

    def route(self, prompts: Sequence[Prompt]) -> Route:
        """
        Choose an expert, or a mixture, for each prompt.

        Args:
            prompts (`Sequence[str | list[dict]]`): texts or chats; of a chat, the last user message is classified.

        Returns:
            [`Route`]: weights (zeros for the base model) and the probability of every label.

        Raises:
            ValueError: a chat without a user message, or a prompt that does not fit the context with the instruction.
            TypeError: a single prompt instead of a list, or what cannot be one.
        """
        texts = [user_text(prompt) for prompt in check_prompts(prompts)]
        question = self.question  # one for the whole call, whatever happens to the bank
        if not question.experts or not texts:
            nobody = [{BASE_LABEL: 1.0}] * len(texts)
            return Route.one_hot([BASE_LABEL] * len(texts), question.experts, nobody)
        with self._weights_for_scoring() as version:
            scores = question.scorer(texts, version).log_softmax(-1)  # (B, K + 1)
            if self.calibrate:
                scores = scores - question.prior(version)
        return self.decision.route(scores, question.experts, question.labels)

    @contextmanager
    def _weights_for_scoring(self) -> Iterator[Hashable]:
        """Within: the model computes as the dispatcher needs it. Yields the version of these weights."""
        with self.bank.base_only():
            yield None


class Question:
    """
    The labels of a bank at one time, and what scores them.

    Args:
        bank (`ExpertBank`): the bank.
        instruction (`str`, *optional*): replaces the bank's.
    """

    def __init__(self, bank: ExpertBank, instruction: str | None) -> None:
        self.key = self.key_of(bank, instruction)
        self._tokenizer = bank.tokenizer  # so that no other one gets its id
        entries = dict(self.key[0])
        self.experts = list(entries)
        self.labels = [*(entry.label for entry in entries.values()), BASE_LABEL]
        self.instruction = self.key[1] or default_instruction(list(entries.values()))
        if unnamed := [label for label in self.labels if label.casefold() not in self.instruction.casefold()]:
            shown = ", ".join(unnamed[:5])
            logger.warning("The routing instruction does not name %s, so hardly a prompt will get there.", shown)
        template = RoutingTemplate(bank.tokenizer, self.instruction)
        self.scorer = LabelScorer(bank.base_model, template, self.labels)
        self._prior: tuple[Hashable, Tensor] | None = None

    @staticmethod
    def key_of(bank: ExpertBank, instruction: str | None) -> QuestionKey:
        """Changes when the question does."""
        entries = tuple(dict(bank.experts).items())  # copied at once: another thread may add an expert
        return entries, instruction or bank.instruction, id(bank.tokenizer), str(bank.tokenizer.chat_template)

    def prior(self, version: Hashable) -> Tensor:
        """Logarithms of the labels' mean probabilities after content-free prompts, shape (K + 1,)."""
        prior = self._prior
        if prior is None or prior[0] != version:
            prior = version, self.scorer(CONTENT_FREE, version).softmax(-1).mean(0).log()
            self._prior = prior
        return prior[1]
