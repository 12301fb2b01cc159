"""The interval over seeds and prompts against the normal approximation and against plain resampling."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from peft_svf.trainers.statistics import bootstrap_interval


def test_one_seed_gives_the_normal_interval_of_many_prompts() -> None:
    values = [[float(i % 4 == 0) for i in range(400)]]
    mean, low, high = bootstrap_interval(values)
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400)
    assert mean == 0.25
    assert (mean - low, high - mean) == pytest.approx((half, half), rel=0.06)


def test_differences_between_seeds_widen_the_interval() -> None:
    alike = [[float(i % 2) for i in range(100)]] * 3
    apart = [[shift + float(i % 2) for i in range(100)] for shift in (-1.0, 0.0, 1.0)]
    _, low, high = bootstrap_interval(alike)
    _, wide_low, wide_high = bootstrap_interval(apart)
    assert wide_high - wide_low > 3 * (high - low)


def test_interval_equals_plain_crossed_resampling() -> None:
    source = random.Random(1)
    values = [[float(source.random() < p) for p in np.linspace(0.1, 0.9, 30)] for _ in range(4)]
    means = []
    for _ in range(4000):
        rows = [source.randrange(4) for _ in range(4)]
        columns = [source.randrange(30) for _ in range(30)]
        means.append(sum(values[r][c] for r in rows for c in columns) / 120)
    expected = np.quantile(means, [0.025, 0.975])
    assert bootstrap_interval(values)[1:] == pytest.approx(tuple(expected), abs=0.01)


def test_the_same_values_give_the_same_interval() -> None:
    values = [[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]]
    assert bootstrap_interval(values) == bootstrap_interval(values)


@pytest.mark.parametrize("values", [[], [[]], [[1.0, 0.0], [1.0]]])
def test_incomplete_tables_are_refused(values: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="table of seeds and prompts"):
        bootstrap_interval(values)
