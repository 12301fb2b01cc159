"""The learning curve of a log history: the table, its file, and what the picture shows."""

from __future__ import annotations

import builtins
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from peft_svf.experts.files import replace_file
from peft_svf.trainers.logs.learning_curve import (
    column_order,
    read_learning_curve,
    rows_by_step,
    write_learning_curve,
)
from peft_svf.trainers.logs.learning_curve_plot import learning_curve_figure, plot_learning_curve


REWARDS = [-0.5, 0.25, 0.75, 0.75, 0.1]  # at steps 0, 10, ..., 40


def history(steps: int = 40, **evaluation: Any) -> list[dict[str, Any]]:
    random.seed(0)
    entries: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step:
            entries.append({"loss": 0.1, "reward": random.uniform(-1, 1), "kl": 0.01 * step, "step": step})
        if step % 10 == 0:
            score = REWARDS[step // 10 % len(REWARDS)]
            interval = {"eval_reward_low": score - 0.2, "eval_reward_high": score + 0.1}
            entries.append({"eval_reward": score, **interval, **evaluation, "step": step})
    return [*entries, {"train_runtime": 9.0, "train_loss": 0.3, "z/layers/0": 0.5, "step": steps}]


def test_a_row_joins_what_training_and_evaluation_logged_at_its_step() -> None:
    rows = rows_by_step(history())
    assert [row["step"] for row in rows] == list(range(41))
    assert {"reward", "eval_reward"} <= rows[10].keys() and "eval_reward" not in rows[11]
    assert "train_runtime" not in rows[40] and rows[40]["z/layers/0"] == 0.5


def test_columns_do_not_depend_on_the_order_of_the_logs() -> None:
    names = ["z/layers/10", "z/layers/9", "kl", "step", "eval_reward_high", "eval_reward_low", "reward", "eval_reward"]
    first = ["step", "reward", "eval_reward", "eval_reward_low", "eval_reward_high", "kl"]
    assert column_order([dict.fromkeys(names, 0.0)]) == [*first, "z/layers/9", "z/layers/10"]
    assert column_order([{name: 0.0} for name in reversed(names)]) == [*first, "z/layers/9", "z/layers/10"]


def test_the_file_holds_every_number_exactly(tmp_path: Path) -> None:
    write_learning_curve(history(), tmp_path / "curve.csv")
    assert read_learning_curve(tmp_path / "curve.csv") == rows_by_step(history())


def test_a_history_that_went_through_a_checkpoint_gives_the_same_file(tmp_path: Path) -> None:
    write_learning_curve(history(), tmp_path / "a.csv")
    write_learning_curve(json.loads(json.dumps(history())), tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_a_failed_write_leaves_the_file_before_it(tmp_path: Path) -> None:
    path = tmp_path / "curve.csv"
    write_learning_curve(history(), path)
    before = path.read_bytes()

    def full_disk(partial: Path) -> None:
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        replace_file(path, full_disk)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["curve.csv"]


def test_another_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv is not a learning curve"):
        read_learning_curve(tmp_path / "other.csv")


class TestPicture:
    """Needs matplotlib, the extra `plots`."""

    @pytest.fixture(autouse=True)
    def matplotlib(self) -> None:
        pytest.importorskip("matplotlib")

    def lines(self, source: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        return {line.get_label(): line for line in learning_curve_figure(source, *arguments, **options).axes[0].lines}

    def test_it_shows_the_rewards_the_start_and_the_first_of_the_best_steps(self) -> None:
        lines = self.lines(history())
        assert list(lines["validation"].get_xdata()) == [0, 10, 20, 30, 40]
        assert list(lines["validation"].get_ydata()) == REWARDS
        assert list(lines["training"].get_xdata()) == list(range(1, 41))
        assert set(lines["validation before training"].get_ydata()) == {REWARDS[0]}
        assert (*lines["best: step 20"].get_xdata(), *lines["best: step 20"].get_ydata()) == (20, 0.75)

    def test_the_interval_is_a_band(self) -> None:
        (band,) = learning_curve_figure(history()).axes[0].collections
        heights = {(int(x), round(float(y), 6)) for x, y in band.get_paths()[0].vertices}
        assert {(0, -0.7), (0, -0.4), (20, 0.55), (20, 0.85)} <= heights

    def test_the_best_step_follows_the_metric_that_chose_it(self) -> None:
        rows = history()
        for entry in rows:
            if "eval_reward" in entry:
                entry["eval_loss"] = abs(entry["step"] - 30)
        assert "best: step 30" in self.lines(rows, "eval_loss", greater_is_better=False)

    def test_each_eval_dataset_has_a_line_and_the_chosen_one_the_best_step(self) -> None:
        rows = [
            {"step": s, "eval_easy_reward": s / 40, "eval_hard_reward": -s / 40, "eval_rewards/f/mean": 0.0}
            for s in (0, 20, 40)
        ]
        labels = self.lines(rows, "eval_hard_reward")
        assert {"easy_reward", "hard_reward", "best: step 0"} <= labels.keys() and "best: step 40" not in labels

    def test_the_kl_has_axes_of_its_own_only_if_there_is_one(self) -> None:
        without = [{k: v for k, v in entry.items() if k != "kl"} for entry in history()]
        assert len(learning_curve_figure(without).axes) == 1
        (line,) = learning_curve_figure(history()).axes[1].lines
        assert line.get_ydata()[-1] == pytest.approx(0.4)

    def test_a_small_file_from_the_table_without_pyplot(self, tmp_path: Path) -> None:
        write_learning_curve(history(2000), tmp_path / "curve.csv")
        loaded = "matplotlib.pyplot" in sys.modules
        plot_learning_curve(tmp_path / "curve.csv", tmp_path / "curve.png", title="math")
        data = (tmp_path / "curve.png").read_bytes()
        assert data.startswith(b"\x89PNG") and len(data) < 100_000
        assert ("matplotlib.pyplot" in sys.modules) == loaded

    def test_nothing_to_draw_is_an_error(self) -> None:
        with pytest.raises(ValueError, match="no reward to draw"):
            learning_curve_figure([{"step": 1, "loss": 0.5}])


def test_without_matplotlib_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = builtins.__import__

    def without_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"pip install peft-svf\[plots\]"):
        plot_learning_curve(history(), tmp_path / "curve.png")


@pytest.mark.parametrize("row", ["1,2,3", ",2", "inf,2", "nan,2", "1,abc", '1,"' + "x" * 200_000 + '"'])
def test_a_damaged_file_is_no_learning_curve(tmp_path, row):
    (tmp_path / "curve.csv").write_text(f"step,reward\n{row}\n")
    with pytest.raises(ValueError, match=r"curve\.csv is not a learning curve, or damaged: row"):
        read_learning_curve(tmp_path / "curve.csv")
