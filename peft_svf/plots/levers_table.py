"""The levers of an expert as text: means, largest changes and the most moved components, without matplotlib."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from peft_svf.experts.expert import Expert
from peft_svf.plots.places import Places, places_of
from peft_svf.text_table import table


MOST_COLUMNS = 8  # kinds of modules beside one another; more follow below
MOST_MOVED = 10


@dataclass(frozen=True)
class MovedComponent:
    """
    One singular value and what an expert does to it.

    Args:
        module (`str`): Name in the base model.
        component (`int`): From 1, the largest singular value, on.
        matrix (`int`, *optional*): Index of the matrix in a fused parameter, from 0.
        offset (`float`): z − 1.
    """

    module: str
    component: int
    matrix: int | None
    offset: float

    def __str__(self) -> str:
        return f"#{self.component}" if self.matrix is None else f"#{self.component} of matrix {self.matrix}"


@dataclass(frozen=True)
class LeverTotals:
    """
    An expert in a few numbers.

    Args:
        matrices (`int`), components (`int`): How many are adapted; a fused parameter is several matrices.
        mean (`float`), rms (`float`): Mean and root mean square of z − 1 over all components.
        largest (`tuple[MovedComponent, ...]`): The ten components furthest from z = 1, the furthest first.
        first_tenth (`float`, *optional*):
            Share of Σ |z − 1| that the first tenth of the components of each matrix, those of its largest singular
            values, take; `None` if nothing has moved.
        even_tenth (`float`): Their share if all components had moved alike (a tenth, rounded up in each matrix).
    """

    matrices: int
    components: int
    mean: float
    rms: float
    largest: tuple[MovedComponent, ...]
    first_tenth: float | None
    even_tenth: float


def lever_totals(expert: Expert, most: int = MOST_MOVED) -> LeverTotals:
    """
    Sum up an expert.

    Args:
        expert ([`~peft_svf.experts.Expert`]): The expert.
        most (`int`, *optional*, defaults to 10): How many of the most moved components to name.

    Raises:
        ValueError: If the expert has no offsets.
    """
    if not expert.offsets:
        raise ValueError(f"{expert.source} has no offsets.")
    offsets = {name: offset.to(torch.float64) for name, offset in expert.offsets.items()}
    count = sum(offset.numel() for offset in offsets.values())
    firsts = [offset[..., : math.ceil(offset.shape[-1] / 10)] for offset in offsets.values()]
    moved = sum(float(offset.abs().sum()) for offset in offsets.values())
    return LeverTotals(
        matrices=sum(offset.numel() // offset.shape[-1] for offset in offsets.values()),
        components=count,
        mean=sum(float(offset.sum()) for offset in offsets.values()) / count,
        rms=math.sqrt(sum(float(offset.square().sum()) for offset in offsets.values()) / count),
        largest=tuple(_most_moved(offsets, most)),
        first_tenth=sum(float(first.abs().sum()) for first in firsts) / moved if moved else None,
        even_tenth=sum(first.numel() for first in firsts) / count,
    )


def levers_table(expert: Expert) -> str:
    """
    Describe the levers that an expert pulls in plain text: totals; the mean of z − 1 and the component furthest from
    z = 1 by layer and kind of module; and the ten most moved components.

    Components are numbered from 1, the largest singular value. It needs no matplotlib.

    Args:
        expert ([`~peft_svf.experts.Expert`]): The expert.

    Raises:
        ValueError: If the expert has no offsets.
    """
    totals = lever_totals(expert)
    number, precise = (_format_of(totals.largest[0].offset, digits) for digits in (3, 4))

    def mean(names: tuple[str, ...]) -> str:
        values = torch.cat([expert.offsets[name].flatten() for name in names])
        return precise(float(values.to(torch.float64).mean()))

    def furthest(names: tuple[str, ...]) -> str:
        (found,) = _most_moved({name: expert.offsets[name] for name in names}, 1)
        matrix = "" if found.matrix is None else f"/{found.matrix}"
        return f"{number(found.offset)} #{found.component}{matrix}"

    note = ", #component/matrix" if any(offset.dim() > 1 for offset in expert.offsets.values()) else ", #component"
    sections = [
        _totals_text(totals, precise),
        f"Mean of z − 1\n{grid_text(expert.offsets, mean)}",
        f"Furthest from z = 1: z − 1{note} (#1 is the largest singular value)\n{grid_text(expert.offsets, furthest)}",
        f"Most moved components\n{_moved_text(totals.largest, number)}",
    ]
    return "\n\n".join(sections)


def grid_text(names: Iterable[str], cell: Callable[[tuple[str, ...]], str]) -> str:
    """
    A table with a row for each layer and a column for each kind of module.

    Args:
        names (`Iterable[str]`): Module names.
        cell (`Callable[[tuple[str, ...]], str]`): The text for the modules of one kind in one layer.
    """
    return _grid(places_of(names), cell)


def _most_moved(offsets: Mapping[str, Tensor], most: int) -> list[MovedComponent]:
    found = []
    for name, offset in offsets.items():
        places = offset.abs().flatten().argsort(descending=True, stable=True)[:most]
        for place in places.tolist():
            matrix, component = divmod(place, offset.shape[-1])
            number = float(offset.flatten()[place])
            found.append(MovedComponent(name, component + 1, matrix if offset.dim() > 1 else None, number))
    found.sort(key=lambda one: (-abs(one.offset), one.module, one.matrix or 0, one.component))
    return [one for one in found[:most] if one.offset] or found[:1]


def signed(value: float, decimals: int) -> str:
    """A number with its sign, as wide for 0 as for others; with a true minus."""
    text = f"{value:+.{decimals}f}"
    return text.replace("-", "−") if float(text) else f" {abs(float(text)):.{decimals}f}"


def _format_of(largest: float, digits: int = 3) -> Callable[[float], str]:
    """With a sign, and as many decimals as show the largest number with so many digits, at least as many decimals."""
    decimals = digits if not largest else min(max(digits, digits - 1 - math.floor(math.log10(abs(largest)))), 12)

    return partial(signed, decimals=decimals)


def _totals_text(totals: LeverTotals, number: Callable[[float], str]) -> str:
    matrices = "1 matrix" if totals.matrices == 1 else f"{totals.matrices:,} matrices"
    lines = [
        f"{totals.components:,} scales z of singular values, in {matrices}; z = 1 is the base model",
        f"mean of z − 1 {number(totals.mean).strip()}, root mean square {number(totals.rms).strip(' +')}, "
        f"furthest {number(totals.largest[0].offset).strip()}",
    ]
    if totals.first_tenth is None:
        lines.append("nothing has moved: this expert is the base model")
    else:
        lines.append(
            f"{100 * totals.first_tenth:.1f} % of all |z − 1| is in the first tenth of the components "
            f"({100 * totals.even_tenth:.1f} % if all moved alike)"
        )
    return "\n".join(lines)


def _grid(places: Places, cell: Callable[[tuple[str, ...]], str]) -> str:
    """A row for each layer, a column for each kind of module, in blocks that fit beside one another."""
    blocks = []
    for first in range(0, len(places.roles), MOST_COLUMNS):
        columns = range(first, min(first + MOST_COLUMNS, len(places.roles)))
        rows = [["layer", *(places.roles[column] for column in columns)]]
        for row, layer in enumerate(places.layers):
            cells = [cell(places.cells[row, column]) if (row, column) in places.cells else "" for column in columns]
            if any(cells):
                rows.append([layer, *cells])
        blocks.append(table(rows, right=range(len(columns) + 1)))
    return "\n\n".join(blocks)


def _moved_text(moved: tuple[MovedComponent, ...], number: Callable[[float], str]) -> str:
    def rows() -> Iterator[tuple[str, str, str]]:
        yield "module", "component", "z − 1"
        for one in moved:
            yield one.module, str(one), number(one.offset)

    return table(list(rows()), right=(2,))
