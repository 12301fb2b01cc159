"""The levers of an expert: which singular values it turns up and down, by layer, module and size, as a heat map."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from peft_svf.experts.expert import Expert
from peft_svf.plots.canvas import ABSENT, GREY, SMALL, TINY, new_figure, plain, save_figure, set_title
from peft_svf.plots.places import numbered_layers, places_of


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GROUPS = 8
ROW_INCHES, LEAST_INCHES, MOST_INCHES = 0.14, 1.1, 4.0  # height of a panel
BAR_INCHES = 0.12
TWISTED = 60  # characters of all roles together that still fit beside one another
PANELS = {"mean": "mean of z − 1", "rms": "size of z − 1 (root mean square)"}


@dataclass(frozen=True)
class Levers:
    """
    What an expert does to groups of singular values.

    Args:
        layers (`tuple[str, ...]`): The L rows, see [`~peft_svf.plots.places.Places`].
        roles (`tuple[str, ...]`): The M kinds of modules.
        mean (`torch.Tensor` of shape `(L, M, G)`, float64):
            Mean of z − 1 over the components of a group: above 0 the expert strengthens them, below it weakens them.
            The first group holds the largest singular values. NaN where a layer has no such module.
        rms (`torch.Tensor` of shape `(L, M, G)`, float64): Root mean square of z − 1.
        size (`torch.Tensor` of shape `(L, M, G)`, float64): Mean of |z − 1|.
    """

    layers: tuple[str, ...]
    roles: tuple[str, ...]
    mean: Tensor
    rms: Tensor
    size: Tensor


def levers(expert: Expert, groups: int = GROUPS) -> Levers:
    """
    Cut the trained components of each matrix into `groups` groups of equal length, in the order of the singular
    values, and sum up what the expert does to each.

    A matrix with fewer components than groups has the nearest component in every group. Matrices that share a cell
    (of fused parameters, or numbered experts of a mixture-of-experts model) are taken together.

    Args:
        expert ([`~peft_svf.experts.Expert`]): The expert.
        groups (`int`, *optional*, defaults to 8): G.

    Raises:
        ValueError: If `groups` is not positive, or the expert has no offsets.
    """
    if groups < 1:
        raise ValueError(f"`groups` must be at least 1, got {groups}.")
    if not expert.offsets:
        raise ValueError(f"{expert.source} has no offsets: there is nothing to draw.")
    places = places_of(expert.offsets)
    sums = torch.zeros(4, len(places.layers), len(places.roles), groups, dtype=torch.float64)
    for (row, column), names in places.cells.items():
        for name in names:
            sums[:, row, column] += _sums(expert.offsets[name], groups)
    count, total, squares, sizes = sums
    return Levers(places.layers, places.roles, total / count, (squares / count).sqrt(), sizes / count)


def _sums(offset: Tensor, groups: int) -> Tensor:
    """Number, sum, sum of squares and sum of sizes of the offsets in each group, shape (4, groups)."""
    values = offset.reshape(-1, offset.shape[-1]).to(torch.float64)  # (matrices, k)
    rank = values.shape[-1]
    powers = torch.stack([torch.ones_like(values), values, values.square(), values.abs()]).sum(1)  # (4, k)
    before = torch.cat([powers.new_zeros(4, 1), powers.cumsum(1)], 1)
    first = torch.arange(groups) * rank // groups
    behind = torch.maximum(first + 1, torch.arange(1, groups + 1) * rank // groups)
    return before[:, behind] - before[:, first]


def plot_levers(
    expert: Expert,
    path: str | os.PathLike[str],
    title: str | None = None,
    statistic: Literal["both", "mean", "rms"] = "both",
) -> None:
    """Save the picture of [`levers_figure`].

    Args:
        expert, title, statistic:
            As in [`levers_figure`].
        path (`str` or `os.PathLike`):
            The file; its ending says in which format, e.g. `.png`. It is replaced as a whole or not at all.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the expert has no offsets, or the format is unknown.
    """
    save_figure(levers_figure(expert, title, statistic), path)


def levers_figure(
    expert: Expert, title: str | None = None, statistic: Literal["both", "mean", "rms"] = "both"
) -> Figure:
    """
    Draw the levers that an expert pulls: a row is a layer, a column a kind of module, cut into eight groups of
    components from the largest singular values (left) to the smallest. Above, the mean of z − 1, red where the expert
    strengthens and blue where it weakens (white is the base model, z = 1); below, how far z is from 1, whichever way:
    a group whose components move in both directions is pale above and dark below. Hatched is what the expert does
    not adapt. The picture is this package's own; it shows the z of Transformer² (arXiv 2501.06252, section 3.1).

    Args:
        expert ([`~peft_svf.experts.Expert`]): The expert; offsets of shape (k,), or (E, k) for fused parameters.
        title (`str`, *optional*): Text above the picture.
        statistic (`"both"`, `"mean"` or `"rms"`, *optional*, defaults to `"both"`): Which halves to draw.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the expert has no offsets, or there is no such statistic.
    """
    if statistic not in ("both", *PANELS):
        raise ValueError(f"`statistic` must be 'both', 'mean' or 'rms', got {statistic!r}.")
    shown = list(PANELS) if statistic == "both" else [statistic]
    found = levers(expert)
    height = min(MOST_INCHES, max(LEAST_INCHES, ROW_INCHES * len(found.layers)))
    twisted = sum(map(len, found.roles)) > TWISTED
    figure = new_figure(len(shown) * (height + 0.45) + 0.8 + 0.5 * twisted)
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, shown, strict=True):
        image = _draw(axes, getattr(found, name), signed=name == "mean")
        bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=height / BAR_INCHES, fraction=0.05)
        bar.ax.tick_params(labelsize=TINY)
        bar.outline.set_visible(False)
        axes.set_title(PANELS[name], fontsize=SMALL, loc="left", color=GREY)
        rows = numbered_layers(found.layers)
        axes.set_yticks(rows, labels=[plain(found.layers[row]) for row in rows])
        axes.set_ylabel("layer", fontsize=SMALL)
    _name_roles(panels[-1], found.roles, twisted)
    panels[-1].set_xlabel("in each module: the largest singular values left, the smallest right", fontsize=SMALL)
    set_title(figure, title)
    return figure


def _draw(axes: Axes, values: Tensor, signed: bool) -> Any:
    """One heat map of values `(L, M, G)`, on a scale symmetric about 0 if they are `signed`."""
    from matplotlib import colormaps

    cells = values.flatten(1).numpy()  # (L, M · G)
    largest = float(values.abs().nan_to_num().max()) or 1e-12  # an expert that does nothing is white
    colors = colormaps["RdBu_r" if signed else "Purples"].with_extremes(bad=(0, 0, 0, 0))
    image = axes.imshow(
        cells, cmap=colors, vmin=-largest if signed else 0, vmax=largest, aspect="auto", interpolation="nearest"
    )
    axes.patch.set(facecolor="white", edgecolor=ABSENT, hatch="////", linewidth=0)  # seen where there is no number
    groups = values.shape[-1]
    for column in range(1, values.shape[1]):
        axes.axvline(column * groups - 0.5, color="black", linewidth=0.6)
    axes.tick_params(length=0, labelsize=TINY)
    return image


def _name_roles(axes: Axes, roles: tuple[str, ...], twisted: bool) -> None:
    centres = [column * GROUPS + (GROUPS - 1) / 2 for column in range(len(roles))]
    options: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if twisted else {}
    axes.set_xticks(centres, labels=[plain(role) for role in roles], fontsize=TINY if twisted else SMALL, **options)
