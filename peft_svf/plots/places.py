"""Where the weights of a model lie: module names sorted into layers and roles, the rows and columns of pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from peft_svf.tuner.names import in_layer


OUTSIDE = "outside"  # the row of modules that are in no layer, as `lm_head`
MOST_LABELS = 24
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_USUAL_ORDER = ("q", "k", "v", "qkv", "query", "key", "value", "c_attn", "o", "out", "gate", "up", "gate_up", "down")


@dataclass(frozen=True)
class Places:
    """
    A grid of layers and roles, with the modules in each of its cells.

    Args:
        layers (`tuple[str, ...]`):
            Rows from the first layer to the last, as "3", or "vision 3" where a model has several stacks of layers;
            the last one is "outside" if there are modules in no layer.
        roles (`tuple[str, ...]`): Columns: module names without their layer, as "up_proj", shortened while unique.
        cells (`Mapping[tuple[int, int], tuple[str, ...]]`):
            Module names by row and column. Several where modules differ in a further number only, as the experts of a
            mixture-of-experts model; none where a layer has no such module.
    """

    layers: tuple[str, ...]
    roles: tuple[str, ...]
    cells: Mapping[tuple[int, int], tuple[str, ...]]


def places_of(names: Iterable[str]) -> Places:
    """Sort the modules `names` of a model into layers and roles."""
    split = {name: _split(name) for name in names}
    stacks = list(dict.fromkeys(stack for stack, index, _ in split.values() if index is not None))
    layers = sorted(
        {(stack, index) for stack, index, _ in split.values()},
        key=lambda layer: (layer[1] is None, stacks.index(layer[0]) if layer[1] is not None else 0, layer[1] or 0),
    )
    roles = sorted({role for *_, role in split.values()}, key=_usual_order)
    row = {layer: i for i, layer in enumerate(layers)}
    column = {role: i for i, role in enumerate(roles)}
    cells: dict[tuple[int, int], tuple[str, ...]] = {}
    for name, (stack, index, role) in split.items():
        cell = row[stack, index], column[role]
        cells[cell] = (*cells.get(cell, ()), name)
    return Places(tuple(_labels(layers, stacks)), tuple(_shortened(roles)), cells)


def numbered_layers(layers: Sequence[str]) -> list[int]:
    """The rows of a picture with room for a label: all, or every second, fifth or tenth layer, and "outside"."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, len(layers)) if len(layers) <= step * MOST_LABELS)
    rows = list(range(0, len(layers), step))
    if layers[-1] == OUTSIDE:
        last = len(layers) - 1
        rows = [row for row in rows if row == last or last - row > step / 2]
        rows = rows if last in rows else [*rows, last]
    return rows


def _split(name: str) -> tuple[str, int | None, str]:
    """Stack of layers, number of the layer in it (`None` outside), and role."""
    stack, layer, role = in_layer(name) or ("", None, name)
    return stack, layer, role if layer is None else _NUMBER.sub("*", role)


def _usual_order(role: str) -> tuple[bool, int, str]:
    """Attention before the MLP, each in the order in which data flow; unknown roles follow by name."""
    kind = role.rpartition(".")[2].removesuffix("_proj")
    known = kind in _USUAL_ORDER
    return not known, _USUAL_ORDER.index(kind) if known else 0, role


def _labels(layers: list[tuple[str, int | None]], stacks: list[str]) -> list[str]:
    parts = {stack: stack.split(".") if stack else [] for stack in stacks}
    short = dict.fromkeys(stacks, "")
    if len(stacks) > 1:
        shortest = min(map(len, parts.values()))
        same = [len({tuple(p[:n]) for p in parts.values()}) == 1 for n in range(1, shortest + 1)].count(True)
        tails = {stack: p[same:] for stack, p in parts.items()}
        short = {stack: f"{(tail or parts[stack] or ['layer'])[0]} " for stack, tail in tails.items()}
        if len(set(short.values())) < len(stacks):
            short = {stack: f"{stack} " for stack in stacks}
    return [OUTSIDE if index is None else f"{short[stack]}{index}" for stack, index in layers]


def _shortened(roles: list[str]) -> list[str]:
    """Each role by as few of its last components as no other role ends in."""
    short = []
    for role in roles:
        parts = role.split(".")
        for n in range(1, len(parts) + 1):
            ending = ".".join(parts[-n:])
            if sum(other == ending or other.endswith(f".{ending}") for other in roles) == 1:
                break
        short.append(ending if ending != "*" else role)
    return short
