"""The learning curve as a picture: rewards of training and validation by step, and the KL below them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from peft_svf.plots.canvas import new_figure, plain, save_figure
from peft_svf.plots.learning_curve_rows import Row, interval_columns, read_learning_curve, rows_by_step


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY, PURPLE, VALIDATION_COLORS = "#9aa5b1", "#7a5195", ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3")
MOST_MARKERS = 40  # more would hide the line
KL_COLUMNS = {"kl_sequence": "KL per answer", "kl": "KL per token"}  # the first that was logged is drawn
WIDTH, HEIGHT = 6.4, 3.6  # inches


def plot_learning_curve(
    source: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    metric: str | None = None,
    greater_is_better: bool = True,
    title: str | None = None,
) -> None:
    """Save the picture of [`learning_curve_figure`].

    Args:
        source (`str`, `os.PathLike` or `Iterable[Mapping[str, Any]]`):
            A `learning_curve.csv`, or `trainer.state.log_history`.
        path (`str` or `os.PathLike`):
            The file; its ending says in which format, e.g. `.png`. It is replaced as a whole or not at all.
        metric, greater_is_better, title:
            As in [`learning_curve_figure`].

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If `source` has no reward.
    """
    save_figure(learning_curve_figure(source, metric, greater_is_better, title), path)


def learning_curve_figure(
    source: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    metric: str | None = None,
    greater_is_better: bool = True,
    title: str | None = None,
) -> Figure:
    """
    Draw the training reward, the validation score with its interval if one was logged, the score before training (of
    the base model) as a dashed line, the best step, and the KL from the base model below if there is one.

    Args:
        source (`str`, `os.PathLike` or `Iterable[Mapping[str, Any]]`):
            A `learning_curve.csv`, or `trainer.state.log_history`.
        metric (`str`, *optional*):
            The validation score that the best step was chosen by, e.g. `"eval_success"`. Defaults to `"eval_reward"`;
            with several eval datasets every one has a best step then.
        greater_is_better (`bool`, *optional*, defaults to `True`):
            Whether the best step has the highest score, or the lowest.
        title (`str`, *optional*):
            Text above the picture.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If `source` has no reward.
    """
    figure = new_figure(HEIGHT, WIDTH)
    from matplotlib.ticker import MaxNLocator

    rows = read_learning_curve(source) if isinstance(source, (str, os.PathLike)) else rows_by_step(source)
    names = validation_rewards(rows)
    if not names and not any("reward" in row for row in rows):
        raise ValueError("There is no reward to draw: `source` has neither `reward` nor `eval_reward`.")
    kl = next((name for name in KL_COLUMNS if any(name in row for row in rows)), None)

    ratios = [3, 1] if kl else [1]
    axes = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    _draw_line(axes[0], *series(rows, "reward"), color=GREY, label="training")
    for name, color in zip(names, VALIDATION_COLORS, strict=False):
        by = metric or name
        same_dataset = by.rpartition("_")[0] == name.rpartition("_")[0]
        _draw_validation(axes[0], rows, name, color, best_step(rows, by, greater_is_better) if same_dataset else None)
    axes[0].set_ylabel("reward")
    axes[0].legend(fontsize="small", edgecolor="none", framealpha=0.85)
    if kl:
        _draw_line(axes[1], *series(rows, kl), color=PURPLE)
        axes[1].set_ylabel(KL_COLUMNS[kl], fontsize="small")
    axes[-1].set_xlabel("step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(plain(title))
    return figure


def validation_rewards(rows: list[Row]) -> list[str]:
    """The columns of the validation reward: `eval_reward`, or with several eval datasets one for each."""
    return sorted({name for row in rows for name in row if re.fullmatch(r"eval_(.+_)?reward", name)})


def series(rows: list[Row], name: str) -> tuple[list[int], list[float]]:
    """The steps at which `name` was logged, and its values."""
    points = [(int(row["step"]), row[name]) for row in rows if name in row]
    return [step for step, _ in points], [value for _, value in points]


def best_step(rows: list[Row], name: str, greater_is_better: bool = True) -> int | None:
    """The first step with the best score, step 0 included, as the trainer chooses; None if there is no score."""
    sign = 1 if greater_is_better else -1
    scores = [(sign * value, -step) for step, value in zip(*series(rows, name), strict=True) if value == value]
    return -max(scores)[1] if scores else None


def _draw_line(axis: Axes, steps: list[int], values: list[float], **options: Any) -> None:
    marker = "o" if len(steps) <= MOST_MARKERS else ""
    axis.plot(steps, values, marker=marker, markersize=2.5, linewidth=1.2, **options)


def _draw_validation(axis: Axes, rows: list[Row], name: str, color: str, best: int | None) -> None:
    label = "validation" if name == "eval_reward" else plain(name.removeprefix("eval_"))
    steps, values = series(rows, name)
    ends = interval_columns(name, {column for row in rows for column in row})
    if ends:
        known = [row for row in rows if all(end in row for end in ends.values())]
        low, high = (series(known, ends[end])[1] for end in ("low", "high"))
        axis.fill_between([row["step"] for row in known], low, high, color=color, alpha=0.15, linewidth=0)
    _draw_line(axis, steps, values, color=color, label=label)
    if steps[0] == 0:
        axis.axhline(values[0], color=color, linestyle="--", linewidth=1, label=f"{label} before training")
    if best in steps:
        point = best, values[steps.index(best)]
        axis.plot(*point, marker="*", markersize=11, color=color, linestyle="none", label=f"best: step {best}")
