"""MATH: competition mathematics whose answer is a LaTeX expression (Hendrycks et al. 2021, arXiv 2103.03874)."""

from __future__ import annotations

from peft_svf.trainers.rewards.expression_process import check_math_verify
from peft_svf.trainers.rewards.math_answer import math_reward
from peft_svf.trainers.rewards.stated_answer import boxed_gold
from peft_svf.trainers.tasks.benchmark import BenchmarkLoader, text_of, user_prompt
from peft_svf.trainers.tasks.files import Row
from peft_svf.trainers.tasks.source import HubSource
from peft_svf.trainers.tasks.task import Task


check_math_verify()  # now, not at the first answer that it is needed for

PROMPT = """{problem}

Solve this step by step. Then put the final answer, and nothing else, in \\boxed{{}}."""

# The original, hendrycks/competition_math, was taken off the Hub; this copy has the same rows in one configuration.
SOURCE = HubSource(
    "DigitalLearningGmbH/MATH-lighteval",
    "default",
    "0530c78699ea5e8eb5530600900e1f328b48acad",
    ("train", "test"),
    ("problem", "solution"),
)


def math_row(row: Row) -> Row:
    """
    Prompt, answer and solution of an official row; the answer is in the solution's last box.

    A solution without a box gives an empty answer, which the reward leaves unjudged.
    """
    solution = text_of(row, "solution")
    return {
        "prompt": user_prompt(PROMPT.format(problem=text_of(row, "problem"))),
        "answer": boxed_gold(solution) or "",
        "solution": solution,
    }


MATH = Task(
    "math",
    "math",
    BenchmarkLoader("math", SOURCE, math_row, "problem"),
    math_reward,
    1024,
    "Competition mathematics; the boxed expression is judged.",
)
"""MATH: 7,500 training rows in halves, 5,000 test rows."""
