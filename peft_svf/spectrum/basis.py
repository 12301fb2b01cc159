"""The one-sided singular basis of a weight, which is all that singular value fine-tuning needs.

The paper (Transformer², arXiv 2501.06252, section 3.1) writes W = U Σ Vᵀ and W' = U Σ diag(z) Vᵀ. Because U Σ = W V,

    input side  (in ≤ out):  W' = W (I + V diag(z − 1) Vᵀ)
    output side (out < in):  W' = (I + U diag(z − 1) Uᵀ) W

so one orthonormal (r, r) matrix, r = min(out, in), takes the place of U, Σ and V.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch


Side = Literal["input", "output"]


@dataclass(frozen=True)
class SingularBasis:
    """The orthonormal basis Q in which one weight is scaled.

    Attributes:
        side (`"input"` or `"output"`):
            Where Q acts: on the inputs of the weight (right singular vectors) or on its outputs (left ones).
        vectors (`torch.Tensor`):
            Q, shape (r, r), one singular vector per column, in descending order of the singular values. The sign of a
            column is arbitrary and cancels in every use.
        singular_values (`torch.Tensor`):
            Shape (r,), descending, not negative.
    """

    side: Side
    vectors: torch.Tensor
    singular_values: torch.Tensor


def singular_basis(weight: torch.Tensor) -> SingularBasis:
    """Compute the singular basis of `weight` in float64.

    The basis comes from the eigenvectors of the smaller Gram matrix, WᵀW if in ≤ out, else WWᵀ. In float64 that is
    more exact than a float32 SVD (the change of the weight is accurate to about 1e-12), and on the CPU it takes as
    long for a square weight and down to a third of the time for a long one. Beside the weight it needs, for the
    moment, the memory of about five (r, r) float64 matrices.

    Args:
        weight (`torch.Tensor`):
            Shape (out, in), any floating-point dtype.

    Returns:
        `SingularBasis`: float64 tensors on the device of `weight` (on the CPU if that device has no float64).

    Raises:
        ValueError: `weight` is not a matrix, is empty, holds no numbers yet (meta device), or is not finite or zero.
    """
    scale = _largest_entry(weight)
    matrix = weight.detach()
    if matrix.device.type == "mps":  # no float64 there
        matrix = matrix.cpu()
    side: Side = "input" if matrix.shape[1] <= matrix.shape[0] else "output"
    gram = _negative_gram(matrix if side == "input" else matrix.T, scale)  # (r, r)
    # Ascending eigenvalues of −G are the descending ones of G: nothing has to be turned around.
    eigenvalues, eigenvectors = torch.linalg.eigh(gram, UPLO="L")
    del gram
    singular_values = eigenvalues.neg().clamp(min=0).sqrt() * scale
    return SingularBasis(side, eigenvectors.contiguous(), singular_values)


def weight_change(weight: torch.Tensor, basis: SingularBasis, offset: torch.Tensor) -> torch.Tensor:
    """The change ΔW = W' − W of a weight whose singular values are multiplied by z = 1 + offset.

    ΔW = W Q diag(offset) Qᵀ on the input side, Q diag(offset) Qᵀ W on the output side.

    Args:
        weight (`torch.Tensor`): Shape (out, in); the weight that `basis` belongs to.
        basis (`SingularBasis`): Its singular basis.
        offset (`torch.Tensor`): z − 1, shape (r,).

    Returns:
        `torch.Tensor`: ΔW, shape (out, in), in the dtype of `basis.vectors` but at least float32.
    """
    dtype = torch.promote_types(basis.vectors.dtype, torch.float32)
    weight, vectors, offset = weight.to(dtype), basis.vectors.to(dtype), offset.to(dtype)
    if basis.side == "input":
        return ((weight @ vectors) * offset) @ vectors.T
    return (vectors * offset) @ (vectors.T @ weight)


def _negative_gram(matrix: torch.Tensor, scale: float) -> torch.Tensor:
    """−AᵀA / scale² in float64 for a tall A (long, r); only the lower triangle is right, `eigh` reads no other.

    Dividing by the largest entry keeps the squares within range.
    """
    rank = matrix.shape[1]
    half = rank // 2
    gram = torch.zeros(rank, rank, dtype=torch.float64, device=matrix.device)
    for rows in matrix.split(rank):  # so that no float64 copy of the whole weight is made
        block = rows.to(torch.float64, copy=True).div_(scale)
        gram[:half, :half].addmm_(block[:, :half].T, block[:, :half], alpha=-1)
        gram[half:].addmm_(block[:, half:].T, block, alpha=-1)
    return gram


def _largest_entry(weight: torch.Tensor) -> float:
    """max |W|, after making sure that the weight has a singular basis."""
    shape = tuple(weight.shape)
    if weight.dim() != 2:
        raise ValueError(f"a singular basis needs a matrix, got a weight of shape {shape}; adapt linear layers only")
    if weight.numel() == 0:
        raise ValueError(f"the weight of shape {shape} is empty and has no singular basis; exclude this module")
    if not weight.is_floating_point():
        raise ValueError(f"the weight has dtype {weight.dtype}; dequantize it before taking its singular basis")
    if weight.is_meta:
        raise ValueError("the weight is on the meta device; load the base model's weights before adding an adapter")
    values = weight.detach()
    if values.element_size() == 1:  # torch has no aminmax of float8
        values = values.to(torch.float32)
    smallest, largest = torch.aminmax(values)  # one pass without a copy; NaN in, NaN out
    entry = max(abs(float(smallest)), abs(float(largest)))
    if not math.isfinite(entry):
        raise ValueError("the weight holds NaN or infinite values; the base checkpoint is damaged, load it again")
    if entry == 0:
        raise ValueError("the weight is zero, so scaling its singular values does nothing; exclude this module")
    return entry
