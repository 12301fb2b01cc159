"""Timing by ratios: every round runs all candidates once, and ratios are taken within a round.

A machine that slows down for a while slows down all candidates of a round alike, so the median ratio stays.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Spread:
    """The median of repeated measurements, and the smallest and largest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    @classmethod
    def exact(cls, value: float) -> Spread:
        """A number that is counted, not timed."""
        return cls(value, value, value)

    def __str__(self) -> str:
        if self.low == self.high:
            return f"{self.median:.3g}"
        return f"{self.median:.3g} ({self.low:.3g}–{self.high:.3g})"


def make_clock(device: str, processor_time: bool = False) -> Callable[[], float]:
    """What tells the time in seconds, after the device has done all it was given.

    Args:
        device (`str`): "cpu" or "cuda".
        processor_time (`bool`, *optional*): Count only the time that the processor spends on this process. For a CPU
            that others use too; with one thread it is what the wall clock would show on an idle machine.
    """
    if device != "cuda":
        return time.process_time if processor_time else time.perf_counter

    def after_synchronizing() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return after_synchronizing


def time_rounds(
    candidates: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float], warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of every candidate in every round; the order within a round is shuffled."""
    if warm_up:
        for run in candidates.values():
            run()
    order = list(candidates)
    shuffle = random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            start = clock()
            candidates[name]()
            seconds[name].append(clock() - start)
    return seconds


def ratios(seconds: dict[str, list[float]], to: str) -> dict[str, Spread]:
    """Each candidate's time as a multiple of the time of candidate `to` in the same round."""
    return {
        name: Spread.of([value / base for value, base in zip(values, seconds[to], strict=True)])
        for name, values in seconds.items()
    }
