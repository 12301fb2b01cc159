"""What the parts of adaptation.py are measured with: how much work to spend, on what clock, and where to keep it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Setting:
    """
    Options of one run, the same for all parts.

    Args:
        quick (`bool`): Smallest sizes: whether it runs at all.
        rounds (`int`): How often every timing is repeated.
        seeds (`int`): Trained banks, and few-shot searches, of the parts that measure success.
        test_prompts (`int`): Prompts of every task that success is measured on.
        cross_validation (`bool`):
            Let few-shot search choose among the paper's four configurations of the weights by cross-validation.
        work (`Path`): Folder of the trained experts; a rerun takes what is there.
        clock (`Callable[[], float]`): Tells the time in seconds.
        environment (`dict[str, str]`): Hardware and versions, for the report.
    """

    quick: bool
    rounds: int
    seeds: int
    test_prompts: int
    cross_validation: bool
    work: Path
    clock: Callable[[], float]
    environment: dict[str, str]
