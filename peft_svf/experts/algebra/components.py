"""Other offsets for the components of each matrix: the largest kept, or shuffled, reversed, drawn anew (controls)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from peft_svf.experts.algebra.common import Facts, check_experts, origin_of
from peft_svf.experts.errors import ExpertError
from peft_svf.experts.expert import Expert


def top_components(
    expert: Expert,
    keep: int | float,
    singular_values: Mapping[str, Tensor] | None = None,
    metadata: Facts = None,
) -> Expert:
    """
    Only the components of every matrix that matter most; the others have offset 0, as in the base model.

    What a component contributes to the change of the weight is σ · offset: ‖W' − W‖²_F = Σ (σᵢ offsetᵢ)². An expert
    does not hold σ. Without `singular_values` a component therefore counts by |offset|, which is blind to the size of
    what it scales.

    Args:
        expert (`Expert`): The expert.
        keep (`int` or `float`):
            A whole number: how many components of every matrix. A float in (0, 1]: the smallest number of components
            of every matrix that hold this share of Σ (σ · offset)², or of Σ offset² without `singular_values`.
        singular_values (`Mapping[str, torch.Tensor]`, *optional*):
            σ by module name, shape (r,) or (experts, r); of a live model, `svf_singular_values` of its SVF layers.
        metadata (`Mapping[str, Any]`, *optional*): See [`mix`].

    Raises:
        ExpertError: `keep` cannot be, or the singular values of a module are missing or too few.
    """
    is_count = isinstance(keep, int) and not isinstance(keep, bool)
    if not ((is_count and keep >= 1) or (isinstance(keep, float) and 0 < keep <= 1)):
        raise ExpertError(f"`keep` is a number of components of at least 1, or a share in (0, 1], not {keep!r}.")

    def chosen(name: str, offset: Tensor) -> Tensor:
        sizes = (offset * _singular_values(singular_values, name, offset)).abs()
        order = sizes.argsort(dim=-1, descending=True, stable=True)
        rank = order.argsort(dim=-1)  # of each component, 0 for the largest
        if is_count:
            return offset * (rank < keep)
        energy = sizes.gather(-1, order).square()
        before = energy.cumsum(-1) - energy  # held by the components ahead of it
        needed = before < keep * energy.sum(-1, keepdim=True) * (1 - 1e-12)
        return offset * needed.gather(-1, rank)

    by = "|offset|" if singular_values is None else "|σ offset|"
    settings = {"keep": keep, "by": by}
    return _changed(
        expert, "top_components", f"offset' = offset where {by} is largest, else 0", settings, chosen, metadata
    )


def shuffle(expert: Expert, seed: int = 0, metadata: Facts = None) -> Expert:
    """
    The control of the paper's transfer experiments (Tables 5 and 9): the offsets of every matrix in random order.

    offset'ᵢ = offset_π(i), with a permutation π of the adapted components of each matrix. How far z moves is as
    before; which singular values it moves is not. π follows from the seed and the name of the module, on every
    machine.
    """

    def permuted(name: str, offset: Tensor) -> Tensor:
        generator = _generator(seed, name)
        rows = [row[torch.randperm(len(row), generator=generator)] for row in offset.reshape(-1, offset.shape[-1])]
        return torch.stack(rows).reshape(offset.shape)

    return _changed(expert, "shuffle", "offset'ᵢ = offset_π(i)", {"seed": seed}, permuted, metadata)


def reverse(expert: Expert, metadata: Facts = None) -> Expert:
    """A control, offset'ᵢ = offset_(k + 1 − i) in each matrix: the smallest singular value gets the largest one's."""
    return _changed(
        expert, "reverse", "offset'ᵢ = offset_(k + 1 − i)", {}, lambda name, offset: offset.flip(-1), metadata
    )


def random_like(expert: Expert, seed: int = 0, metadata: Facts = None) -> Expert:
    """
    A control: offset'ᵢ ~ N(m, s²), with the mean m and standard deviation s of the offsets of the same matrix.

    Like [`shuffle`], the same for a seed on every machine (up to the last bit of a float32).
    """

    def drawn(name: str, offset: Tensor) -> Tensor:
        noise = torch.randn(offset.shape, generator=_generator(seed, name), dtype=torch.float64)
        return offset.mean(-1, keepdim=True) + noise * offset.std(-1, keepdim=True, correction=0)

    return _changed(expert, "random_like", "offset'ᵢ ~ N(mean, std²) of the matrix", {"seed": seed}, drawn, metadata)


def _changed(
    expert: Expert,
    operation: str,
    formula: str,
    settings: dict[str, Any],
    change: Callable[[str, Tensor], Tensor],
    metadata: Facts,
) -> Expert:
    """The expert with `change(name, offset in float64)` in place of every offset."""
    check_experts([expert], f"`{operation}`")
    offsets = {name: change(name, offset.double()).float() for name, offset in expert.offsets.items()}
    origin = origin_of(operation, formula, [expert], settings)
    return expert.with_offsets(offsets, {**(metadata or {}), "origin": origin})


def _singular_values(given: Mapping[str, Tensor] | None, name: str, offset: Tensor) -> Tensor:
    if given is None:
        return torch.ones_like(offset)
    values = given.get(name)
    if values is None or values.shape[:-1] != offset.shape[:-1] or values.shape[-1] < offset.shape[-1]:
        raise ExpertError(f"`singular_values` has none for '{name}', or fewer than its {tuple(offset.shape)} offsets.")
    return values[..., : offset.shape[-1]].to(offset)


def _generator(seed: int, name: str) -> torch.Generator:
    """A generator on the CPU for one module, whatever other modules there are."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
