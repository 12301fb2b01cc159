"""The ablation script and the benchmarks of tuner and trainer run and fill their tables; their numbers are not judged.

All run one after the other in one process of their own, because importing takes longer than most of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest


pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PARTS = "memory,mixed,file,8b,8b-file"  # of the benchmark of the tuner; the rest takes longer than a test may
RUN_ALL = """
import contextlib, io, json, runpy, sys, traceback
outcomes, search_path = {}, list(sys.path)
for name, (script, *arguments) in json.loads(sys.argv[1]).items():
    printed, complaints, status = io.StringIO(), io.StringIO(), 0
    sys.argv, sys.path[:] = [script, *arguments], [script.rpartition("/")[0], *search_path]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaints):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as exit:
            status = exit.code
        except BaseException:
            status = 1
            traceback.print_exc()
    outcomes[name] = (status, printed.getvalue(), complaints.getvalue())
print(json.dumps(outcomes))
"""


class Outcome(NamedTuple):
    status: int
    printed: str
    complaints: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> dict[str, Outcome]:
    """What became of each script, by the name of its call."""
    tuner, trainer = (str(EXAMPLES / "benchmarks" / name) for name in ("tuner.py", "trainer.py"))
    sizes = ["--steps", "1", "--seeds", "2", "--batch-size", "4", "--micro-batch-size", "4", "--train-prompts", "8"]
    prompts = ["--validation-prompts", "4", "--test-prompts", "6", "--output", str(folder / "verdicts.json")]
    tables = [str(folder / "table.md"), str(folder / "table.json")]
    report = ["--seeds", "1", "--output", str(folder / "report.md")]
    calls = {
        "tuner": [tuner, "--quick", "--dtype", "float32", "--parts", PARTS, "--threads", "1", "--output", *tables],
        "unknown shapes": [tuner, "--shapes", "llama-7"],
        "ablation": [str(EXAMPLES / "ablation.py"), "--methods", "SVF", "SVF, next token", *sizes, *prompts],
        "trainer": [trainer, "--quick", "--threads", "1", *report],
    }
    completed = subprocess.run(
        [sys.executable, "-c", RUN_ALL, json.dumps(calls)],
        capture_output=True,
        text=True,
        env=os.environ | {"PEFT_SVF_CACHE": "off"},
        timeout=900,
    )
    assert completed.returncode == 0, completed.stderr
    return {name: Outcome(*outcome) for name, outcome in json.loads(completed.stdout.splitlines()[-1]).items()}


def cells(table: str, method: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {method} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_quick_benchmark_of_the_tuner_fills_its_rows_and_writes_both_formats(
    outcomes: dict[str, Outcome], folder: Path
) -> None:
    assert outcomes["tuner"].status == 0, outcomes["tuner"].complaints
    rows: list[dict[str, Any]] = json.loads((folder / "table.json").read_text())["rows"]
    assert len({row["quantity"] for row in rows}) >= 6
    assert all("SVF" in row["values"] for row in rows)
    memory = {
        row["setting"]: row["values"]["SVF"] for row in rows if row["quantity"].startswith("extra memory with 1 ")
    }
    assert any("8B" in setting for setting in memory)
    table = (folder / "table.md").read_text()
    assert all(row["quantity"] in table for row in rows)


def test_unknown_shapes_are_named(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["unknown shapes"]
    assert outcome.status == 2 and "--shapes: unknown llama-7; known are" in outcome.complaints


def test_ablation_by_both_losses(outcomes: dict[str, Outcome], folder: Path) -> None:
    assert outcomes["ablation"].status == 0, outcomes["ablation"].complaints
    verdicts = json.loads((folder / "verdicts.json").read_text())
    assert len(verdicts["base"]) == 6
    table = outcomes["ablation"].printed
    for method, result in zip(("SVF", "SVF, next token"), verdicts["results"], strict=True):
        assert cells(table, method)[5] == "3072" and len(result["tried"]) == 4
        assert [one["seed"] for one in result["runs"]] == [0, 1]
        shares = [100 * sum(one["test"]) / 6 for one in result["runs"]]
        assert cells(table, method)[3].startswith(f"{sum(shares) / 2:.1f} [")


def test_quick_benchmark_of_the_trainer(outcomes: dict[str, Outcome], folder: Path) -> None:
    assert outcomes["trainer"].status == 0, outcomes["trainer"].complaints
    text = (folder / "report.md").read_text()
    for quantity in ("no KL", "exact KL", "rollouts"):
        assert quantity in text
    assert all(len(cells(text, method)) == 7 for method in ("SVF", "LoRA r16", "IA3"))
    assert "by learning rate: 0.002:" in text
