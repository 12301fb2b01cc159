"""The one-sided basis against the two-sided formula W' = U Σ diag(z) Vᵀ with a float64 SVD."""

from __future__ import annotations

import pytest
import torch

from peft_svf.spectrum import SingularBasis, singular_basis, weight_change


SHAPES = [(8, 8), (24, 7), (7, 24), (1, 9), (9, 1), (1, 1), (65, 64), (64, 65)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(rows: int, columns: int, singular_values: list[float]) -> torch.Tensor:
    left = torch.linalg.qr(random(rows, len(singular_values), seed=1)).Q
    right = torch.linalg.qr(random(columns, len(singular_values), seed=2)).Q
    return left @ torch.diag(torch.tensor(singular_values, dtype=torch.float64)) @ right.T


def two_sided_change(weight: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    z = 1 + offset.double()
    return u @ torch.diag(s * z) @ vh - weight.double()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_change_equals_the_two_sided_formula(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = random(*shape, dtype=dtype)
    offset = random(min(shape), seed=3) * 0.3
    change = weight_change(weight, singular_basis(weight), offset)
    assert change.dtype == torch.float64
    assert relative_error(change, two_sided_change(weight, offset)) < 1e-10


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)], ids=str)
def test_weight_change_of_an_ill_conditioned_weight(shape: tuple[int, int]) -> None:
    weight = with_spectrum(*shape, torch.logspace(2, -3, 24, dtype=torch.float64).tolist())
    offset = random(24, seed=4)
    assert (
        relative_error(weight_change(weight, singular_basis(weight), offset), two_sided_change(weight, offset)) < 1e-10
    )


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (8, 8)], ids=str)
def test_weight_change_of_a_rank_deficient_weight(shape: tuple[int, int]) -> None:
    weight = with_spectrum(*shape, [5.0, 2.0, 1.0, 0.5])
    offset = random(8, seed=5)
    basis = singular_basis(weight)
    assert relative_error(weight_change(weight, basis, offset), two_sided_change(weight, offset)) < 1e-10
    assert basis.singular_values[4:].max() < 1e-6
    # The offsets of components without a singular value do nothing.
    offset[4:] = 0
    assert relative_error(weight_change(weight, basis, offset), two_sided_change(weight, offset)) < 1e-10


@pytest.mark.parametrize("shape", [(10, 6), (6, 10), (6, 6)], ids=str)
def test_repeated_singular_values_are_scaled_as_one_group(shape: tuple[int, int]) -> None:
    # Within a group of equal singular values only the projector is unique, so the offset is constant there.
    weight = with_spectrum(*shape, [4.0, 4.0, 4.0, 2.0, 1.0, 1.0])
    offset = torch.tensor([0.5, 0.5, 0.5, -0.3, 0.2, 0.2], dtype=torch.float64)
    assert (
        relative_error(weight_change(weight, singular_basis(weight), offset), two_sided_change(weight, offset)) < 1e-10
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_basis_is_orthonormal_and_descending(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    basis = singular_basis(weight)
    rank = min(shape)
    assert basis.side == ("input" if shape[1] <= shape[0] else "output")
    assert basis.vectors.shape == (rank, rank) and basis.vectors.dtype == torch.float64
    torch.testing.assert_close(basis.vectors.T @ basis.vectors, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(basis.singular_values, torch.linalg.svdvals(weight))


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_tiny_and_huge_weights_neither_underflow_nor_overflow(scale: float) -> None:
    weight, offset = random(6, 4), random(4, seed=6)
    change = weight_change(weight * scale, singular_basis(weight * scale), offset)
    assert relative_error(change / scale, two_sided_change(weight, offset)) < 1e-10


def test_weight_change_computes_in_the_precision_of_the_basis() -> None:
    weight, offset = random(9, 5, dtype=torch.bfloat16), random(5, seed=7)
    exact = singular_basis(weight)
    rounded = SingularBasis(exact.side, exact.vectors.float(), exact.singular_values)
    change = weight_change(weight, rounded, offset)
    assert change.dtype == torch.float32
    assert relative_error(change, two_sided_change(weight, offset)) < 1e-6


def test_basis_of_a_parameter_carries_no_gradient() -> None:
    assert not singular_basis(torch.nn.Parameter(random(4, 3))).vectors.requires_grad


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3), "needs a matrix"),
        (torch.ones(2, 2, 2), "needs a matrix"),
        (torch.empty(0, 4), "is empty"),
        (torch.zeros(3, 4), "is zero"),
        (torch.tensor([[1.0, float("nan")]]), "NaN or infinite"),
        (torch.tensor([[1.0, float("inf")]]), "NaN or infinite"),
        (torch.ones(3, 4, dtype=torch.int8), "dequantize"),
        (torch.empty(3, 4, device="meta"), "meta device"),
    ],
    ids=["vector", "three axes", "empty", "zero", "nan", "inf", "int8", "meta"],
)
def test_weights_without_a_basis_are_named(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        singular_basis(weight)
