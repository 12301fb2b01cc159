"""The solutions that next-token training learns from are right answers by the task's own reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peft_svf.trainers.tasks import get_task


SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"
ARC = "arc/hf_schema/ARC-Challenge.train.jsonl"


def rewards_of_solutions(name: str, split: str, n: int | None, file: str | None) -> list[float | None]:
    options: dict[str, Any] = {}
    if file is not None:
        if not (SHARED / file).exists():
            pytest.skip(f"{file} is not at {SHARED}")
        options["data_files"] = SHARED / file
    task = get_task(name)
    columns = task.load(split, n, **options).to_dict()
    return task.reward(prompts=columns.pop("prompt"), completions=columns["solution"], **columns)


@pytest.mark.parametrize(
    ("name", "split", "n", "file"),
    [
        ("gsm8k", "train", None, "gsm8k/train.jsonl.gz"),
        ("math", "test", 200, "math/test.jsonl.gz"),
        ("arc_challenge", "train", None, ARC),
        ("mbpp", "train", 20, "mbpp"),
        ("playground-math", "train", 200, None),
        ("playground-code", "train", 50, None),
        ("playground-reasoning", "train", 200, None),
        ("playground-math-hard", "train", 200, None),
    ],
)
def test_every_solution_earns_the_reward(name: str, split: str, n: int | None, file: str | None) -> None:
    rewards = rewards_of_solutions(name, split, n, file)
    assert rewards and set(rewards) == {1.0}


def test_calculator_notes_are_not_taught() -> None:
    if not (SHARED / "gsm8k").is_dir():
        pytest.skip(f"gsm8k is not at {SHARED}")
    rows = get_task("gsm8k").load("test", data_files=SHARED / "gsm8k" / "test.jsonl")
    assert rows[0]["solution"].startswith("Janet sells 16 - 3 - 4 = 9 duck eggs a day.\n")
    assert rows[0]["solution"].endswith("\nThe answer is 18.")
    assert not any("<<" in solution or "####" in solution for solution in rows["solution"])
