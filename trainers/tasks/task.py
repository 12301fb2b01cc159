"""The interface of a task: prompts to train and evaluate on, and the reward that judges the answers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from peft_svf.trainers.rewards import RewardFunction


if TYPE_CHECKING:
    from datasets import Dataset

FilePath: TypeAlias = str | os.PathLike[str]
DataFiles: TypeAlias = FilePath | Sequence[FilePath] | Mapping[str, FilePath | Sequence[FilePath]]


class TaskLoader(Protocol):
    """Makes the rows of one split of a task."""

    def __call__(
        self,
        split: str,
        n: int | None = None,
        seed: int = 0,
        *,
        data_files: DataFiles | None = None,
        batch_size: int | None = None,
    ) -> Dataset: ...


@dataclass(frozen=True)
class Task:
    """What an expert is trained for.

    Args:
        name (`str`): Name of the task, e.g. `"gsm8k"`.
        label (`str`): The dispatcher's label for prompts of this task, e.g. `"math"`.
        load (`TaskLoader`):
            `load(split)` gives the rows of `"train"`, `"validation"` or `"test"` with the columns `prompt` (a list of
            chat messages), `id` (stable across runs and machines), whatever `reward` needs and, where the data has
            one, `solution` (a right answer in full, for next-token training). `n` takes that many rows, drawn with
            `seed`; `data_files` reads local files instead of the Hub; `batch_size` refuses a split that is smaller
            than one batch.
        reward (`RewardFunction`):
            Reward function in TRL's signature: keywords `prompts`, `completions` and every dataset column. Returns −1
            or +1 per completion, None for an answer that cannot be judged.
        max_new_tokens (`int`): Tokens a full answer needs at most.
        description (`str`, *optional*, defaults to `""`): One sentence for people: what is asked, how it is judged.

    Raises:
        ValueError: If the name or the label is empty, or `max_new_tokens` is not positive.
    """

    name: str
    label: str
    load: TaskLoader
    reward: RewardFunction
    max_new_tokens: int
    description: str = ""

    def __post_init__(self) -> None:
        if not self.name or not self.label:
            raise ValueError(f"a task needs a name and a label, but they are {self.name!r} and {self.label!r}")
        if self.max_new_tokens < 1:
            raise ValueError(
                f"`max_new_tokens` of the task {self.name} is {self.max_new_tokens}: it must be at least 1"
            )
