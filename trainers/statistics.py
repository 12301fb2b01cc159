"""How sure a measured mean is: 95 % intervals for shares, means of answers to the same prompts, paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


NORMAL_QUANTILE_975 = 1.959963984540054


def wilson_interval(successes: float, n: float) -> tuple[float, float]:
    """95 % Wilson score interval of a success rate, in [0, 1].

    Args:
        successes (`float`): Number of successes; not whole for an effective number of trials.
        n (`float`): Number of trials, at least 1.

    Raises:
        ValueError: If `n` is below 1 or `successes` is not between 0 and `n`.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"An interval needs at least one trial and 0 to n successes, got {successes} of {n}.")
    z2 = NORMAL_QUANTILE_975**2
    share = successes / n
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_QUANTILE_975 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, min(share, center - half)), min(1.0, max(share, center + half))  # it holds the share itself


def grouped_mean(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean over all values and its standard error, when only values of different groups are independent.

    The linearized (cluster-robust) standard error of the ratio of sums; with groups of one value it is s / √n.

    Args:
        groups (`Sequence[Sequence[float]]`): The answers to one prompt are one group; at least one value in all.

    Returns:
        `tuple[float, float]`: The mean and its standard error, NaN for fewer than two groups.
    """
    groups = [group for group in groups if group]
    n, m = sum(map(len, groups)), len(groups)
    mean = sum(map(sum, groups)) / n
    if m < 2:
        return mean, math.nan
    squares = sum((sum(group) - len(group) * mean) ** 2 for group in groups)
    return mean, math.sqrt(m / (m - 1) * squares) / n


def grouped_success_interval(groups: Sequence[Sequence[bool]]) -> tuple[float, float, float]:
    """Success rate over all trials with its 95 % interval, when only trials of different groups are independent.

    Wilson's interval at the effective number of trials: as many independent trials as have the measured standard
    error, between the number of groups and the number of trials. With groups of one it is Wilson's interval.

    Args:
        groups (`Sequence[Sequence[bool]]`): The answers to one prompt are one group; at least one trial in all.

    Returns:
        `tuple[float, float, float]`: Share, low and high.
    """
    groups = [group for group in groups if group]
    n, m = sum(map(len, groups)), len(groups)
    share, error = grouped_mean(groups)
    effective = min(max(share * (1.0 - share) / error**2, m), n) if error > 0.0 else m  # all the same, or one group
    return share, *wilson_interval(share * effective, effective)


def paired_difference_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Mean of `after − before` over the same prompts with its 95 % normal interval: (mean, low, high).

    Args:
        before (`Sequence[float]`): Success or reward on each prompt before.
        after (`Sequence[float]`): The same on the same prompts, in the same order, after.

    Raises:
        ValueError: If the lengths differ or there are fewer than two prompts.
    """
    if len(before) != len(after) or len(before) < 2:
        raise ValueError(f"Paired results need the same two or more prompts, got {len(before)} and {len(after)}.")
    differences = [float(a) - float(b) for b, a in zip(before, after, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    half = NORMAL_QUANTILE_975 * math.sqrt(variance / n)
    return mean, mean - half, mean + half


def bootstrap_interval(
    values: Sequence[Sequence[float]], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of a table (training seeds × prompts) with a 95 % interval over both: (mean, low, high).

    Seeds and prompts are drawn anew with replacement, each on its own (crossed), so that the interval covers the
    choice of prompts and that of seeds. With fewer than about ten seeds it is still too narrow for the latter.

    Args:
        values (`Sequence[Sequence[float]]`): One row a seed, one column a prompt; the same prompts in every row.
        resamples (`int`, *optional*, defaults to 10000): Number of draws.
        seed (`int`, *optional*, defaults to 0): Seed of the draws.

    Raises:
        ValueError: If the table is empty or its rows differ in length.
    """
    if not values or not values[0] or len({len(row) for row in values}) > 1:
        raise ValueError(f"A table of seeds and prompts is needed, got rows of length {[len(row) for row in values]}.")
    table = np.asarray(values, dtype=np.float64)  # (seeds, prompts)
    seeds, prompts = table.shape
    draw = np.random.default_rng(seed).multinomial
    seed_counts = draw(seeds, np.full(seeds, 1 / seeds), size=resamples)  # (resamples, seeds)
    prompt_counts = draw(prompts, np.full(prompts, 1 / prompts), size=resamples)  # (resamples, prompts)
    means = ((seed_counts @ table) * prompt_counts).sum(1) / (seeds * prompts)  # (resamples,)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(table.mean()), float(low), float(high)
