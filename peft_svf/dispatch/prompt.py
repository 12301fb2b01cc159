"""PromptDispatcher: the base model itself says which expert a prompt needs (Transformer², section 3.2, strategy A)."""

from __future__ import annotations

from collections.abc import Sequence

from peft_svf.dispatch.label_scoring import LabelScorer
from peft_svf.dispatch.route import Prompt, Route, user_text
from peft_svf.dispatch.template import RoutingTemplate, default_instruction
from peft_svf.experts.bank import BASE_LABEL, ExpertBank


class PromptDispatcher:
    """
    Routes each prompt to one expert, or to the base model, by the probabilities of the labels under the base model.

    The labels are the experts' labels and "others". Their log-probabilities after instruction and prompt come from one
    forward (see [`LabelScorer`]) and are normalised over the labels. The paper generates the label instead
    (arXiv 2501.06252, section 3.2), which costs several forwards and gives no probability.

    Args:
        bank (`ExpertBank`): the experts; labels, descriptions and instruction are read once, here.
        margin (`float`, *optional*, defaults to 0.0):
            In [0, 1]. If the best probability exceeds the second best by less, the base model answers.
        instruction (`str`, *optional*):
            Replaces the bank's instruction, which replaces the default one, written from labels and descriptions.

    Raises:
        ValueError: a margin outside [0, 1].
    """

    def __init__(self, bank: ExpertBank, margin: float = 0.0, instruction: str | None = None) -> None:
        if not 0.0 <= margin <= 1.0:
            raise ValueError(f"margin is a difference of probabilities between 0 and 1, not {margin}.")
        self.bank = bank
        self.margin = margin
        self.labels = [*bank.labels, BASE_LABEL]
        self.names = [*bank.experts, BASE_LABEL]
        entries = list(bank.experts.values())
        self.instruction = instruction or bank.instruction or default_instruction(entries)
        self.scorer = LabelScorer(bank.base_model, RoutingTemplate(bank.tokenizer, self.instruction), self.labels)

    def route(self, prompts: Sequence[Prompt]) -> Route:
        """
        Choose an expert for each prompt.

        Args:
            prompts (`Sequence[str | list[dict]]`): texts or chats; of a chat, the last user message is classified.

        Returns:
            [`Route`]: one-hot weights (zeros for the base model) and the probability of every label.

        Raises:
            ValueError: a chat without a user message, or a prompt that does not fit the context with the instruction.
        """
        texts = [user_text(prompt) for prompt in prompts]
        if not self.bank.experts or not texts:
            return Route.one_hot([BASE_LABEL] * len(texts), [], [{BASE_LABEL: 1.0}] * len(texts))
        with self.bank.base_only():
            probabilities = self.scorer(texts).softmax(-1)  # (B, K + 1)
        best, second = probabilities.topk(2, dim=-1).values.unbind(-1)
        unsure = (best - second < self.margin).tolist()
        winners = probabilities.argmax(-1).tolist()
        chosen = [BASE_LABEL if doubt else self.names[i] for i, doubt in zip(winners, unsure, strict=True)]
        scores = [dict(zip(self.labels, row, strict=True)) for row in probabilities.tolist()]
        return Route.one_hot(chosen, list(self.bank.experts), scores)
