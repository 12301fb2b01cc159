"""How sure a measured success rate is: 95 % intervals for a share and for a paired difference of two shares."""

from __future__ import annotations

import math
from collections.abc import Sequence


NORMAL_QUANTILE_975 = 1.959963984540054


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a success rate, in [0, 1].

    Args:
        successes (`int`): Number of successes.
        n (`int`): Number of trials, at least 1.

    Raises:
        ValueError: If `n` is below 1 or `successes` is not between 0 and `n`.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"An interval needs at least one trial and 0 to n successes, got {successes} of {n}.")
    z2 = NORMAL_QUANTILE_975**2
    share = successes / n
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_QUANTILE_975 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def paired_difference_interval(before: Sequence[bool], after: Sequence[bool]) -> tuple[float, float, float]:
    """Mean of `after − before` over the same prompts with its 95 % normal interval: (mean, low, high).

    Args:
        before (`Sequence[bool]`): Success on each prompt before.
        after (`Sequence[bool]`): Success on the same prompts, in the same order, after.

    Raises:
        ValueError: If the lengths differ or there are fewer than two prompts.
    """
    if len(before) != len(after) or len(before) < 2:
        raise ValueError(f"Paired results need the same two or more prompts, got {len(before)} and {len(after)}.")
    differences = [int(a) - int(b) for b, a in zip(before, after, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    half = NORMAL_QUANTILE_975 * math.sqrt(variance / n)
    return mean, mean - half, mean + half
