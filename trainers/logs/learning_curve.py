"""The learning curve as a table: one row for each step of `log_history`, as a CSV file."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft_svf.experts.files import replace_file
from peft_svf.plots.learning_curve_rows import Row, interval_columns, read_learning_curve, rows_by_step


__all__ = ["Row", "column_order", "interval_columns", "read_learning_curve", "rows_by_step", "write_learning_curve"]

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


def column_order(rows: Iterable[Row]) -> list[str]:
    """All columns of `rows`: the usual ones first, an interval behind its metric, the others by name."""
    names = {name for row in rows for name in row}
    first = []
    for name in FIRST_COLUMNS:
        first += [name] * (name in names) + list(interval_columns(name, names).values())
    return first + sorted(names - {*first}, key=_natural)


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
