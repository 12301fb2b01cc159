"""The files that a training run keeps of its learning curve."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_svf.trainers import SVFPolicyGradientTrainer
from peft_svf.trainers.logs import learning_curve_callback as learning_curve
from peft_svf.trainers.logs.learning_curve import Row, read_learning_curve, rows_by_step


MakeTrainer = Callable[..., SVFPolicyGradientTrainer]
EVALUATED = {"learning_curve": True, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "report_to": "none"}
CLOCK = ("tokens_per_second", "step_time", "runtime", "samples_per_second", "steps_per_second")


def timeless(rows: list[Row]) -> list[Row]:
    return [{name: value for name, value in row.items() if not name.endswith(CLOCK)} for row in rows]


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*learning_curve*")}


def test_the_table_has_every_step_of_training_and_evaluation(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(**EVALUATED, eval_on_start=True)
    trainer.train()
    rows = read_learning_curve(tmp_path / "run" / "learning_curve.csv")
    assert rows == rows_by_step(trainer.state.log_history)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval_reward" in row] == [0, 2, 4]
    wanted = {"epoch", "reward", "entropy", "policy_loss", "grad_norm", "learning_rate", "tokens_per_second"}
    assert all(wanted | {"z/rms_change", "completions/mean_length"} <= row.keys() for row in rows[1:])


def test_the_picture_comes_with_matplotlib(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    make_trainer(**EVALUATED).train()
    assert files(tmp_path / "run") == {"learning_curve.csv", "learning_curve.png"}
    assert (tmp_path / "run" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_a_table_and_a_hint(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(
        learning_curve.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else original(name)
    )
    with caplog.at_level(logging.INFO, logger=learning_curve.__name__):
        make_trainer(**EVALUATED).train()
    assert files(tmp_path / "run") == {"learning_curve.csv"}
    assert [record.message for record in caplog.records].count(
        "No learning_curve.png without matplotlib: `pip install peft-svf[plots]`."
    ) == 1


def test_it_can_be_turned_off(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(**{**EVALUATED, "learning_curve": False}).train()
    assert files(tmp_path / "run") == set()


def test_a_resumed_run_writes_what_an_uninterrupted_one_does(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    options: dict[str, Any] = {**EVALUATED, "save_strategy": "steps", "save_steps": 2}
    make_trainer(**options, output_dir=str(tmp_path / "whole")).train()
    make_trainer(**options, output_dir=str(tmp_path / "parts")).train()
    table = tmp_path / "parts" / "learning_curve.csv"
    table.write_text("step,reward\n1,0.5\n")  # as a run that was killed may leave it
    resumed = make_trainer(**options, output_dir=str(tmp_path / "parts"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    whole = read_learning_curve(tmp_path / "whole" / "learning_curve.csv")
    assert timeless(read_learning_curve(table)) == timeless(whole)


def test_a_table_that_cannot_be_written_does_not_end_the_training(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full_disk(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(learning_curve, "write_learning_curve", full_disk)
    trainer = make_trainer(max_steps=2, report_to="none", learning_curve=True)
    trainer.train()
    assert trainer.state.global_step == 2
    warnings = [record.message for record in caplog.records if record.name == learning_curve.__name__]
    assert len(warnings) == 1 and "No space left on device" in warnings[0]


def test_slow_writing_waits_but_the_end_is_complete(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[int] = []
    monkeypatch.setattr(learning_curve, "SHARE_OF_TIME", 1e-9)  # no time to spend
    original = learning_curve.write_learning_curve
    monkeypatch.setattr(
        learning_curve,
        "write_learning_curve",
        lambda history, path: (written.append(history[-1]["step"]), original(history, path)),
    )
    make_trainer(max_steps=3, report_to="none", learning_curve=True).train()
    assert written == [1, 3]
    assert len(read_learning_curve(tmp_path / "run" / "learning_curve.csv")) == 3
