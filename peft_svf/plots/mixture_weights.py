"""Mixture weights: how much of each expert a mixture takes, for tasks or for the layers of a model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from numbers import Real
from typing import TYPE_CHECKING, Any, TypeAlias

from peft_svf.plots.canvas import GREY, SMALL, TINY, colors, new_figure, plain, save_figure, set_title, without_frame
from peft_svf.plots.places import OUTSIDE, places_of


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Weights: TypeAlias = Mapping[str, float] | Mapping[str, Mapping[str, float]]

HEIGHT = 3.0  # inches
LEAST_BARS = 3  # for which there is room
MOST_TEXTS = 12  # bars up to which parts hold their number
LEAST_PART = 0.07  # of the highest bar: where a number fits into a part
MOST_LABELS = 24
SHORT = 4  # characters that fit below a narrow bar
LARGEST = 1e30  # of a weight
LONG = 70  # characters of all labels together that still fit beside one another
DARK = 0.5  # luminance below which text on a colour must be white


def plot_mixture_weights(weights: Weights, path: str | os.PathLike[str], title: str | None = None) -> None:
    """Save the picture of [`mixture_weights_figure`].

    Args:
        weights, title:
            As in [`mixture_weights_figure`].
        path (`str` or `os.PathLike`):
            The file; its ending says in which format, e.g. `.png`. It is replaced as a whole or not at all.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there are no weights, or one is no finite number, or the format is unknown.
    """
    save_figure(mixture_weights_figure(weights, title), path)


def mixture_weights_figure(weights: Weights, title: str | None = None) -> Figure:
    """
    Draw mixture weights as stacked bars, as Figure 7 of Transformer² (arXiv 2501.06252) does: a bar is a task, or a
    layer for weights by layer, its parts the experts. Weights are drawn as they are, not scaled to a sum of 1, which
    a thin line marks; negative ones hang below 0.

    Args:
        weights (`Mapping[str, float]` or `Mapping[str, Mapping[str, float]]`):
            Weight by expert, or that by task or group of layers, as
            [`Adaptation.weights`][peft_svf.dispatch.few_shot.Adaptation] has them or `{"gsm8k": found.weights, …}`.
            An expert that a task does not name has weight 0 there.
        title (`str`, *optional*): Text above the picture.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there are no weights, or one is no finite number.
    """
    bars = _checked(weights)
    experts = list(dict.fromkeys(name for bar in bars.values() for name in bar))
    figure = new_figure(HEIGHT)
    axes = figure.subplots()
    _stack(axes, [[bar.get(name, 0.0) for name in experts] for bar in bars.values()], experts)
    axes.axhline(1, color=GREY, linewidth=0.7, linestyle=":")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel("weight α", fontsize=SMALL)
    margin = 0.6 + max(0, LEAST_BARS - len(bars)) / 2  # a single bar would be as wide as the picture
    axes.set_xlim(-margin, len(bars) - 1 + margin)
    without_frame(axes)
    _name_bars(axes, list(bars))
    figure.legend(loc="outside right upper", fontsize=SMALL, frameon=False, reverse=True)
    set_title(figure, title)
    return figure


def _checked(weights: Weights) -> dict[str, dict[str, float]]:
    """Weight by expert, by bar; one bar without a name for a single mixture."""
    if not isinstance(weights, Mapping) or not weights:
        raise ValueError("There are no weights to draw: pass {expert: weight} or {task: {expert: weight}}.")
    nested = {isinstance(value, Mapping) for value in weights.values()}
    if len(nested) > 1:
        raise ValueError("`weights` is {expert: weight} or {task: {expert: weight}}, not both at once.")
    bars: dict[str, Any] = dict(weights) if nested == {True} else {"": weights}
    for bar, parts in bars.items():
        where = f" of {bar!r}" if bar else ""
        if not parts:
            raise ValueError(f"There are no weights{where}.")
        for name, weight in parts.items():
            if not isinstance(weight, Real) or not abs(parts[name]) < LARGEST:  # nor NaN
                raise ValueError(f"The weight of expert {name!r}{where} must be a finite number, got {weight!r:.40}.")
    return {bar: {name: float(weight) for name, weight in parts.items()} for bar, parts in bars.items()}


def _stack(axes: Axes, rows: list[list[float]], experts: list[str]) -> None:
    """Parts of each bar on one another, the positive ones upwards from 0 and the negative ones downwards."""
    ups, downs = [0.0] * len(rows), [0.0] * len(rows)
    highest = max(sum(map(abs, row)) for row in rows) or 1.0
    for column, (name, color) in enumerate(zip(experts, colors(len(experts)), strict=True)):
        parts = [row[column] for row in rows]
        bottoms = [up if part >= 0 else down for part, up, down in zip(parts, ups, downs, strict=True)]
        edge = "white" if len(rows) <= MOST_LABELS else "none"
        axes.bar(range(len(rows)), parts, 0.8, bottoms, color=color, label=plain(name), edgecolor=edge, linewidth=0.6)
        for i, (part, bottom) in enumerate(zip(parts, bottoms, strict=True)):
            if len(rows) <= MOST_TEXTS and abs(part) >= LEAST_PART * highest:
                options: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": TINY, "color": _on(color)}
                axes.text(i, bottom + part / 2, f"{part:.2f}".replace("-", "−"), **options)
        ups = [up + max(part, 0.0) for up, part in zip(ups, parts, strict=True)]
        downs = [down + min(part, 0.0) for down, part in zip(downs, parts, strict=True)]


def _on(color: Any) -> str:
    """White or black, whichever can be read on a colour."""
    from matplotlib.colors import to_rgb

    red, green, blue = to_rgb(color)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < DARK else "black"


def _name_bars(axes: Axes, names: list[str]) -> None:
    """Tasks by their names; layers, of which there are many, by their numbers."""
    labels = _layer_numbers(names)
    are_layers = labels != names
    step = math.ceil(len(labels) / MOST_LABELS)
    shown = range(0, len(labels), step)
    lengths = [len(labels[i]) for i in shown]
    long = sum(lengths) > LONG or (len(lengths) > MOST_TEXTS and max(lengths) > SHORT)
    options: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if long else {}
    axes.set_xticks(list(shown), labels=[plain(labels[i]) for i in shown], **options)
    axes.tick_params(axis="x", length=0)
    if are_layers:
        axes.set_xlabel("layer", fontsize=SMALL)


def _layer_numbers(names: list[str]) -> list[str]:
    """ "model.layers.3" as "3" where the bars are layers, each one once; other names as they are."""
    places = places_of(f"{name}.weight" for name in names)
    label_of = {module: places.layers[row] for (row, _), modules in places.cells.items() for module in modules}
    labels = [label_of[f"{name}.weight"] for name in names]
    labels = [name if label == OUTSIDE else label for name, label in zip(names, labels, strict=True)]
    return labels if len(set(labels)) == len(labels) else names
