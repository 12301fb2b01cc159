"""How alike experts are: cosine, overlap of the components that they move most, spread."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peft_svf.experts.algebra.common import check_experts, modules, stacked_offsets
from peft_svf.experts.errors import ExpertError
from peft_svf.experts.expert import Expert


def spread(experts: Sequence[Expert]) -> dict[str, Tensor]:
    """
    How far experts are apart, component by component: the standard deviation of their offsets, with K − 1.

    Returns:
        `dict[str, torch.Tensor]`: By module name, shape (k,) or (experts, k), float32; of one expert alone, zeros.
    """
    check_experts(experts, "the spread")
    correction = min(len(experts) - 1, 1)
    return {name: stacked_offsets(experts, name).std(0, correction=correction).float() for name in modules(experts)}


def cosine_similarity(experts: Sequence[Expert]) -> Tensor:
    """
    ⟨offset_a, offset_b⟩ / (‖offset_a‖ ‖offset_b‖) over all modules, for every pair of experts.

    Returns:
        `torch.Tensor`: Shape (K, K), float64, symmetric, 1 on the diagonal. An expert that changes nothing has no
        direction; it gets 0 with the others. Unrelated experts have about 0, give or take 1/√(number of offsets).
    """
    check_experts(experts, "a comparison")
    products = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for name in modules(experts):
        offsets = stacked_offsets(experts, name).flatten(1)  # (K, ...)
        products += offsets @ offsets.T
    norms = products.diagonal().sqrt()
    cosine = products / (norms[:, None] * norms).clamp_min(torch.finfo(torch.float64).tiny)
    return cosine.clamp(-1, 1).fill_diagonal_(1.0)


def overlap(experts: Sequence[Expert], share: float = 0.1) -> Tensor:
    """
    How many of the components that two experts move most they have in common.

    Of every matrix with k components, Tₐ holds the ⌈share · k⌉ largest |offset| of an expert, those equal to 0 left
    out. The overlap is Σ |Tₐ ∩ T_b| / √(Σ |Tₐ| · Σ |T_b|), with sums over the matrices.

    Args:
        experts (`Sequence[Expert]`): K experts of one base model.
        share (`float`, *optional*, defaults to 0.1): In (0, 1].

    Returns:
        `torch.Tensor`: Shape (K, K), float64, symmetric, 1 on the diagonal. Unrelated experts reach
        [`chance_overlap`], about `share`.
    """
    counts = _top_counts(experts, share)
    common = torch.zeros(len(experts), len(experts), dtype=torch.float64)
    for name, count in counts.items():
        sizes = stacked_offsets(experts, name).abs()  # (K, ..., k)
        rank = sizes.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        top = ((rank < count) & (sizes > 0)).flatten(1).double()
        common += top @ top.T
    totals = common.diagonal()
    return (common / (totals[:, None] * totals).sqrt().clamp_min(1)).fill_diagonal_(1.0)


def chance_overlap(experts: Sequence[Expert], share: float = 0.1) -> float:
    """What [`overlap`] gives on average for unrelated experts: Σ m²/k / Σ m, where m = ⌈share · k⌉ of k components."""
    counts = _top_counts(experts, share)
    matrices = [(m, stacked_offsets(experts, name)[0]) for name, m in counts.items()]
    rows = [offsets.numel() // offsets.shape[-1] for _, offsets in matrices]
    expected = sum(n * m**2 / o.shape[-1] for n, (m, o) in zip(rows, matrices, strict=True))
    return expected / sum(n * m for n, (m, _) in zip(rows, matrices, strict=True))


def _top_counts(experts: Sequence[Expert], share: float) -> dict[str, int]:
    """How many components of each matrix count as the most moved."""
    check_experts(experts, "a comparison")
    if not 0 < share <= 1:
        raise ExpertError(f"`share` is in (0, 1], not {share!r}.")
    lengths = {name: stacked_offsets(experts, name).shape[-1] for name in modules(experts)}
    return {name: math.ceil(share * length - 1e-9) for name, length in lengths.items()}
