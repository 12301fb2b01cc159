"""The playground's task families: each module makes the problems of one family, ordinary and harder ones."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from peft_svf.playground.families import code, math, others, reasoning
from peft_svf.playground.problem import Problem


FAMILIES = ("math", "code", "reasoning")
"""Families an expert is trained for."""

MAKERS: dict[str, Callable[[Random], Problem]] = {
    "math": math.make_problem,
    "code": code.make_problem,
    "reasoning": reasoning.make_problem,
    "others": others.make_problem,
    "math-hard": math.make_hard_problem,
    "code-hard": code.make_hard_problem,
    "reasoning-hard": reasoning.make_hard_problem,
}
"""Problem maker of each family and of its harder variant, which no expert is trained on."""

__all__ = ["FAMILIES", "MAKERS"]
