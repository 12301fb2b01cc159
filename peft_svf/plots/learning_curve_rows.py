"""The rows of a learning curve: one for each step, from a log history or from the CSV file that a training keeps."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias


Row: TypeAlias = dict[str, float]

SUMMARY = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}


def rows_by_step(log_history: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Merge the entries of each step, as training and evaluation log them one after the other.

    Args:
        log_history (`Iterable[Mapping[str, Any]]`):
            `trainer.state.log_history`, or the `log_history` of a `trainer_state.json`.

    Returns:
        `list[dict[str, float]]`: One row a step, in order, without the summary of the run (`train_runtime`, ...).
    """
    rows: dict[int, Row] = {}
    for entry in log_history:
        numbers = {k: v for k, v in entry.items() if isinstance(v, (int, float)) and k not in SUMMARY}
        rows.setdefault(entry["step"], {}).update(numbers)
    return [rows[step] for step in sorted(rows)]


def interval_columns(metric: str, names: Iterable[str]) -> dict[str, str]:
    """The columns in `names` that hold the interval of `metric`, as `{"low": ..., "high": ...}`, empty if none do."""
    ends = {end: f"{metric}_{end}" for end in ("low", "high")}
    return ends if {*ends.values()} <= {*names} else {}


def read_learning_curve(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a CSV file that a training keeps, without the metrics that a step did not log.

    Raises:
        ValueError: If `path` is not such a file.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or ()):
            raise ValueError(f"{path} is not a learning curve: it has no column `step`.")
        try:
            rows = [{name: float(value) for name, value in row.items() if value} for row in reader]
            return [{**row, "step": int(row["step"])} for row in rows]
        except (csv.Error, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a learning curve, or damaged: row {reader.line_num}, {error}.") from error
