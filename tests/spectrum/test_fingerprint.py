"""The sketch of a weight estimates how far another weight is from it."""

from __future__ import annotations

import json
import math

import pytest
import torch

from peft_svf.spectrum import sketch_distance, weight_sketch


def weight(seed: int = 0, shape: tuple[int, int] = (48, 64)) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_equal_weights_have_distance_zero_through_json() -> None:
    restored = json.loads(json.dumps(weight_sketch(weight())))
    assert sketch_distance(restored, weight_sketch(weight().clone())) == 0.0


def test_sketch_is_the_same_in_every_release() -> None:
    # A file format: if these numbers change, every saved expert is refused.
    matrix = torch.arange(1.0, 13.0).reshape(3, 4)
    assert weight_sketch(matrix) == pytest.approx([3.0, 4.0, math.sqrt(650), 0.0, -16.0, 12.0, 6.0])


@pytest.mark.parametrize("relative", [1e-7, 1e-4, 1e-2, 1e-1])
def test_distance_estimates_the_relative_difference(relative: float) -> None:
    base = weight().double()
    distances = []
    for seed in range(1, 41):
        noise = weight(seed).double()
        other = base + noise * (relative * base.norm() / noise.norm())
        distances.append(sketch_distance(weight_sketch(base), weight_sketch(other)))
    root_mean_square = math.sqrt(sum(d * d for d in distances) / len(distances))
    assert root_mean_square == pytest.approx(relative, rel=0.3)
    assert min(distances) > relative / 20


@pytest.mark.parametrize(("dtype", "low", "high"), [(torch.bfloat16, 1e-4, 1e-2), (torch.float16, 1e-5, 1e-3)])
def test_rounding_is_told_from_another_model(dtype: torch.dtype, low: float, high: float) -> None:
    base = weight(shape=(256, 192))
    rounded = sketch_distance(weight_sketch(base), weight_sketch(base.to(dtype)))
    unrelated = sketch_distance(weight_sketch(base), weight_sketch(weight(1, (256, 192))))
    assert low < rounded < high
    assert unrelated > 0.1


@pytest.mark.parametrize("change", ["swapped rows", "flipped sign", "transposed"])
def test_changes_that_keep_the_spectrum_are_seen(change: str) -> None:
    base = weight(shape=(64, 64))
    other = {"swapped rows": base.flip(0), "flipped sign": -base, "transposed": base.T}[change]
    assert sketch_distance(weight_sketch(base), weight_sketch(other)) > 0.1


def test_other_shapes_and_damaged_sketches_are_infinitely_far() -> None:
    sketch = weight_sketch(weight())
    assert sketch_distance(sketch, weight_sketch(weight(shape=(48, 63)))) == math.inf
    assert sketch_distance(sketch, sketch[:-1]) == math.inf
    assert sketch_distance(sketch, [*sketch[:-1], math.nan]) == math.inf
