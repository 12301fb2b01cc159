"""The interface of a task: prompts to train and evaluate on, and the reward that judges the answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from datasets import Dataset


Messages = list[dict[str, str]]
RewardFunction = Callable[..., list[float | None]]


class TaskLoader(Protocol):
    """Makes the rows of one split of a task."""

    def __call__(self, split: str, n: int, seed: int = 0) -> Dataset: ...


@dataclass(frozen=True)
class Task:
    """What an expert is trained for.

    Args:
        name (`str`): Name of the task, e.g. `"playground-math"`.
        label (`str`): The dispatcher's label for prompts of this task, e.g. `"math"`.
        load (`Callable[[str, int, int], Dataset]`):
            `load(split, n, seed=0)` gives `n` rows of `"train"`, `"validation"` or `"test"` with the columns `prompt`
            (a list of chat messages), `id` (stable across runs) and whatever `reward` needs.
        reward (`Callable[..., list[float | None]]`):
            Reward function in TRL's signature: keywords `prompts`, `completions` and every dataset column. Returns −1
            or +1 per completion, None for an answer that cannot be judged.
        max_new_tokens (`int`): Tokens a full answer needs at most.
    """

    name: str
    label: str
    load: TaskLoader
    reward: RewardFunction
    max_new_tokens: int


def answer_text(completion: str | Messages | Any) -> str:
    """Text of one completion, conversational (`[{"role": "assistant", "content": ...}]`) or plain."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
