"""The console script: the demo end to end in small, and mistakes that it names in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from peft_svf import ExpertBank, __version__
from peft_svf.cli import main


def test_demo_trains_answers_reports_and_leaves_a_bank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "bank"
    assert main(["demo", "--steps", "1", "--test-prompts", "8", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    for family in ("math", "code", "reasoning"):
        assert f"{family:9}  1 steps, 3072 parameters" in printed
        assert any(line.split()[:2] == [family, "8"] for line in printed.splitlines())
    assert "How many apples does Tom have?" in printed
    assert list(ExpertBank.from_pretrained(output).experts) == ["math", "code", "reasoning"]


def test_demo_refuses_to_overwrite_a_folder_before_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["demo", "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "exists and is not a bank" in printed.err
    assert "expert" not in printed.out
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["demo", "--steps", "0"], "must be at least 1, got 0"),
        (["demo", "--steps", "many"], "invalid positive value: 'many'"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "the following arguments are required: --model, --task, --output"),
        (["evaluate"], "the following arguments are required: --model, --task"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"peft-svf {__version__}\n"


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(command in printed for command in ("train", "evaluate", "demo", "cache"))


def test_commands_import_only_what_they_need(tmp_path: Path) -> None:
    """TRL and the data sets take seconds; `python -m peft_svf.cli` is what launchers run."""
    program = """
import runpy, sys
from peft_svf.cli import main
heavy = ("trl", "datasets", "peft_svf.trainers", "peft_svf.cli.demo", "peft_svf.cli.train")
main(["cache", "list"])
print("cache list:", [name for name in heavy if name in sys.modules])
sys.argv = ["peft-svf", "evaluate", "--help"]
try:
    runpy.run_module("peft_svf.cli", run_name="__main__")
except SystemExit as exit:
    print("status", exit.code)
print("evaluate --help:", [name for name in ("trl", "datasets", "peft_svf.cli.train") if name in sys.modules])
"""
    environment = os.environ | {"PEFT_SVF_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert "cache list: []" in done.stdout
    assert "--adapter" in done.stdout and "status 0" in done.stdout
    assert "evaluate --help: []" in done.stdout
