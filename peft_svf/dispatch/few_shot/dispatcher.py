"""FewShotDispatcher: the mixture of experts that answers a few examples best (Transformer², section 3.2, C)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from tqdm import tqdm

from peft_svf.answering import IMAGE_COLUMNS, AnswerGenerator, Processes, Processor
from peft_svf.dispatch.few_shot.adaptation import Adaptation
from peft_svf.dispatch.few_shot.configurations import usable_configurations
from peft_svf.dispatch.few_shot.cross_validation import CrossValidation, Fold, cross_validate, split_folds
from peft_svf.dispatch.few_shot.examples import Examples, as_examples, row_hashes
from peft_svf.dispatch.few_shot.mixture_file import expert_facts, save_expert
from peft_svf.dispatch.few_shot.mixture_space import MixtureSpace
from peft_svf.dispatch.few_shot.optimizer import Fitness
from peft_svf.dispatch.few_shot.population import Population
from peft_svf.dispatch.few_shot.search import MixtureSearch, SearchResult
from peft_svf.dispatch.few_shot.search_settings import SearchSettings
from peft_svf.dispatch.route import Prompt, Route, check_prompts
from peft_svf.experts.bank import BASE_LABEL, ExpertBank
from peft_svf.tuner.layer import SVFLayer


Reward = Callable[..., "list[float | None]"]


class AnswerableTask(Protocol):
    """What is needed of a [`~peft_svf.trainers.tasks.Task`]."""

    @property
    def reward(self) -> Reward: ...

    @property
    def max_new_tokens(self) -> int: ...


class FewShotDispatcher:
    """
    Gives every prompt the one mixture of experts that answers a few examples of the task best.

    Strategy C of Transformer² (arXiv 2501.06252, section 3.2): a search over mixture weights, by default the paper's
    cross-entropy method. All candidates of a generation answer all examples in batched generation, each row of a batch
    under its own mixture. No first pass is needed afterwards.

    There are four configurations: weights global or per layer, normalized or free. The paper picks its best
    configuration on test data; ours picks by cross-validation on the examples.

    Examples are not to be evaluated on: [`~peft_svf.trainers.evaluation.evaluate`] refuses them, also under the expert
    that `save_pretrained` writes.

    Args:
        bank (`ExpertBank`): At least two experts.
        examples (`Dataset` or `list[dict]`):
            Rows with `prompt` (text or chat), the columns that the reward needs and, for a vision-language model, an
            image. The paper takes 10, and 3 for a light search.
        reward (`Callable`, *optional*):
            A reward function in TRL's signature; an answer is right if its reward is positive. Without, the task's.
        max_new_tokens (`int`, *optional*): Tokens of an answer at most. Without, the task's.
        task ([`~peft_svf.trainers.tasks.Task`], *optional*): Gives `reward` and `max_new_tokens`.
        settings ([`SearchSettings`], *optional*): Defaults to `SearchSettings.paper()`.
        configurations (`Sequence[MixtureSpace]`, *optional*):
            What cross-validation chooses from; a single one is taken without. Defaults to the paper's four, of which
            the free ones leave the rest of the weight to the base model if the experts' `rank` is limited.
        folds (`int`, *optional*, defaults to 5): Of the cross-validation; never more than examples.
        validation_iterations (`int`, *optional*, defaults to 10):
            Generations at most of each search in the cross-validation, of which there are configurations times folds.
        batch_size (`int`, *optional*, defaults to 256):
            Answers generated at once, at most. A batch that does not fit is halved, and later ones start with halves.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*): Defaults to the bank's tokenizer.
        chat_template_kwargs (`Mapping`, *optional*): For the chat template, e.g. `{"enable_thinking": False}`.

    Raises:
        TypeError: A bank, task or settings that is none.
        ValueError: No examples, a column that is missing, fewer than two experts, neither reward nor task, numbers out
            of range, or free weights that scale all singular values of experts of limited `rank`.

    Example:

    ```python
    >>> task = get_task("playground-math-hard")
    >>> dispatcher = FewShotDispatcher(bank, task.load("train", 10), task=task)
    >>> dispatcher.adapt().weights
    >>> evaluate(bank, bank.tokenizer, task, task.load("test", 200), dispatcher=dispatcher).success
    >>> dispatcher.save_pretrained("math-hard-expert")
    ```
    """

    def __init__(
        self,
        bank: ExpertBank,
        examples: Examples,
        reward: Reward | None = None,
        max_new_tokens: int | None = None,
        *,
        task: AnswerableTask | None = None,
        settings: SearchSettings | None = None,
        configurations: Sequence[MixtureSpace] | None = None,
        folds: int = 5,
        validation_iterations: int = 10,
        batch_size: int = 256,
        processing_class: Processor | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        _check_types(bank, task, settings)
        self.bank, self._task = bank, task
        self.reward, self.max_new_tokens = _reward_and_length(reward, max_new_tokens, task)
        self.settings = settings or SearchSettings.paper()
        self.configurations = usable_configurations(bank, configurations)
        self.examples = as_examples(examples, self.reward)
        self.example_hashes = frozenset(row_hashes(self.examples))
        self.folds = folds
        self._validation = dataclasses.replace(
            self.settings, iterations=min(validation_iterations, self.settings.iterations)
        )
        for space in self.configurations:
            MixtureSearch(space, self.settings)  # refuses what it cannot work with before an hour has passed
        if len(self.configurations) > 1:
            split_folds(len(self.examples), folds)
        generator = AnswerGenerator(
            bank.model,
            processing_class or bank.tokenizer,
            self.max_new_tokens,
            0.0,
            dict(chat_template_kwargs or {}),
            bank,
        )
        self._population = Population(generator, self.examples, self.reward, batch_size)
        self._result: Adaptation | None = None

    # ---------------------------------------------------------------- search
    def adapt(self, state_folder: str | Path | None = None, progress: bool = True) -> Adaptation:
        """
        Choose a configuration by cross-validation, then search it on all examples.

        Under `accelerate launch` all processes must make this call; they share the answering and get the same result.

        Args:
            state_folder (`str` or `Path`, *optional*):
                Where the searches are kept after every generation, to go on from after an interruption.
            progress (`bool`, *optional*, defaults to `True`): Whether to show progress bars.

        Returns:
            [`Adaptation`]: Also as `result`.

        Raises:
            SearchStateError: `state_folder` holds the search for something else, or is damaged.

        Warns:
            If no candidate has answered any example right: nothing could be adapted then.
        """
        identity = self._identity()
        chosen: CrossValidation | None = None
        space = self.configurations[0]
        if len(self.configurations) > 1:
            chosen = self._cross_validate(state_folder, identity, progress)
            space = chosen.chosen
        everything = range(len(self.examples))
        folder = None if state_folder is None else Path(state_folder) / self._name(space)
        found = self._search(space, everything, self.settings, folder, identity, progress)
        self._result = Adaptation(found, chosen, self._references())
        if not self._result.adapted:
            warnings.warn(self._result.statement)
        return self._result

    def _cross_validate(
        self, state_folder: str | Path | None, identity: dict[str, Any], progress: bool
    ) -> CrossValidation:
        searches = len(self.configurations) * min(self.folds, len(self.examples))
        bar = tqdm(
            total=searches,
            desc="Cross-validation",
            disable=not (progress and Processes.launched().is_main),
            leave=False,
        )

        def search(space: MixtureSpace, fold: Fold) -> SearchResult:
            name = f"{self._name(space)}-fold-{fold.number}"
            folder = None if state_folder is None else Path(state_folder) / name
            found = self._search(space, fold.training, self._validation, folder, identity, progress=False)
            bar.update()
            return found

        def judge(space: MixtureSpace, candidate: Tensor, fold: Fold) -> Fitness:
            return self._population.outcomes(space.to_route(candidate[None]), fold.held_out).fitness()[0]

        with bar:
            return cross_validate(
                self.configurations, len(self.examples), search, judge, self.folds, self.settings.seed
            )

    def _name(self, space: MixtureSpace) -> str:
        """Of a folder: two configurations may share a name, such as weights per layer and those per matrix."""
        number = self.configurations.index(space)
        namesakes = [other for other in self.configurations[:number] if other.name == space.name]
        return f"{space.name}-{len(namesakes) + 1}" if namesakes else space.name

    def _search(
        self,
        space: MixtureSpace,
        rows: Sequence[int],
        settings: SearchSettings,
        folder: Path | None,
        identity: dict[str, Any],
        progress: bool,
    ) -> SearchResult:
        def evaluate(candidates: Tensor) -> list[Fitness]:
            return self._population.outcomes(space.to_route(candidates), rows).fitness()

        return MixtureSearch(space, settings).run(evaluate, folder, {**identity, "rows": list(rows)}, progress)

    def _references(self) -> dict[str, Fitness]:
        """What base model and single experts make of the same examples."""
        names = [BASE_LABEL, *self.bank.experts]
        fitness = self._population.outcomes(Route.one_hot(names, list(self.bank.experts))).fitness()
        return dict(zip(names, fitness, strict=True))

    def _identity(self) -> dict[str, Any]:
        """What the fitness of a candidate depends on, for searches that are resumed."""
        columns = [name for name in self.examples.column_names if name not in IMAGE_COLUMNS]  # those are in the hashes
        rows = json.dumps(self.examples.select_columns(columns).to_list(), sort_keys=True, default=str)
        return {
            "examples": [*row_hashes(self.examples), hashlib.sha256(rows.encode()).hexdigest()],
            "experts": {name: _digest(self.bank, name) for name in self.bank.experts},
            "base_model": str(self.bank.base_model.config._name_or_path),
            "reward": _reward_name(self.reward),
            "max_new_tokens": self.max_new_tokens,
            "chat_template_kwargs": repr(self._population.generator.chat_template_kwargs),
        }

    # ---------------------------------------------------------------- result
    @property
    def result(self) -> Adaptation:
        """
        What `adapt` has found.

        Raises:
            RuntimeError: `adapt` has not been called yet.
        """
        if self._result is None:
            raise RuntimeError("Nothing has been adapted yet: call `adapt()` first.")
        return self._result

    @property
    def weights(self) -> dict[str, float] | dict[str, dict[str, float]]:
        """Mixture weights by expert; for weights in groups, those by group."""
        return self.result.weights

    def route(self, prompts: Sequence[Prompt]) -> Route:
        """The mixture that was found, for every prompt. Raises a `RuntimeError` before `adapt`."""
        return self.result.search.route(len(check_prompts(prompts)))

    def save_pretrained(self, folder: str | Path) -> Path:
        """
        Write the mixture as an ordinary expert: a PEFT adapter of type SVF that computes exactly what `route` does.

        `PeftModel.from_pretrained(base_model, folder)` loads it. Beside it, `adaptation.json` says what was found and
        how, and which examples must not be evaluated on; `expert.json` holds the facts for a card
        ([`~peft_svf.hub_cards.write_expert_card`] writes it). The folder appears at once and complete. Under
        `accelerate launch` all processes must make this call, and the main one writes.

        Args:
            folder (`str` or `Path`): Where to write; an expert of an earlier search there is replaced.

        Raises:
            RuntimeError: `adapt` has not been called yet.
            ValueError: The folder holds something else.
        """
        target = Path(folder).absolute()
        record = {**self.result.to_dict(), **self._circumstances()}
        facts = expert_facts(self.bank, record, target.name, self._task)
        save_expert(self.bank, self.result.search.route(), record, target, facts)
        return target

    def _circumstances(self) -> dict[str, Any]:
        return {
            "settings": dataclasses.asdict(self.settings),
            "reward": _reward_name(self.reward),
            "max_new_tokens": self.max_new_tokens,
            "base_model": str(self.bank.base_model.config._name_or_path),
            "examples": len(self.examples),
            "example_hashes": sorted(self.example_hashes),
        }


def _check_types(bank: Any, task: Any, settings: Any) -> None:
    if not isinstance(bank, ExpertBank):
        raise TypeError(f"`bank` is an ExpertBank, not {bank!r:.80}; ExpertBank.from_pretrained loads one.")
    if task is not None and not hasattr(task, "reward"):
        raise TypeError(f"`task` is a Task, not {task!r:.80}; peft_svf.trainers.tasks.get_task finds it by its name.")
    if not isinstance(settings, SearchSettings | None):
        raise TypeError(f"`settings` is a SearchSettings, not {settings!r:.80}; see its paper() and light().")


def _reward_and_length(
    reward: Reward | None, max_new_tokens: int | None, task: AnswerableTask | None
) -> tuple[Reward, int]:
    reward = reward if reward is not None or task is None else task.reward
    max_new_tokens = max_new_tokens if max_new_tokens is not None or task is None else task.max_new_tokens
    if reward is None or max_new_tokens is None:
        raise ValueError("Judging answers needs `reward` and `max_new_tokens`: pass both, or a `task` that has them.")
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` is at least 1, not {max_new_tokens}.")
    return reward, max_new_tokens


def _digest(bank: ExpertBank, expert: str) -> str:
    """SHA-256 of an expert's offsets, as they are applied."""
    digest = hashlib.sha256()
    for layer in bank.model.modules():
        if isinstance(layer, SVFLayer) and expert in layer.svf_offset:
            digest.update(layer.svf_name.encode())
            digest.update(layer.offset(expert).detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _reward_name(reward: Reward) -> str:
    return str(getattr(reward, "__name__", type(reward).__name__))
