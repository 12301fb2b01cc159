"""Answers of a bank for the app: of the base model, of the expert that a dispatcher chooses, of a mixture by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from peft_svf.dispatch import ClassifierDispatcher, PromptDispatcher
from peft_svf.experts import BASE_LABEL, ExpertBank
from peft_svf.pipelines import Transformer2Pipeline
from peft_svf.playground import generate_problems
from peft_svf.playground.families import FAMILIES


MAX_PROMPT_CHARACTERS = 4000
MAX_NEW_TOKENS = 256
EXAMPLES_OF_FAMILY = 2


@dataclass(frozen=True)
class Answer:
    """
    One answer and how it came about.

    Args:
        text (`str`): What the model wrote. Nobody has checked it: never show it as HTML or Markdown.
        expert (`str`): The expert's name, "others" for the base model, or "mixture".
        weights (`Mapping[str, float]`): By expert, without zeros; the base model has the rest of 1.
        scores (`Mapping[str, float]`, *optional*): Label to probability; `None` if no dispatcher was asked.
        choosing_seconds (`float`), answering_seconds (`float`): What the two passes took.
    """

    text: str
    expert: str
    weights: Mapping[str, float]
    scores: Mapping[str, float] | None
    choosing_seconds: float
    answering_seconds: float


class Answerer:
    """
    Answers prompts with a bank, greedily, so that two answers differ only by the weights that wrote them.

    Threads may share it: a route belongs to the thread that computes with it.

    Args:
        model (`str`, `Path` or `ExpertBank`): Anything that [`~peft_svf.pipelines.Transformer2Pipeline`] takes.
        max_new_tokens (`int`, *optional*, defaults to 256): No answer is longer, whatever the model's own settings.
    """

    def __init__(self, model: str | Path | ExpertBank, max_new_tokens: int = MAX_NEW_TOKENS) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"An answer has at least 1 new token, not {max_new_tokens}.")
        first = Transformer2Pipeline(str(model) if isinstance(model, Path) else model)
        self.bank: ExpertBank = first.bank
        self.max_new_tokens = max_new_tokens
        self.pipelines = pipelines_of(first)
        self.base = lru_cache(maxsize=64)(self._base)  # moving a slider does not ask the base model again

    def chosen(self, prompt: str, dispatcher: str | None = None) -> Answer:
        """
        The answer of the expert or the mixture that a dispatcher chooses.

        Args:
            prompt (`str`): The question.
            dispatcher (`str`, *optional*): A key of `pipelines`; by default the bank's own.

        Raises:
            ValueError: For the user to read: an empty or a too long prompt, an unknown dispatcher.
        """
        name = next(iter(self.pipelines)) if dispatcher is None else dispatcher
        if name not in self.pipelines:
            raise ValueError(f"This bank has no dispatcher {name!r}; choose {' or '.join(self.pipelines)}.")
        return self._answer(self.pipelines[name], prompt, None)

    def mixed(self, prompt: str, weights: Mapping[str, float]) -> Answer:
        """
        The answer under Σ αₖ offsetₖ, the base model at 1 − Σ αₖ.

        Args:
            prompt (`str`): The question.
            weights (`Mapping[str, float]`): By expert; an expert that is not named has weight 0.
        """
        used = {name: float(weight) for name, weight in weights.items() if weight != 0}
        if not all(math.isfinite(weight) for weight in used.values()):
            raise ValueError("A weight is a number between 0 and 1.")
        found = self._answer(next(iter(self.pipelines.values())), prompt, used or BASE_LABEL)
        return replace(found, weights=used)

    def measure(self, prompt: str) -> float:
        """The seconds that both answers to a prompt take; asked twice, because the first call prepares things."""
        for _ in range(2):
            chosen, base = self.chosen(prompt), self._base(prompt)
        return chosen.choosing_seconds + chosen.answering_seconds + base.answering_seconds

    def _base(self, prompt: str) -> Answer:
        return self._answer(next(iter(self.pipelines.values())), prompt, BASE_LABEL)

    def _answer(self, pipe: Transformer2Pipeline, prompt: str, pinned: str | Mapping[str, float] | None) -> Answer:
        check_prompt(prompt)
        inputs = prompt if pinned is None else {"text": prompt, "expert": pinned}
        tokens = room_for_answer(pipe, prompt, self.max_new_tokens)
        record = pipe(inputs, do_sample=False, max_new_tokens=tokens, return_seconds=True)[0]
        expert = record["expert"]
        alone = {} if expert == BASE_LABEL else {expert: 1.0}
        return Answer(
            record["generated_text"],
            expert,
            record.get("weights", alone),
            record["scores"],
            record["first_pass_seconds"],
            record["second_pass_seconds"],
        )


def pipelines_of(first: Transformer2Pipeline) -> dict[str, Transformer2Pipeline]:
    """By the name of its dispatcher, a pipeline for each that this bank has; the bank's own is the first."""
    bank = first.bank
    kinds: dict[str, Any] = {"prompt": PromptDispatcher}
    if bank.classifier is not None:
        kinds["classifier"] = ClassifierDispatcher
    own = next((name for name, kind in kinds.items() if type(first.dispatcher) is kind), "the bank's own")
    others = {name: Transformer2Pipeline(bank, dispatcher=kinds[name](bank)) for name in kinds if name != own}
    return {own: first, **others}


def check_prompt(prompt: str) -> None:
    """Raise a `ValueError` that tells the user what to do about a prompt that cannot be answered."""
    if not prompt.strip():
        raise ValueError("Type a prompt first, or choose one of the examples.")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise ValueError(
            f"The prompt has {len(prompt)} characters; this app takes {MAX_PROMPT_CHARACTERS}. Shorten the prompt."
        )


def room_for_answer(pipe: Transformer2Pipeline, prompt: str, most: int) -> int:
    """How many new tokens may follow the prompt: `most`, or what its context leaves of it."""
    context = getattr(pipe.model.config.get_text_config(), "max_position_embeddings", None)
    used = pipe.preprocess(prompt)["input_ids"].shape[-1]
    return most if context is None else max(1, min(most, context - used))


def example_prompts(bank: ExpertBank) -> list[str]:
    """
    Held-out prompts of the playground, of every family that the bank has an expert for, and one for no expert.

    Those on which careful and careless authors differ, so that there is something to see. A bank without a playground
    expert gets none.
    """
    families = [family for family in FAMILIES if family in bank.experts]
    prompts = []
    for family in families:
        problems = [problem.prompt for problem in generate_problems(family, "test", 20, seed=1) if problem.has_slip]
        prompts += problems[:EXAMPLES_OF_FAMILY]
    return [*prompts, generate_problems("others", "test", 1, seed=1)[0].prompt] if families else []
