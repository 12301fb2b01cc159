"""What several commands share in parsing their arguments; light, because every start imports it."""

from __future__ import annotations

import argparse
import math


DTYPES = ("auto", "float32", "bfloat16", "float16")


class DefaultsFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that say something: not None, not False and not an empty list."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False or action.default == []
        return action.help if says_nothing else super()._get_help_string(action)


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def temperature(text: str) -> float:
    """0 or a positive number, for argparse."""
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"is 0 (greedy) or positive, got {text}")
    return value


def share(text: str) -> float:
    """A number from 0 to 1, for argparse."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"is between 0 and 1, got {text}")
    return value


def mixture(text: str) -> dict[str, float]:
    """`"math=0.7,code=0.3"` as expert to weight, for argparse."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not name or not math.isfinite(weight):
            raise argparse.ArgumentTypeError(f"is EXPERT=WEIGHT,... with numbers, like math=0.7,code=0.3, got {text}")
        if name in weights:
            raise argparse.ArgumentTypeError(f"names {name} twice")
        weights[name] = weight
    return weights
