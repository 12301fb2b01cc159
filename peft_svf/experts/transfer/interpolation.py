"""Sequences of one length on the places of another: by relative position, linearly, endpoints on endpoints."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def neighbours(index: int, length: int, other: int) -> dict[int, float]:
    """
    The places in a sequence of `other` items between which the item `index` of `length` lies, with their weights.

    Item i of n lies at the relative position i / (n − 1), and at 0 if it is the only one. The weights sum to 1. With
    `length == other` the answer is the item itself, so are first and last always.

    Args:
        index (`int`): From 0 to `length` − 1.
        length, other (`int`): At least 1.
    """
    if length == 1 or other <= 1:
        return {0: 1.0}
    below, rest = divmod(index * (other - 1), length - 1)  # in whole numbers: no endpoint is missed by rounding
    if rest == 0:
        return {below: 1.0}
    share = rest / (length - 1)
    return {below: 1 - share, below + 1: share}


def resample(values: torch.Tensor, rank: int, new_rank: int) -> torch.Tensor:
    """
    Values of the leading components of a weight on the components of another weight, by relative rank.

    Component i of r lies at i / (r − 1) of the order of singular values. Between two components the value is linear;
    equal ranks give the same values back, bit for bit.

    Args:
        values (`torch.Tensor`): Shape (k,), of the k leading of `rank` components.
        rank (`int`): Singular values of the weight that they are of, at least k.
        new_rank (`int`): Singular values of the other weight.

    Returns:
        `torch.Tensor`: float64, shape (new_rank,) if k is `rank`. Otherwise the components beyond the relative rank
        that `values` reach are left out, as those are that the values are not about.
    """
    exact = values.to(torch.float64)
    if rank == new_rank:
        return exact.clone()
    if rank == 1:
        return exact.expand(new_rank).clone()
    if new_rank == 1:
        return exact[:1].clone()
    reached = (len(values) - 1) * (new_rank - 1) // (rank - 1) + 1
    numerators = torch.arange(reached) * (rank - 1)
    below = numerators // (new_rank - 1)
    share = (numerators % (new_rank - 1)).to(torch.float64) / (new_rank - 1)
    above = (below + 1).clamp(max=len(values) - 1)  # where it is clamped its share is 0
    return exact[below] * (1 - share) + exact[above] * share


def combined(parts: Mapping[str, torch.Tensor], weights: Mapping[str, float]) -> torch.Tensor:
    """The weighted sum of vectors, shape (longest,); what a vector is too short for counts as 0 there."""
    total = torch.zeros(max(map(len, parts.values())), dtype=torch.float64)
    for name, part in parts.items():
        total[: len(part)] += weights[name] * part
    return total


def spectra_distance(source: torch.Tensor, target: torch.Tensor) -> float:
    """
    How differently two weights spread over their components: ‖s − t‖₂ / ‖t‖₂.

    t are the singular values of the target divided by their sum; s are those of the source, put on the target's
    components by relative rank, then divided by their sum. 0 for spectra of one shape, whatever their scale; NaN
    for a weight of zeros.

    Args:
        source, target (`torch.Tensor`): All singular values of a weight, descending, shapes (r,) and (r',).
    """
    own = target.to(torch.float64)
    own = own / own.sum()
    other = resample(source, len(source), len(target))
    other = other / other.sum()
    return float((other - own).norm() / own.norm())
