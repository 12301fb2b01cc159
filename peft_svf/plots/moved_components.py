"""Which components experts move: how far z is from 1 over the rank of the singular value, for each kind of module."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from peft_svf.experts.expert import Expert
from peft_svf.plots.canvas import SMALL, STYLES, colors, new_figure, plain, save_figure, set_title, without_frame
from peft_svf.plots.levers import levers


if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

STEPS = 32  # points of a line
COLUMNS = 4
ROW_INCHES, MARGIN_INCHES = 1.5, 0.9


def moved_components(expert: Expert, steps: int = STEPS) -> dict[str, Tensor]:
    """
    How far an expert moves the components of each kind of module, over all layers.

    Args:
        expert ([`~peft_svf.experts.Expert`]): The expert.
        steps (`int`, *optional*, defaults to 32): Into how many parts of equal length to cut the trained components.

    Returns:
        `dict[str, torch.Tensor]`: By kind of module, mean of |z − 1| in each part, from the largest singular values
        to the smallest; shape `(steps,)`, float64.

    Raises:
        ValueError: If the expert has no offsets, or `steps` is not positive.
    """
    found = levers(expert, steps)
    by_role = found.size.nanmean(0)  # (M, steps)
    return dict(zip(found.roles, by_role, strict=True))


def plot_moved_components(
    experts: Expert | Sequence[Expert] | Mapping[str, Expert],
    path: str | os.PathLike[str],
    title: str | None = None,
) -> None:
    """Save the picture of [`moved_components_figure`].

    Args:
        experts, title:
            As in [`moved_components_figure`].
        path (`str` or `os.PathLike`):
            The file; its ending says in which format, e.g. `.png`. It is replaced as a whole or not at all.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no expert, one has no offsets, or the format is unknown.
    """
    save_figure(moved_components_figure(experts, title), path)


def moved_components_figure(
    experts: Expert | Sequence[Expert] | Mapping[str, Expert], title: str | None = None
) -> Figure:
    """
    Draw which components experts move: for each kind of module the mean of |z − 1| over all layers (vertical) by the
    rank of the component among the trained ones (horizontal, 0 % is the largest singular value, 100 % the smallest).

    A flat line is an expert that moves all components alike. The picture is this package's own; what it shows is the
    z of Transformer² (arXiv 2501.06252, section 3.1).

    Args:
        experts ([`~peft_svf.experts.Expert`], a sequence of them, or a mapping from names):
            One or several, which need not share a base model; without names, `metadata["name"]` or the source.
        title (`str`, *optional*): Text above the picture.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no expert, or one has no offsets.
    """
    moved = {name: moved_components(expert) for name, expert in _named(experts).items()}
    roles = list(dict.fromkeys(role for found in moved.values() for role in found))
    columns = min(COLUMNS, len(roles))
    rows = math.ceil(len(roles) / columns)
    figure = new_figure(rows * ROW_INCHES + MARGIN_INCHES)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    middles = [100 * (step + 0.5) / STEPS for step in range(STEPS)]
    for axes, role in zip(panels, roles, strict=False):
        for i, (color, found) in enumerate(zip(colors(len(moved)), moved.values(), strict=True)):
            if role in found:
                axes.plot(middles, found[role].numpy(), color=color, linewidth=1.3, linestyle=STYLES[i % len(STYLES)])
        axes.set_title(plain(role), fontsize=SMALL)
        axes.set_xlim(0, 100)
        axes.set_xticks([0, 50, 100])
        without_frame(axes)
    panels[0].set_ylim(0, 1.05 * max(float(line.max()) for found in moved.values() for line in found.values()) or 1)
    for i, axes in enumerate(panels):
        axes.set_visible(i < len(roles))
        axes.tick_params(labelbottom=i + columns >= len(roles))  # those with nothing below them
    figure.supxlabel("rank of the singular value among those trained, in %: the largest left", fontsize=SMALL)
    figure.supylabel("mean of |z − 1|", fontsize=SMALL)
    if len(moved) > 1:
        names = [plain(name) for name in moved]
        figure.legend(_samples(len(moved)), names, loc="outside right upper", fontsize=SMALL, frameon=False)
    set_title(figure, title)
    return figure


def _named(experts: Expert | Sequence[Expert] | Mapping[str, Expert]) -> dict[str, Expert]:
    if isinstance(experts, Mapping):
        named = dict(experts)
    else:
        several = [experts] if isinstance(experts, Expert) else list(experts)
        names = [str(expert.metadata.get("name") or expert.source) for expert in several]
        twice = len(set(names)) < len(names)
        named = {
            f"{i + 1}: {name}" if twice else name: e for i, (name, e) in enumerate(zip(names, several, strict=True))
        }
    if not named:
        raise ValueError("There is no expert to draw.")
    return named


def _samples(n: int) -> list[Line2D]:
    """Lines for the legend."""
    from matplotlib.lines import Line2D

    styles: list[Any] = [STYLES[i % len(STYLES)] for i in range(n)]
    return [Line2D([], [], color=color, linestyle=style) for color, style in zip(colors(n), styles, strict=True)]
