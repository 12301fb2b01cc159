"""Reward functions in TRL's signature, made from functions that judge plain texts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from peft_svf.answering import REASON_COLUMN, Messages, answer_text
from peft_svf.trainers.rewards.verdict import Verdict


RewardFunction: TypeAlias = Callable[..., list[float | None]]

LONGEST_READ = 20_000  # characters of a completion, from its end: the answer stands there, and judging stays fast
END_OF_THOUGHT = "</think>"


def reward_function(judge: Callable[..., Sequence[Verdict]]) -> RewardFunction:
    """
    Make a reward function for TRL's trainers of a function that judges texts.

    Args:
        judge (`Callable[..., Sequence[Verdict]]`):
            Takes `completions` (list of texts) and, by name, every dataset column it needs (lists of the same length);
            returns one [`Verdict`] each. Must not raise whatever a completion says.

    Returns:
        `RewardFunction`: Takes TRL's keywords (`prompts`, `completions`, every dataset column, ...) and returns −1, +1
        or None for each completion. Completions may be conversational; what stands before `</think>` is not judged.
        The reasons go to the column `reward_reason` of TRL's completion logs. It keeps the judge's name and, for early
        checks, the columns in its signature.
    """
    columns = list(inspect.signature(judge).parameters.values())[1:]
    wanted = {column.name for column in columns}

    @functools.wraps(judge)
    def reward(completions: list[str | Messages], **kwargs: Any) -> list[float | None]:
        given = {name: value for name, value in kwargs.items() if name in wanted}
        texts = [answer_text(completion).rpartition(END_OF_THOUGHT)[2] for completion in completions]
        verdicts = judge(texts, **given)
        if log_extra := kwargs.get("log_extra"):
            log_extra(REASON_COLUMN, [verdict.reason for verdict in verdicts])
        return [verdict.reward for verdict in verdicts]

    rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)
    first = inspect.Parameter("completions", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    keywords = [column.replace(kind=inspect.Parameter.KEYWORD_ONLY) for column in columns]
    reward.__signature__ = inspect.Signature([first, *keywords, rest])  # type: ignore[attr-defined]
    return reward


def with_negative_reward(reward: RewardFunction, value: float = -0.1) -> RewardFunction:
    """
    The same reward with another value for wrong answers.

    Args:
        reward (`RewardFunction`): Any reward function that returns −1 for a wrong answer.
        value (`float`, *optional*, defaults to −0.1):
            What a wrong answer gets instead of −1, at most 0. The paper takes −0.1 for vision (arXiv 2501.06252,
            appendix A.1).

    Raises:
        ValueError: If `value` is positive or not a number.
    """
    if not value <= 0:
        raise ValueError(f"a wrong answer must not be rewarded, but `value` is {value}: pass a number of at most 0")

    @functools.wraps(reward)
    def changed(*args: Any, **kwargs: Any) -> list[float | None]:
        return [value if given == -1.0 else given for given in reward(*args, **kwargs)]

    return changed
