"""The benchmark of the tuner runs and prints every quantity; its numbers are not judged here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "benchmarks" / "tuner.py"
PARTS = "memory,mixed,file,8b,8b-file"  # the rest takes longer than a test may


def test_quick_run_fills_its_rows_and_writes_both_formats(tmp_path: Path) -> None:
    outputs = [tmp_path / "table.md", tmp_path / "table.json"]
    command = [sys.executable, str(SCRIPT), "--quick", "--dtype", "float32", "--parts", PARTS, "--threads", "1"]
    environment = os.environ | {"PEFT_SVF_CACHE": "off"}
    completed = subprocess.run(
        [*command, "--output", *map(str, outputs)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert completed.returncode == 0, completed.stderr
    rows = json.loads(outputs[1].read_text())["rows"]
    assert len({row["quantity"] for row in rows}) >= 6
    assert all("SVF" in row["values"] for row in rows)
    memory = {
        row["setting"]: row["values"]["SVF"] for row in rows if row["quantity"].startswith("extra memory with 1 ")
    }
    assert any("8B" in setting for setting in memory)
    table = outputs[0].read_text()
    assert all(row["quantity"] in table for row in rows)


def test_unknown_shapes_are_named() -> None:
    completed = subprocess.run(
        [sys.executable, str(SCRIPT), "--shapes", "llama-7"], capture_output=True, text=True, timeout=300
    )
    assert completed.returncode == 2 and "--shapes: unknown llama-7; known are" in completed.stderr
