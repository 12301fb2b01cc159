"""A fingerprint of one weight: a few numbers that tell whether another weight is the same, and how far off it is.

The sketch holds random-sign projections sᵀ W t of the weight. The squared difference of such a projection between two
weights has expectation ‖W₁ − W₂‖²_F (Alon, Matias and Szegedy 1999), so the distance of two sketches estimates the
relative difference of the weights themselves, rounding included, from numbers that fit into a JSON file. It costs two
thin matrix products: no decomposition is needed to check a base model before anything is loaded onto it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch


PROJECTIONS = 4  # part of the file format


def weight_sketch(weight: torch.Tensor) -> list[float]:
    """Sketch a weight as `[out, in, ‖W‖_F, s₁ᵀWt₁, …, s₄ᵀWt₄]` with fixed sign vectors s and t.

    Args:
        weight (`torch.Tensor`): Shape (out, in), floating point.

    Returns:
        `list[float]`: Seven numbers, computed in float64; the same on every device up to summation order (1e-14).

    Raises:
        ValueError: `weight` is on the meta device.
    """
    if weight.is_meta:
        raise ValueError("the weight is on the meta device; load the base model's weights before adding an adapter")
    matrix = weight.detach()
    if matrix.device.type == "mps":  # no float64 there
        matrix = matrix.cpu()
    matrix = matrix.to(torch.float64)
    rows, columns = matrix.shape
    left, right = _signs("out", rows).to(matrix.device), _signs("in", columns).to(matrix.device)
    projections = ((matrix @ right) * left).sum(0)  # (PROJECTIONS,)
    return [float(rows), float(columns), float(torch.linalg.norm(matrix)), *projections.tolist()]


def sketch_of_stack(sketches: Sequence[Sequence[float]]) -> list[float]:
    """The sketch of a stack from those of its matrices: seven numbers, as for one matrix of all their rows.

    The sum of sᵀ W t over the matrices, with a random sign for each, is such a projection of the whole stack.
    """
    rows, columns = sketches[0][:2]
    norm = math.sqrt(sum(sketch[2] ** 2 for sketch in sketches))
    projections = torch.tensor([list(sketch[3:]) for sketch in sketches], dtype=torch.float64)  # (experts, 4)
    signs = _signs("stack", len(sketches))
    return [rows * len(sketches), columns, norm, *(projections * signs).sum(0).tolist()]


def sketch_distance(sketch: Sequence[float], other: Sequence[float]) -> float:
    """Estimate ‖W₁ − W₂‖_F relative to the larger of ‖W₁‖_F and ‖W₂‖_F from the sketches of two weights.

    Returns:
        `float`: 0 for equal weights, about 1e-3 for a bfloat16 rounding, about √2 for unrelated weights of one size;
        infinity if the shapes differ or a sketch is damaged (wrong length, not finite).
    """
    if len(sketch) != len(other) or list(sketch[:2]) != list(other[:2]):
        return math.inf
    if not all(map(math.isfinite, (*sketch, *other))):
        return math.inf
    norms, *projections = (abs(a - b) for a, b in zip(sketch[2:], other[2:], strict=True))
    estimate = max(norms, math.sqrt(sum(difference**2 for difference in projections) / len(projections)))
    scale = max(sketch[2], other[2])
    return estimate / scale if scale > 0 else 0.0


def _signs(axis: str, length: int) -> torch.Tensor:
    # SHAKE-256 rather than a random generator: these bits must be the same in every release of torch, for ever.
    columns = []
    for index in range(PROJECTIONS):
        digest = hashlib.shake_256(f"peft-svf fingerprint {axis} {index}".encode()).digest((length + 7) // 8)
        octets = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        bits = (octets[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        columns.append(bits.flatten()[:length].to(torch.float64) * 2 - 1)
    return torch.stack(columns, dim=1)  # (length, PROJECTIONS)
