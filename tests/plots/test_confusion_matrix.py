"""Pictures: the confusion matrix shows row shares and counts, whatever the labels, and is written whole."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

import pytest

from peft_svf.plots import confusion_matrix_figure, plot_confusion_matrix


COUNTS = [[8, 1, 1], [0, 5, 0]]
TRUE, CHOSEN = ("math", "code"), ("math", "code", "others")


def test_rows_are_shares_of_the_true_label() -> None:
    pytest.importorskip("matplotlib")
    (axes,) = confusion_matrix_figure(COUNTS, TRUE, CHOSEN, "classifier").axes
    assert axes.images[0].get_array().tolist() == [[0.8, 0.1, 0.1], [0.0, 1.0, 0.0]]
    assert [text.get_text() for text in axes.get_xticklabels()] == list(CHOSEN)
    assert [text.get_text() for text in axes.get_yticklabels()] == list(TRUE)
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("chosen", "true", "classifier")
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells[(0, 0)] == "0.80\n(8)" and cells[(2, 0)] == "0.10\n(1)" and cells[(1, 1)] == "1.00\n(5)"
    color = {text.get_position(): text.get_color() for text in axes.texts}
    assert (color[(0, 0)], color[(2, 0)]) == ("white", "black")


def test_a_label_without_prompts_has_no_shares() -> None:
    pytest.importorskip("matplotlib")
    (axes,) = confusion_matrix_figure([[2, 0], [0, 0]], ("a", "b"), ("a", "b")).axes
    assert [text.get_text() for text in axes.texts][2:] == ["–", "–"]


def test_labels_are_no_formulas(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    broken = "$\\broken{$"  # as a formula this cannot be parsed
    with pytest.raises(ValueError):
        _drawn_as_formula(broken, tmp_path)
    plot_confusion_matrix([[1]], (broken,), (broken,), tmp_path / "label.png", broken)


def _drawn_as_formula(text: str, folder: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    figure.suptitle(text)
    figure.savefig(folder / "formula.png")


def test_cells_of_many_labels_have_no_numbers() -> None:
    pytest.importorskip("matplotlib")
    labels = tuple(map(str, range(30)))
    (axes,) = confusion_matrix_figure([[int(i == j) for j in range(30)] for i in range(30)], labels, labels).axes
    assert not axes.texts and len(axes.get_xticklabels()) == 30


def test_file_is_a_picture_and_replaces_the_old_one(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "new" / "confusion.png"
    plot_confusion_matrix(COUNTS, TRUE, CHOSEN, path)
    first = path.read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", first[16:24])
    assert width > height > 100
    plot_confusion_matrix(COUNTS, TRUE, CHOSEN, path, "another")
    assert path.read_bytes() != first
    with pytest.raises(ValueError, match="nonsense"):
        plot_confusion_matrix(COUNTS, TRUE, CHOSEN, tmp_path / "new" / "confusion.nonsense")
    assert [file.name for file in path.parent.iterdir()] == ["confusion.png"]


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([[1, 2]], "2 true and 3 chosen labels"),
        ([[1, 2], [3, 4]], "2 true and 3 chosen labels"),
        ([[1, 2, -1], [0, 0, 0]], "none is negative"),
        ([[0, 0, 0], [0, 0, 0]], "at least one is positive"),
    ],
)
def test_counts_that_do_not_fit_are_refused(counts: list[list[int]], message: str) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=message):
        confusion_matrix_figure(counts, TRUE, CHOSEN)


def test_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install peft-svf\[plots\]"):
        confusion_matrix_figure(COUNTS, TRUE, CHOSEN)
