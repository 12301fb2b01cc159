"""What all pictures share: figures without pyplot on white, their files, and text that is shown as it is."""

from __future__ import annotations

import os
import textwrap
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_svf.experts.files import replace_file


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg", "pdf", "jpg", "jpeg", "webp")  # that need nothing but matplotlib
DPI = 120
WIDTH = 800 / DPI  # inches: the width of a README on the Hub
TITLE_CHARACTERS = 90  # of a line
SMALL, TINY = 8, 7  # points; 7 are 12 pixels high
GREY, ABSENT = "#6b7280", "#d1d5db"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8c6d1f")
"""Distinct for colour-blind readers too (Okabe and Ito 2008; the yellow, which is faint on white, is a brown)."""
STYLES = ("-", "--", ":", "-.")
_TIMELESS: dict[str, dict[str, None]] = {  # a file of the same figure has the same bytes on every day
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """
    An empty figure that belongs to no window and no global state.

    Args:
        height (`float`), width (`float`, *optional*, defaults to 800 pixels): In inches.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: no global state, no display
    except ImportError as error:
        raise ImportError("A picture needs matplotlib: `pip install peft-svf[plots]`.") from error
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """
    Write a figure; its bytes depend on the figure and on matplotlib's version only.

    Args:
        figure (`matplotlib.figure.Figure`): The picture.
        path (`str` or `os.PathLike`):
            The file; its ending says in which format, e.g. `.png`. It is replaced as a whole or not at all.

    Raises:
        ValueError: If the format is unknown.
    """
    kind = Path(path).suffix.removeprefix(".").lower() or "png"

    def write(partial: Path) -> None:
        with _steady_names() if kind == "svg" else nullcontext():
            figure.savefig(partial, format=kind, metadata=_TIMELESS.get(kind))

    replace_file(Path(path), write)


def check_picture(path: str | os.PathLike[str]) -> None:
    """
    Say before any work whether a picture can be written there as such a file.

    Raises:
        ValueError: If matplotlib is not installed, or the name ends in none of `FORMATS`.
    """
    try:
        new_figure(1)
    except ImportError as error:
        raise ValueError(str(error)) from error
    if (Path(path).suffix.removeprefix(".").lower() or "png") not in FORMATS:
        raise ValueError(f"{path}: the name of a picture ends in {', '.join(f'.{kind}' for kind in FORMATS)}.")


def plain(text: str) -> str:
    """Text that is shown as it is: matplotlib would read what stands between dollar signs as a formula."""
    return text.replace("$", r"\$")


def set_title(figure: Figure, title: str | None) -> None:
    """Text above a picture, in as many lines as it needs; none without text."""
    if title:
        figure.suptitle("\n".join(plain(line) for line in textwrap.wrap(title, TITLE_CHARACTERS)), fontsize=10)


def colors(n: int) -> list[Any]:
    """`n` colours that can be told apart; beyond eight, evenly from a scale that grows lighter."""
    if n <= len(COLORS):
        return list(COLORS[:n])
    from matplotlib import colormaps

    return [colormaps["viridis"](i / (n - 1)) for i in range(n)]


def without_frame(axes: Axes) -> None:
    """Only the two axes that carry numbers."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=SMALL)


def _steady_names() -> AbstractContextManager[Any]:
    from matplotlib import rc_context

    return rc_context({"svg.hashsalt": "peft-svf"})
