"""The ablation script and the trainer's benchmark run and fill their tables; their numbers are not judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(script: Path, *arguments: str) -> str:
    completed = subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PEFT_SVF_CACHE": "off"},
        timeout=500,
    )
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def cells(table: str, method: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {method} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ablation_by_both_losses(tmp_path: Path) -> None:
    sizes = ["--steps", "1", "--seeds", "2", "--batch-size", "4", "--micro-batch-size", "4", "--train-prompts", "8"]
    prompts = ["--validation-prompts", "4", "--test-prompts", "6", "--output", str(tmp_path / "verdicts.json")]
    table = run(EXAMPLES / "ablation.py", "--methods", "SVF", "SVF, next token", *sizes, *prompts)
    verdicts = json.loads((tmp_path / "verdicts.json").read_text())
    assert len(verdicts["base"]) == 6
    for method, result in zip(("SVF", "SVF, next token"), verdicts["results"], strict=True):
        assert cells(table, method)[5] == "3072" and len(result["tried"]) == 4
        assert [one["seed"] for one in result["runs"]] == [0, 1]
        shares = [100 * sum(one["test"]) / 6 for one in result["runs"]]
        assert cells(table, method)[3].startswith(f"{sum(shares) / 2:.1f} [")


def test_quick_benchmark_of_the_trainer(tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    run(EXAMPLES / "benchmarks" / "trainer.py", "--quick", "--threads", "1", "--seeds", "1", "--output", str(report))
    text = report.read_text()
    for quantity in ("no KL", "exact KL", "rollouts"):
        assert quantity in text
    assert all(len(cells(text, method)) == 7 for method in ("SVF", "LoRA r16", "IA3"))
    assert "by learning rate: 0.002:" in text
