"""What a reward function in TRL's signature makes of answers to the rows of a dataset."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset

REASON_COLUMN = "reward_reason"  # of TRL's completion logs


def judge_answers(
    reward: Callable[..., list[float | None]], dataset: Dataset, answers: Sequence[Sequence[str]], batch_size: int
) -> tuple[list[float | None], list[str]]:
    """
    Call a reward as TRL does: with messages where prompts are messages, and with every column.

    Args:
        reward (`Callable`): A reward function in TRL's signature.
        dataset (`Dataset`): N rows with the column `prompt`.
        answers (`Sequence[Sequence[str]]`): For each row, equally many answers.
        batch_size (`int`): Rows judged at once.

    Returns:
        `tuple[list[float | None], list[str]]`: Reward of each answer, `None` if it cannot be judged, and the reasons
        that the reward gives, empty texts if none; all answers to the first row, then those to the second, and so on.

    Raises:
        ValueError: If the reward returns another number of rewards than there are answers.
    """
    samples = len(answers[0])
    rewards: list[float | None] = []
    reasons: list[str] = []
    for start in range(0, len(dataset), batch_size):
        block = dataset[start : start + batch_size]
        rows = {name: [value for value in values for _ in range(samples)] for name, values in block.items()}
        texts = [answer for of_prompt in answers[start : start + batch_size] for answer in of_prompt]
        prompts = rows.pop("prompt")
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        logged: dict[str, list[Any]] = {}
        given = reward(prompts=prompts, completions=completions, log_extra=logged.__setitem__, **rows)
        if len(given) != len(texts):
            name = getattr(reward, "__name__", "the reward function")
            raise ValueError(f"{name} gave {len(given)} rewards for {len(texts)} answers")
        rewards += [None if value is None or math.isnan(value) else float(value) for value in given]
        reasons += map(str, logged.get(REASON_COLUMN, [""] * len(texts)))
    return rewards, reasons
