"""The playground's tasks: generated problems as datasets, with rewards that judge the stated answer only."""

from __future__ import annotations

import hashlib
import re
from functools import partial
from typing import Any

from datasets import Dataset

from peft_svf.playground import Problem, generate_problems
from peft_svf.trainers.rewards import RewardFunction, Verdict, reward_function
from peft_svf.trainers.sandbox import run_tests
from peft_svf.trainers.tasks.splits import check_batch_size
from peft_svf.trainers.tasks.task import DataFiles, Task


DEFAULT_ROWS = 1000
MOST_ROWS = 100_000  # takes seconds; a slip of the finger should not take hours
STATED_NUMBER = re.compile(r"\bso (-?\d+)\s*$")
STATED_LETTER = re.compile(r"\bso ([A-E])\s*$")


def _stated(pattern: re.Pattern[str], completions: list[str], answer: list[str]) -> list[Verdict]:
    verdicts = []
    for completion, expected in zip(completions, answer, strict=True):
        match = pattern.search(completion)
        if match is None:
            verdicts.append(Verdict.wrong("no answer stated"))
        elif match[1] != expected:
            verdicts.append(Verdict.wrong(f"stated {match[1]}, expected {expected}"))
        else:
            verdicts.append(Verdict.right(expected))
    return verdicts


@reward_function
def math_reward(completions: list[str], answer: list[str]) -> list[Verdict]:
    """+1 if the completion ends in "so" and the number `answer`; −1 otherwise, also when no number is stated."""
    return _stated(STATED_NUMBER, completions, answer)


@reward_function
def reasoning_reward(completions: list[str], answer: list[str]) -> list[Verdict]:
    """+1 if the completion ends in "so" and the letter `answer`; −1 otherwise, also when no letter is stated."""
    return _stated(STATED_LETTER, completions, answer)


@reward_function
def code_reward(completions: list[str], tests: list[list[str]]) -> list[Verdict]:
    """+1 if the program passes all its unit tests in the sandbox, a separate limited process; −1 otherwise."""
    results = run_tests(completions, tests)
    return [Verdict.right(r.reason) if r.passed else Verdict.wrong(r.reason) for r in results]


def _row(problem: Problem) -> dict[str, Any]:
    return {
        "id": f"{problem.family}/{hashlib.sha256(problem.prompt.encode()).hexdigest()[:16]}",
        "prompt": [{"role": "user", "content": problem.prompt}],
        "answer": problem.answer,
        "tests": list(problem.tests),
        "solution": problem.careful,
    }


def _load(
    family: str,
    split: str,
    n: int | None = None,
    seed: int = 0,
    *,
    data_files: DataFiles | None = None,
    batch_size: int | None = None,
) -> Dataset:
    if data_files is not None:
        raise ValueError(f"playground-{family} is generated, not read: remove `data_files`, or choose another task")
    rows = DEFAULT_ROWS if n is None else n
    if rows > MOST_ROWS:
        raise ValueError(f"`n` is {rows}, but no more than {MOST_ROWS} rows of playground-{family} are made at once")
    check_batch_size(f"playground-{family}", split, rows, batch_size)
    return Dataset.from_list([_row(problem) for problem in generate_problems(family, split, rows, seed)])


def _task(family: str, reward: RewardFunction, max_new_tokens: int) -> Task:
    label = family.removesuffix("-hard")
    return Task(f"playground-{family}", label, partial(_load, family), reward, max_new_tokens)


PLAYGROUND_TASKS: dict[str, Task] = {
    "math": _task("math", math_reward, 24),
    "code": _task("code", code_reward, 26),
    "reasoning": _task("reasoning", reasoning_reward, 14),
    "math-hard": _task("math-hard", math_reward, 48),
    "code-hard": _task("code-hard", code_reward, 30),
    "reasoning-hard": _task("reasoning-hard", reasoning_reward, 20),
}
"""The three families that experts are trained for and their harder variants, which no expert sees in training."""
