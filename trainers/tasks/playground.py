"""The playground's tasks: generated problems as datasets, with rewards that judge the stated answer only."""

from __future__ import annotations

import hashlib
import re
from functools import partial
from typing import Any

from datasets import Dataset

from peft_svf.playground import Problem, generate_problems
from peft_svf.trainers.sandbox import run_tests
from peft_svf.trainers.tasks.task import Messages, RewardFunction, Task, answer_text


STATED_NUMBER = re.compile(r"\bso (-?\d+)\s*$")
STATED_LETTER = re.compile(r"\bso ([A-E])\s*$")


def _reward_stated_answer(
    pattern: re.Pattern[str], completions: list[str | Messages], answer: list[str]
) -> list[float | None]:
    matches = [pattern.search(answer_text(completion)) for completion in completions]
    return [1.0 if match and match[1] == expected else -1.0 for match, expected in zip(matches, answer, strict=True)]


def math_reward(completions: list[str | Messages], answer: list[str], **kwargs: Any) -> list[float | None]:
    """+1 if the completion ends in "so" and the number `answer`; −1 otherwise, also when no number is stated."""
    return _reward_stated_answer(STATED_NUMBER, completions, answer)


def reasoning_reward(completions: list[str | Messages], answer: list[str], **kwargs: Any) -> list[float | None]:
    """+1 if the completion ends in "so" and the letter `answer`; −1 otherwise, also when no letter is stated."""
    return _reward_stated_answer(STATED_LETTER, completions, answer)


def code_reward(completions: list[str | Messages], tests: list[list[str]], **kwargs: Any) -> list[float | None]:
    """+1 if the program passes all its unit tests in the sandbox, a separate limited process; −1 otherwise."""
    results = run_tests([answer_text(completion) for completion in completions], tests)
    return [1.0 if result.passed else -1.0 for result in results]


def _row(problem: Problem) -> dict[str, Any]:
    return {
        "id": f"{problem.family}/{hashlib.sha256(problem.prompt.encode()).hexdigest()[:16]}",
        "prompt": [{"role": "user", "content": problem.prompt}],
        "answer": problem.answer,
        "tests": list(problem.tests),
    }


def _load(family: str, split: str, n: int, seed: int = 0) -> Dataset:
    return Dataset.from_list([_row(problem) for problem in generate_problems(family, split, n, seed)])


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
