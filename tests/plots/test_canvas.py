"""What all pictures share: they are optional, checked early, and written whole."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

import peft_svf
import peft_svf.plots
from peft_svf.plots import check_picture
from peft_svf.plots.canvas import colors, new_figure, save_figure, set_title
from peft_svf.trainers.logs import learning_curve_plot


def test_the_package_and_its_tables_do_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_svf, "plots", peft_svf.plots)  # puts the old one back afterwards
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("peft_svf.plots")]:
        monkeypatch.delitem(sys.modules, name)
    again = importlib.import_module("peft_svf.plots")
    assert again is not sys.modules.get("matplotlib") and callable(again.levers_table)


def test_trainings_know_the_learning_curve_by_its_old_names() -> None:
    assert learning_curve_plot.plot_learning_curve is peft_svf.plots.plot_learning_curve
    assert learning_curve_plot.learning_curve_figure is peft_svf.plots.learning_curve_figure


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.svg", "a.pdf", "a"])
def test_names_of_pictures(name: str) -> None:
    pytest.importorskip("matplotlib")
    check_picture(name)


def test_what_is_no_name_of_a_picture_is_said_early(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=r"a\.txt: the name of a picture ends in \.png, \.svg"):
        check_picture("a.txt")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install peft-svf\[plots\]"):
        check_picture("a.png")


def test_a_picture_that_fails_leaves_the_one_before(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "picture.png"
    path.write_bytes(b"before")
    figure = new_figure(1)
    figure.text(0, 0, r"$\broken{$")
    with pytest.raises(ValueError):
        save_figure(figure, path)
    assert path.read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


def test_a_long_title_has_several_lines_and_is_no_formula() -> None:
    pytest.importorskip("matplotlib")
    figure = new_figure(1)
    set_title(figure, "an expert of $ and of money " * 8)
    lines = figure.get_suptitle().splitlines()
    assert len(lines) == 3 and max(map(len, lines)) < 100 and r"\$" in lines[0]


def test_colours_of_any_number_are_all_different() -> None:
    pytest.importorskip("matplotlib")
    for n in (1, 8, 9, 40):
        assert len(set(colors(n))) == n
