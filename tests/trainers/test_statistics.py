"""Intervals against published and hand-computed values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from peft_svf.trainers.statistics import (
    grouped_mean,
    grouped_success_interval,
    paired_difference_interval,
    wilson_interval,
)


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


def test_independent_values_have_the_textbook_standard_error() -> None:
    values = [0.5, -1.0, 2.0, 0.25, 1.5]
    mean, error = grouped_mean([[value] for value in values])
    assert mean == pytest.approx(np.mean(values))
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
    assert math.isnan(grouped_mean([[1.0, 2.0]])[1]), "one prompt tells nothing about others"


def test_answers_to_one_prompt_are_not_independent() -> None:
    """Four copies of every answer say no more than one, and empty groups nothing at all."""
    values = [0.5, -1.0, 2.0, 0.25, 1.5]
    once, copies = grouped_mean([[value] for value in values]), grouped_mean([[value] * 4 for value in values] + [[]])
    assert copies == pytest.approx(once)
    success = [True, False, True, True, False, True]
    assert grouped_success_interval([[s] * 4 for s in success]) == pytest.approx((4 / 6, *wilson_interval(4, 6)))
    assert grouped_success_interval([[s] for s in success]) == pytest.approx((4 / 6, *wilson_interval(4, 6)))
    assert grouped_success_interval([[True] * 8, [True] * 8]) == (1.0, *wilson_interval(2, 2)), "two prompts"


def test_grouped_intervals_cover_the_truth_where_naive_ones_do_not() -> None:
    """Prompts of different difficulty, 8 answers each: nominal 95 %, while 240 "independent" trials cover 70 %."""
    random = np.random.default_rng(0)
    covered = naive = 0
    for _ in range(400):
        difficulty = random.beta(0.5, 0.5, size=30)
        trials = random.random((30, 8)) < difficulty[:, None]
        _, low, high = grouped_success_interval(trials.tolist())
        covered += low <= 0.5 <= high
        low, high = wilson_interval(int(trials.sum()), trials.size)
        naive += low <= 0.5 <= high
    assert 0.92 <= covered / 400 <= 0.98 and naive / 400 < 0.8
