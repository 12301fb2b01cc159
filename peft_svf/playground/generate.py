"""Distinct problems of one family and split, the same for the same seed."""

from __future__ import annotations

from random import Random

from peft_svf.playground.families import MAKERS
from peft_svf.playground.problem import SPLITS, Problem


def generate_problems(family: str, split: str, n: int, seed: int = 0) -> list[Problem]:
    """Make `n` problems with distinct prompts.

    Args:
        family (`str`): `"math"`, `"code"`, `"reasoning"`, `"others"`, or `"math-hard"` and so on.
        split (`str`): `"train"`, `"validation"` or `"test"`. Splits share no problem, in whatever wording.
        n (`int`): Number of problems.
        seed (`int`, *optional*, defaults to 0): Seed of the generator.

    Raises:
        ValueError: If family or split is unknown, or the family has fewer than `n` distinct prompts in that split.
    """
    if family not in MAKERS:
        raise ValueError(f"Unknown playground family {family!r}: choose one of {', '.join(MAKERS)}.")
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}: choose one of {', '.join(SPLITS)}.")
    rng = Random(f"{family}/{split}/{seed}")
    problems: dict[str, Problem] = {}
    for _ in range(200 * n + 10_000):
        if len(problems) == n:
            break
        problem = MAKERS[family](rng)
        if problem.split == split:
            problems.setdefault(problem.prompt, problem)
    if len(problems) < n:
        raise ValueError(
            f"The split {split!r} of {family!r} has about {len(problems)} distinct prompts, {n} were asked for."
        )
    return list(problems.values())
