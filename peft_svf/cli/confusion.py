"""Which labels a dispatcher gave to prompts whose label is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft_svf.cli.terminal import table, visible, with_interval
from peft_svf.trainers.statistics import wilson_interval


MOST_COLUMNS = 12  # labels up to which a terminal has room for the whole matrix
MOST_ROWS = 20


@dataclass(frozen=True)
class ConfusionMatrix:
    """
    Counts of true and chosen labels.

    Args:
        labels (`tuple[str, ...]`): All labels that can be chosen, `"others"` last.
        true (`tuple[str, ...]`): The true label of each prompt.
        chosen (`tuple[str, ...]`): The label that each prompt got.
    """

    labels: tuple[str, ...]
    true: tuple[str, ...]
    chosen: tuple[str, ...]

    @property
    def rows(self) -> tuple[str, ...]:
        """The labels that prompts have, in the order of `labels`."""
        return tuple(label for label in self.labels if label in self.true)

    @property
    def counts(self) -> list[list[int]]:
        """Prompts by true label (`rows`) and chosen label (`labels`)."""
        pairs = Counter(zip(self.true, self.chosen, strict=True))
        return [[pairs[row, column] for column in self.labels] for row in self.rows]

    @property
    def right(self) -> int:
        """Prompts that got their own label."""
        return sum(true == chosen for true, chosen in zip(self.true, self.chosen, strict=True))

    @property
    def accuracy(self) -> float:
        """Share of prompts that got their own label."""
        return self.right / len(self.true)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the accuracy."""
        return wilson_interval(self.right, len(self.true))

    def summary(self) -> str:
        """`"96.3 % [91.7, 98.4] of 160"`."""
        return _format(self.right, len(self.true))

    def text(self) -> str:
        """A table: a row for each true label, how many got which label, and the share that got their own."""
        if len(self.labels) > MOST_COLUMNS:
            return self._most_frequent_confusions()
        lines = [["true \\ chosen", *map(visible, self.labels), "right [95 % interval]"]]
        for label, row in zip(self.rows, self.counts, strict=True):
            right = row[self.labels.index(label)]
            lines.append([visible(label), *map(str, row), _format(right, sum(row))])
        return table(lines, right=range(1, len(self.labels) + 1))

    def _most_frequent_confusions(self) -> str:
        """For more labels than a terminal has room for."""
        wrong = Counter(pair for pair in zip(self.true, self.chosen, strict=True) if pair[0] != pair[1])
        if not wrong:
            return "No prompt got another label than its own"
        rows = [("true", "chosen", "prompts")]
        rows += [(visible(true), visible(chosen), str(n)) for (true, chosen), n in wrong.most_common(MOST_ROWS)]
        return table(rows, right=(2,))

    def as_json(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "confusion": {"true": list(self.rows), "chosen": list(self.labels), "counts": self.counts},
        }


def _format(right: int, n: int) -> str:
    return f"{with_interval(right / n, *wilson_interval(right, n))} of {n}"


def check_labels(labels: Sequence[str | None], known: Sequence[str], names: Sequence[str], source: str) -> list[str]:
    """
    The labels of the rows of a file, each one of `known`; the name of an expert counts as its label.

    Args:
        labels (`Sequence[str | None]`): What the file says, `None` where it says nothing.
        known (`Sequence[str]`): The labels that the dispatcher can choose.
        names (`Sequence[str]`): The names of the experts, or the base label, in the same order.
        source (`str`): The file, for errors.

    Raises:
        ValueError: If a row has no label, or an unknown one; names it.
    """
    by_name = dict(zip(names, known, strict=True))
    found = []
    for i, label in enumerate(labels, 1):
        if label is None:
            raise ValueError(f"row {i} of {source} has no `label`, but others have: label all prompts, or none")
        if label not in known and label not in by_name:
            raise ValueError(f"row {i} of {source} has the label {label!r}, but the bank knows {', '.join(known)}")
        found.append(label if label in known else by_name[label])
    return found
