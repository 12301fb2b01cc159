"""Intervals against published and hand-computed values."""

from __future__ import annotations

import math

import pytest

from peft_svf.trainers.statistics import paired_difference_interval, wilson_interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # R: prop.test(successes, n, correct = FALSE)$conf.int
    [(8, 10, 0.4901625, 0.9433178), (0, 10, 0.0, 0.2775328), (10, 10, 0.7224672, 1.0), (15, 148, 0.0624, 0.1605)],
)
def test_wilson_interval_equals_published_values(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=1e-4)


def test_paired_interval_equals_a_hand_computation() -> None:
    before = [True, True, False, False, False]
    after = [True, False, True, True, True]
    mean, low, high = paired_difference_interval(before, after)  # differences 0, -1, 1, 1, 1
    assert mean == pytest.approx(0.4)
    assert high - mean == pytest.approx(mean - low) == pytest.approx(1.959964 * math.sqrt(0.8 / 5), rel=1e-5)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="0 to n successes, got 3 of 2"):
        wilson_interval(3, 2)
    with pytest.raises(ValueError, match="got 1 and 2"):
        paired_difference_interval([True], [True, False])
