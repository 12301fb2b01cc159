"""The confusion matrix of a dispatcher."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft_svf.plots.canvas import new_figure, plain, save_figure


if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL_INCHES, MARGIN_INCHES = 0.85, 1.6
DARK = 0.55  # share from which a cell is so dark that its text must be white
MOST_TEXTS = 25  # labels up to which the cells hold numbers that can be read


def plot_confusion_matrix(
    counts: Sequence[Sequence[int]],
    true_labels: Sequence[str],
    chosen_labels: Sequence[str],
    path: str | os.PathLike[str],
    title: str | None = None,
) -> None:
    """Save the picture of [`confusion_matrix_figure`].

    Args:
        counts, true_labels, chosen_labels, title:
            As in [`confusion_matrix_figure`].
        path (`str` or `os.PathLike`):
            The file; its ending says in which format, e.g. `.png`. It is replaced as a whole or not at all.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the counts do not fit the labels, or the format is unknown.
    """
    save_figure(confusion_matrix_figure(counts, true_labels, chosen_labels, title), path)


def confusion_matrix_figure(
    counts: Sequence[Sequence[int]],
    true_labels: Sequence[str],
    chosen_labels: Sequence[str],
    title: str | None = None,
) -> Figure:
    """
    Draw how often a dispatcher gave prompts of each true label each label, as Figure 6 of Transformer²
    (arXiv 2501.06252) does: a row is a true label, a column a chosen one, and the shares of a row sum to 1.

    Args:
        counts (`Sequence[Sequence[int]]` of shape `(T, C)`): Prompts by true and chosen label, from 0.
        true_labels (`Sequence[str]`): The T names of the rows; one without prompts has no shares.
        chosen_labels (`Sequence[str]`): The C names of the columns.
        title (`str`, *optional*): Text above the picture.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the counts do not fit the labels, or one is negative, or there is nothing counted.
    """
    shares = _row_shares(counts, true_labels, chosen_labels)
    width, height = (MARGIN_INCHES + CELL_INCHES * len(labels) for labels in (chosen_labels, true_labels))
    figure = new_figure(height, width)
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_xticks(range(len(chosen_labels)), labels=[plain(label) for label in chosen_labels], rotation=45)
    axes.set_yticks(range(len(true_labels)), labels=[plain(label) for label in true_labels])
    axes.set_xlabel("chosen")
    axes.set_ylabel("true")
    if max(len(true_labels), len(chosen_labels)) <= MOST_TEXTS:
        _write_cells(axes, counts, shares)
    if title:
        axes.set_title(plain(title), fontsize=10)
    return figure


def _write_cells(axes: Any, counts: Sequence[Sequence[int]], shares: Sequence[Sequence[float]]) -> None:
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            color = "white" if shares[i][j] >= DARK else "black"
            text = f"{shares[i][j]:.2f}\n({count})" if any(row) else "–"
            axes.text(j, i, text, ha="center", va="center", color=color, fontsize=8)


def _row_shares(
    counts: Sequence[Sequence[int]], true_labels: Sequence[str], chosen_labels: Sequence[str]
) -> list[list[float]]:
    if len(counts) != len(true_labels) or any(len(row) != len(chosen_labels) for row in counts):
        raise ValueError(
            f"`counts` has {len(counts)} rows of {sorted({len(row) for row in counts})} columns, but there are "
            f"{len(true_labels)} true and {len(chosen_labels)} chosen labels."
        )
    if any(count < 0 for row in counts for count in row) or not any(map(any, counts)):
        raise ValueError("`counts` are numbers of prompts: none is negative, and at least one is positive.")
    return [[count / (sum(row) or 1) for count in row] for row in counts]
