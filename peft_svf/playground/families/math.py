"""Math word problems: sums and differences of two-digit numbers. A careless author forgets to carry or to borrow."""

from __future__ import annotations

from random import Random

from peft_svf.playground.families.words import NAMES
from peft_svf.playground.problem import Problem


THINGS = ("apples", "pears", "books", "coins", "pens", "cards", "stamps", "shells", "eggs", "cakes", "balls", "toys")

ADDITIONS = (
    "{name} has {a} {things} and buys {b} more. How many {things} does {name} have?",
    "{name} has {a} {things} and finds {b} more. How many {things} does {name} have now?",
    "{name} has {a} {things} and {other} has {b} {things}. How many {things} do they have together?",
    "There are {a} {things} in one box and {b} {things} in another box. How many {things} are there?",
)
SUBTRACTIONS = (
    "{name} has {a} {things} and loses {b}. How many {things} does {name} have left?",
    "{name} has {a} {things} and gives {b} to {other}. How many {things} does {name} have left?",
    "There are {a} {things} in a box. {name} takes {b}. How many {things} are left?",
    "{name} has {a} {things} and {other} has {b} {things}. How many more {things} does {name} have?",
)
TWO_STEPS = (
    "{name} has {a} {things}, buys {b} more and gives {c} to {other}. How many {things} does {name} have left?",
    "There are {a} {things} in a box. {name} adds {b} and {other} takes {c}. How many {things} are left?",
)


def add_without_carry(a: int, b: int) -> int:
    """Sum of two numbers below 100 by a careless author: units carry nothing into the tens."""
    return (a // 10 + b // 10) % 10 * 10 + (a + b) % 10


def subtract_without_borrow(a: int, b: int) -> int:
    """Difference of two numbers below 100 by a careless author: units borrow nothing from the tens."""
    return (a // 10 - b // 10) % 10 * 10 + (a - b) % 10


def _dressing(rng: Random) -> dict[str, str]:
    name, other = rng.sample(NAMES, 2)
    return {"name": name, "other": other, "things": rng.choice(THINGS)}


def _summands(rng: Random) -> tuple[int, int]:
    """Two numbers of at least 10 whose sum stays below 100, with a carry in half of the cases."""
    carries = rng.random() < 0.5
    while True:
        a, b = rng.randint(10, 89), rng.randint(10, 89)
        if a + b < 100 and (a % 10 + b % 10 >= 10) == carries:
            return a, b


def _minuend_and_subtrahend(rng: Random) -> tuple[int, int]:
    """Two-digit numbers a > b, with a borrow in half of the cases."""
    borrows = rng.random() < 0.5
    while True:
        a, b = rng.randint(20, 99), rng.randint(10, 89)
        if a > b and (a % 10 < b % 10) == borrows:
            return a, b


def make_problem(rng: Random) -> Problem:
    """One sum or difference."""
    if rng.random() < 0.5:
        a, b = _summands(rng)
        kind, sign, templates = "add", "+", ADDITIONS
        key, right, wrong = f"{min(a, b)}+{max(a, b)}", a + b, add_without_carry(a, b)
    else:
        a, b = _minuend_and_subtrahend(rng)
        kind, sign, templates = "subtract", "-", SUBTRACTIONS
        key, right, wrong = f"{a}-{b}", a - b, subtract_without_borrow(a, b)
    return Problem(
        family="math",
        kind=kind,
        key=key,
        prompt=rng.choice(templates).format(a=a, b=b, **_dressing(rng)),
        careful=f"{a} {sign} {b} = {right}",
        careless=f"{a} {sign} {b} = {wrong}",
        answer=str(right),
    )


def make_hard_problem(rng: Random) -> Problem:
    """A sum followed by a difference."""
    a, b = _summands(rng)
    c = rng.randint(10, a + b - 1)
    total, careless_total = a + b, add_without_carry(a, b)
    careless_rest = subtract_without_borrow(careless_total, c)
    return Problem(
        family="math-hard",
        kind="two steps",
        key=f"{min(a, b)}+{max(a, b)}-{c}",
        prompt=rng.choice(TWO_STEPS).format(a=a, b=b, c=c, **_dressing(rng)),
        careful=f"{a} + {b} = {total}. {total} - {c} = {total - c}",
        careless=f"{a} + {b} = {careless_total}. {careless_total} - {c} = {careless_rest}",
        answer=str(total - c),
    )
