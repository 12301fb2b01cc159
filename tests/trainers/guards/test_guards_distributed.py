"""Two processes, of which one sees the trouble: both stop at the same step, with the same offsets, and none waits."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import distributed


if not (distributed.is_available() and distributed.is_gloo_available() and hasattr(os, "fork")):
    pytest.skip("needs torch.distributed with gloo, and fork", allow_module_level=True)

PROGRAM = Path(__file__).with_name("two_processes.py")
SCENARIOS = ("loss", "gradient", "logits", "reward", "collapse")


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of all scenarios, and what they came to in each process."""
    folder = tmp_path_factory.mktemp("two_processes")
    result = subprocess.run(
        [sys.executable, str(PROGRAM), str(folder), *SCENARIOS], capture_output=True, text=True, timeout=500
    )
    logs = "\n".join(f"--- process {log.stem}\n{log.read_text()}" for log in sorted(folder.glob("*.log")))
    assert result.returncode == 0, f"{result.stderr}\n{logs}"
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    ("scenario", "message"),
    [
        (
            "loss",
            r"Step 2: the loss is not finite. The mean `policy_loss` is nan, because of answers \d+ of process 1\.",
        ),
        ("gradient", "Step 2: the gradient is not finite."),
        ("reward", "Step 2: the reward of `infinite_in_process_1` is not finite. It is infinite for 1 of 32 answers"),
        ("logits", "Step 2: the logits are not finite. Answers could not be sampled in"),
    ],
)
def test_what_one_process_sees_stops_both(
    outcome: tuple[Path, list[dict[str, Any]]], scenario: str, message: str
) -> None:
    folder, facts = outcome
    first, second = (own[scenario] for own in facts)
    for own in (first, second):
        assert re.match(message, own["message"]) and own["step"] == 1
    assert first["offsets"] == second["offsets"] and 0 < max(map(abs, first["offsets"])) < 0.011  # one step of 1e-2
    saved = folder / scenario / "non_finite_batch-1"
    assert sorted(path.name for path in saved.glob("*.json")) == ["process-0.json", "process-1.json"]


def test_the_batch_of_the_guilty_process_is_its_own(outcome: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = outcome
    own = [json.loads((folder / "loss/non_finite_batch-1" / f"process-{i}.json").read_text()) for i in range(2)]
    are_nan = [[i for i, a in enumerate(facts["answers"]) if a["advantage"] == "nan"] for facts in own]
    assert [facts["not_finite"] for facts in own] == are_nan and [len(rows) for rows in are_nan] == [0, 1]
    rewards = [json.loads((folder / "reward/non_finite_batch-1" / f"process-{i}.json").read_text()) for i in range(2)]
    found = [facts["answers"][0]["rewards"]["infinite_in_process_1"] for facts in rewards]
    assert found == [1.0, "inf"]


def test_both_leave_a_collapse_at_the_same_step_and_place(outcome: tuple[Path, list[dict[str, Any]]]) -> None:
    first, second = (own["collapse"] for own in outcome[1])
    assert first == second and first["step"] < 40 and not any(first["offsets"])
