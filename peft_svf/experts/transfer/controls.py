"""Controls: transfers that keep everything but the one thing that transfer is believed to depend on, the order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from peft_svf.experts.algebra import random_like, reverse, shuffle
from peft_svf.experts.expert import Expert


Control = Literal["shuffled", "reversed", "random"]
CONTROLS: dict[str, str] = {
    "shuffled": "the offsets of each matrix in random order (the paper's control)",
    "reversed": "the offsets of each matrix in reversed order",
    "random": "normal numbers with the mean and standard deviation of the offsets of each matrix",
}
_MADE: dict[str, Callable[[Expert, int], Expert]] = {
    "shuffled": lambda expert, seed: shuffle(expert, seed),
    "reversed": lambda expert, seed: reverse(expert),
    "random": lambda expert, seed: random_like(expert, seed),
}


def controlled(expert: Expert, control: str | None, seed: int) -> Expert:
    """A transferred expert with other offsets, but its own facts; the expert itself without a control."""
    return expert if control is None else expert.with_offsets(_MADE[control](expert, seed).offsets)
