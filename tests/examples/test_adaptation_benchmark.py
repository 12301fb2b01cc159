"""The benchmark of self-adaptation runs and fills its tables; its numbers are not judged here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "benchmarks" / "adaptation.py"


def rows(report: str, beginning: str) -> list[list[str]]:
    """The cells of all table rows that begin so."""
    lines = [line for line in report.splitlines() if line.startswith(f"| {beginning}")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_quick_run_fills_every_part(tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    command = [sys.executable, str(SCRIPT), "--quick", "--threads", "1", "--work", str(tmp_path / "work")]
    completed = subprocess.run(
        [*command, "--output", str(report)],
        capture_output=True,
        text=True,
        env=os.environ | {"PEFT_SVF_CACHE": "off"},
        timeout=500,
    )
    assert completed.returncode == 0, completed.stderr
    text = report.read_text()
    timed = [
        *rows(text, "pass 1, × of pass 2"),
        *rows(text, "generating the label"),
        *rows(text, "mixed batch, × of one"),
        *rows(text, "one expert after another"),
        *rows(text, "merging each mixture"),
        *rows(text, "an adapter of each mixture"),
    ]
    assert len(timed) == 8  # candidates are compared on two models
    assert all(float(row[2]) > 0 and row[3].startswith(("met", "missed")) for row in timed)
    # Two instructions, each with accuracies over all prompts and by seven families
    assert [len(row) for row in rows(text, "A | ")] == [9, 9]
    assert rows(text, "A | ")[0][1].startswith("100.0")  # the instruction that the base model was taught
    hard = [row for row in rows(text, "math-hard | ") if len(row) == 5]
    assert len(hard) == 4 and all(abs(sum(map(float, row[1:])) - 100) < 0.3 for row in hard)
    for method in (
        "base model",
        "single expert, best on the 10",
        "A, the bank's",
        "B, a bare",
        "C, 3 examples, light",
    ):
        (row,) = rows(text, method)
        assert 0 <= float(row[1].split()[0]) <= 100
    (search,) = rows(text, "math-hard | C, 3")
    assert abs(sum(map(float, search[2:5])) - 100) <= 2  # mixture weights
    assert int(search[7]) == 4 * 3 + 4 * 3  # answers: one generation of four, then base model and three experts
    assert not (tmp_path / "work").exists()  # nothing is trained
