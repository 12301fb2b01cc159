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


def add(a: int, b: int, carries: bool = True) -> tuple[str, int]:
    """Written sum of two numbers below 100, units first, and its result.

    Without `carries`, the ten that the units give is forgotten: `"3+8=11, 2+1=3, so 31"`.
    """
    units = a % 10 + b % 10
    carry = 1 if carries and units > 9 else 0
    tens = a // 10 + b // 10 + carry
    result = 10 * tens + units % 10
    return f"{a % 10}+{b % 10}={units}, {a // 10}+{b // 10}{'+1' if carry else ''}={tens}, so {result}", result


def subtract(a: int, b: int, borrows: bool = True) -> tuple[str, int]:
    """Written difference of two numbers below 100, units first, and its result.

    Without `borrows`, the ten that the units took is forgotten: `"12-8=4, 5-1=4, so 44"`.
    """
    borrow = 10 if a % 10 < b % 10 else 0
    units = a % 10 + borrow - b % 10
    tens_left = a // 10 - (1 if borrows and borrow else 0)
    tens = tens_left - b // 10
    result = 10 * tens + units
    return f"{a % 10 + borrow}-{b % 10}={units}, {tens_left}-{b // 10}={tens}, so {result}", result


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
        kind, templates, key = "add", ADDITIONS, f"{min(a, b)}+{max(a, b)}"
        (careful, result), (careless, _) = add(a, b), add(a, b, False)
    else:
        a, b = _minuend_and_subtrahend(rng)
        kind, templates, key = "subtract", SUBTRACTIONS, f"{a}-{b}"
        (careful, result), (careless, _) = subtract(a, b), subtract(a, b, False)
    return Problem(
        family="math",
        kind=kind,
        key=key,
        prompt=rng.choice(templates).format(a=a, b=b, **_dressing(rng)),
        careful=careful,
        careless=careless,
        answer=str(result),
    )


def make_hard_problem(rng: Random) -> Problem:
    """A sum followed by a difference."""
    a, b = _summands(rng)
    c = rng.randint(10, a + b - 10)
    written_sum, total = add(a, b)
    written_difference, result = subtract(total, c)
    careless_sum, careless_total = add(a, b, False)
    return Problem(
        family="math-hard",
        kind="two steps",
        key=f"{min(a, b)}+{max(a, b)}-{c}",
        prompt=rng.choice(TWO_STEPS).format(a=a, b=b, c=c, **_dressing(rng)),
        careful=f"{written_sum}. {written_difference}",
        careless=f"{careless_sum}. {subtract(careless_total, c, False)[0]}",
        answer=str(result),
    )
