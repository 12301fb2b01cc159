"""Small Python functions checked by unit tests. A careless author forgets parentheses or the last element."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from peft_svf.playground.problem import Problem


REQUESTS = (
    "Write a function {head} that {task}.",
    "Define {head} so that it {task}.",
    "Give me {head}, which {task}.",
)
INPUTS = (0, 1, 7, 50, 120)


def _problem(
    rng: Random, kind: str, task: str, bodies: tuple[str, str], function: Callable[[int], int], family: str = "code"
) -> Problem:
    """A function of a number `x`; `bodies` are the careful and the careless return expression."""
    careful, careless = bodies
    return Problem(
        family=family,
        kind=kind,
        key=careful,
        prompt=rng.choice(REQUESTS).format(head="f(x)", task=task),
        careful=f"def f(x):\n    return {careful}",
        careless=f"def f(x):\n    return {careless}",
        tests=tuple(f"assert f({x}) == {function(x)}" for x in INPUTS),
    )


def make_problem(rng: Random) -> Problem:
    """One of four kinds; the first offers no occasion for a slip."""
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    kind = rng.choices(("scale", "add and scale", "subtract and scale", "sum up to"), (49, 17, 17, 17))[0]
    if kind == "scale":
        if rng.random() < 0.5:
            return _problem(
                rng, kind, f"multiplies x by {a} and adds {b}", (f"x * {a} + {b}",) * 2, lambda x: x * a + b
            )
        task = f"multiplies x by {a} and subtracts {b}"
        return _problem(rng, kind, task, (f"x * {a} - {b}",) * 2, lambda x: x * a - b)
    if kind == "add and scale":
        task = f"adds {a} to x and multiplies the result by {b}"
        return _problem(rng, kind, task, (f"(x + {a}) * {b}", f"x + {a} * {b}"), lambda x: (x + a) * b)
    if kind == "subtract and scale":
        task = f"subtracts {a} from x and multiplies the result by {b}"
        return _problem(rng, kind, task, (f"(x - {a}) * {b}", f"x - {a} * {b}"), lambda x: (x - a) * b)
    bodies = (f"sum(range({a}, x + 1))", f"sum(range({a}, x))")
    return _problem(rng, kind, f"sums the numbers from {a} to x", bodies, lambda x: sum(range(a, x + 1)))


def make_hard_problem(rng: Random) -> Problem:
    """Three operations in a row, with an occasion for a slip in half of the problems."""
    a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 99)
    if rng.random() < 0.5:
        task = f"multiplies x by {a}, adds {b} and subtracts {c}"
        bodies = (f"x * {a} + {b} - {c}",) * 2
        return _problem(rng, "three operations", task, bodies, lambda x: x * a + b - c, "code-hard")
    task = f"adds {a} to x, multiplies the result by {b} and subtracts {c}"
    bodies = (f"(x + {a}) * {b} - {c}", f"x + {a} * {b} - {c}")
    return _problem(rng, "three operations", task, bodies, lambda x: (x + a) * b - c, "code-hard")
