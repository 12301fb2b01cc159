"""GSM8K: grade-school word problems whose answer is a number (Cobbe et al. 2021, arXiv 2110.14168)."""

from __future__ import annotations

import re

from peft_svf.trainers.rewards.math_answer import number_reward
from peft_svf.trainers.rewards.numbers import parse_number
from peft_svf.trainers.rewards.stated_answer import gsm8k_gold
from peft_svf.trainers.tasks.benchmark import BenchmarkLoader, text_of, user_prompt
from peft_svf.trainers.tasks.files import Row
from peft_svf.trainers.tasks.source import HubSource
from peft_svf.trainers.tasks.task import Task


PROMPT = """{question}

Solve this step by step. Then end with the line "The answer is N.", where N is the number asked for."""

CALCULATOR_NOTE = re.compile(r"<<[^<>]*>>")  # "4*2=<<4*2=8>>8": for a calculator, not for readers

SOURCE = HubSource(
    "openai/gsm8k", "main", "740312add88f781978c0658806c59bc2815b9866", ("train", "test"), ("question", "answer")
)


def gsm8k_row(row: Row) -> Row:
    """Prompt, answer and solution of an official row; the answer is the number after `####`."""
    worked = text_of(row, "answer")
    answer = gsm8k_gold(worked)
    if parse_number(answer) is None:
        raise ValueError(f"the answer after `####` is {answer!r}, not a number")
    steps = CALCULATOR_NOTE.sub("", worked.rpartition("####")[0]).strip()
    return {
        "prompt": user_prompt(PROMPT.format(question=text_of(row, "question"))),
        "answer": answer,
        "solution": f"{steps}\nThe answer is {answer}.".lstrip(),
    }


GSM8K = Task(
    "gsm8k",
    "math",
    BenchmarkLoader("gsm8k", SOURCE, gsm8k_row, "question"),
    number_reward,
    512,
    "Grade-school word problems; the final number is judged.",
)
"""GSM8K: 7,473 training rows in halves of 3,736, 1,319 test rows."""
