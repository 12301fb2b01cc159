"""The spectra of a model: how fast its singular values fall, and how much the largest ones hold, by layer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peft_svf.plots.canvas import (
    GREY,
    SMALL,
    STYLES,
    TINY,
    colors,
    new_figure,
    plain,
    save_figure,
    set_title,
    without_frame,
)
from peft_svf.plots.places import Places, numbered_layers, places_of
from peft_svf.plots.spectra import Spectra, read_spectra


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 200  # of a line
HEIGHT = 5.2  # inches
FLOOR = 1e-6  # of the largest singular value: where the picture ends


def plot_spectra(
    source: Spectra | nn.Module | str | Path,
    path: str | os.PathLike[str],
    title: str | None = None,
    components: int | None = None,
) -> None:
    """Save the picture of [`spectra_figure`].

    Args:
        source, title, components:
            As in [`spectra_figure`].
        path (`str` or `os.PathLike`):
            The file; its ending says in which format, e.g. `.png`. It is replaced as a whole or not at all.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the singular values cannot be had, or the format is unknown.
    """
    save_figure(spectra_figure(source, title, components), path)


def spectra_figure(
    source: Spectra | nn.Module | str | Path, title: str | None = None, components: int | None = None
) -> Figure:
    """
    Draw the spectra of a model's weights, after Figures 10 and 11 of Transformer² (arXiv 2501.06252): for each kind
    of module, averaged over layers, the singular values as a share of the largest one, the share of their sum that the
    first ones hold, and below for each layer the share that the largest `components` hold. The last line says in
    numbers what the paper says of its models: that the largest 256 hold less than half.

    Args:
        source ([`~peft_svf.plots.spectra.Spectra`], `nn.Module`, `str` or `Path`):
            Singular values, or what [`~peft_svf.plots.spectra.read_spectra`] reads them from: a live model, with or
            without adapters, or the folder of a checkpoint.
        title (`str`, *optional*): Text above the picture.
        components (`int`, *optional*):
            How many components count as the largest. Defaults to the paper's 256, of smaller models to a sixteenth of
            the rank, as 256 is of Llama-3-8B's 4,096.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the singular values cannot be had, or `components` is not positive.
    """
    if components is not None and components < 1:
        raise ValueError(f"`components` must be at least 1, got {components}.")
    figure = new_figure(HEIGHT)
    spectra = source if isinstance(source, Spectra) else read_spectra(source)
    count = components or spectra.components()
    places = places_of(spectra.singular_values)
    panels = figure.subplot_mosaic([["values", "sums"], ["layers", "layers"]])
    lines = list(zip(range(len(places.roles)), places.roles, colors(len(places.roles)), strict=True))
    shares = _shares_by_layer(spectra, places, count)
    for column, role, color in lines:
        style = {"color": color, "linestyle": STYLES[column % len(STYLES)], "linewidth": 1.3}
        values, sums = _curves(spectra, places, column)
        panels["values"].semilogy(torch.linspace(0, 100, POINTS), values.clamp_min(FLOOR), **style)
        panels["sums"].plot(torch.linspace(0, 100, POINTS), 100 * sums, label=plain(role), **style)
        panels["layers"].plot(100 * shares[:, column], marker="o", markersize=2.5, **style)
    _name_axes(panels["values"], "singular value / largest one", "rank, in % of all")
    _name_axes(panels["sums"], "share of the sum held, in %", "largest singular values, in % of all")
    _name_axes(panels["layers"], f"held by the largest {count}, in %", "layer")
    panels["sums"].plot([0, 100], [0, 100], color=GREY, linewidth=0.7, linestyle=":")  # if all were alike
    panels["layers"].axhline(50, color=GREY, linewidth=0.7, linestyle=":")
    panels["layers"].set_ylim(0, 100)
    numbered = numbered_layers(places.layers)
    panels["layers"].set_xticks(numbered, labels=[plain(places.layers[i]) for i in numbered])
    figure.legend(loc="outside right upper", fontsize=SMALL, frameon=False)
    figure.supxlabel(spectra.statement(count), fontsize=TINY, color=GREY)
    set_title(figure, title)
    return figure


def _name_axes(axes: Axes, vertical: str, horizontal: str) -> None:
    axes.set_ylabel(vertical, fontsize=SMALL)
    axes.set_xlabel(horizontal, fontsize=SMALL)
    axes.grid(color="#eeeeee", linewidth=0.6)
    without_frame(axes)


def _curves(spectra: Spectra, places: Places, column: int) -> tuple[Tensor, Tensor]:
    """σ / σ₁ and the cumulative share of Σ σ of one kind of module at `POINTS` ranks from 0 to 1, averaged."""
    values, sums = [], []
    for (_, own), names in places.cells.items():
        for name in names if own == column else ():
            for matrix in spectra.singular_values[name].reshape(-1, spectra.singular_values[name].shape[-1]):
                values.append(_resampled(matrix / matrix[0]))
                sums.append(_resampled(torch.cat([matrix.new_zeros(1), matrix.cumsum(0) / matrix.sum()])))
    return torch.stack(values).mean(0), torch.stack(sums).mean(0)


def _resampled(line: Tensor) -> Tensor:
    """Values between those of `line`, at equal steps from its first to its last."""
    place = torch.linspace(0, len(line) - 1, POINTS, dtype=torch.float64)
    left = place.floor().long().clamp_max(max(len(line) - 2, 0))
    right = (left + 1).clamp_max(len(line) - 1)
    return line[left] + (line[right] - line[left]) * (place - left)


def _shares_by_layer(spectra: Spectra, places: Places, components: int) -> Tensor:
    """Share of Σ σ that the largest components hold, shape (L, M); NaN where a layer has no such module."""
    shares = spectra.shares(components)
    by_layer = torch.full((len(places.layers), len(places.roles)), torch.nan, dtype=torch.float64)
    for cell, names in places.cells.items():
        by_layer[cell] = sum(shares[name] for name in names) / len(names)
    return by_layer
