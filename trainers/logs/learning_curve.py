"""The learning curve as a table: one row for each step of `log_history`, as a CSV file."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from peft_svf.experts.files import replace_file


Row: TypeAlias = dict[str, float]

FIRST_COLUMNS = (  # what a reader looks for first; all other metrics follow by name
    "step",
    "epoch",
    "reward",
    "reward_std",
    "eval_reward",
    "eval_success",
    "kl",
    "kl_sequence",
    "entropy",
    "loss",
    "policy_loss",
    "grad_norm",
    "learning_rate",
    "completions/mean_length",
    "z/rms_change",
    "z/max_change",
    "num_tokens",
    "tokens_per_second",
    "step_time",
)
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


def column_order(rows: Iterable[Row]) -> list[str]:
    """All columns of `rows`: the usual ones first, an interval behind its metric, the others by name."""
    names = {name for row in rows for name in row}
    first = []
    for name in FIRST_COLUMNS:
        first += [name] * (name in names) + list(interval_columns(name, names).values())
    return first + sorted(names - {*first}, key=_natural)


def interval_columns(metric: str, names: Iterable[str]) -> dict[str, str]:
    """The columns in `names` that hold the interval of `metric`, as `{"low": ..., "high": ...}`, empty if none do."""
    ends = {end: f"{metric}_{end}" for end in ("low", "high")}
    return ends if {*ends.values()} <= {*names} else {}


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def write_learning_curve(log_history: Iterable[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Write `log_history` as a CSV file with one row a step; a metric that a step did not log is left empty.

    Args:
        log_history (`Iterable[Mapping[str, Any]]`): As `trainer.state.log_history`.
        path (`str` or `os.PathLike`): The file; it is replaced as a whole or not at all.
    """
    rows = rows_by_step(log_history)
    columns = column_order(rows)

    def write(partial: Path) -> None:
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows([row.get(name, "") for name in columns] for row in rows)

    replace_file(Path(path), write)


def read_learning_curve(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a CSV file by [`write_learning_curve`], without the metrics that a step did not log.

    Raises:
        ValueError: If `path` is not such a file.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if "step" not in (reader.fieldnames or ()):
            raise ValueError(f"{path} is not a learning curve: it has no column `step`.")
        rows = [{name: float(value) for name, value in row.items() if value} for row in reader]
    return [{**row, "step": int(row["step"])} for row in rows]
