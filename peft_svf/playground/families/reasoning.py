"""Multiple choice: orderings and categories. A careless author overlooks a "not" or that the question is reversed."""

from __future__ import annotations

from itertools import pairwise
from random import Random

from peft_svf.playground.families.words import NAMES
from peft_svf.playground.problem import Problem


ORDERINGS = (
    ("older", "oldest", "youngest"),
    ("taller", "tallest", "shortest"),
    ("faster", "fastest", "slowest"),
    ("richer", "richest", "poorest"),
)
CATEGORIES = {
    "an animal": ("dog", "cat", "horse", "cow", "pig", "duck", "fox", "wolf"),
    "a color": ("red", "blue", "green", "black", "white", "pink", "brown", "gray"),
    "a metal": ("iron", "gold", "silver", "copper", "tin", "lead", "zinc", "steel"),
    "a drink": ("milk", "tea", "water", "juice", "wine", "beer", "coffee", "cola"),
    "a tool": ("hammer", "saw", "axe", "drill", "spade", "rake", "knife", "pliers"),
    "a tree": ("oak", "pine", "birch", "elm", "maple", "palm", "willow", "cedar"),
}
LETTERS = "ABCDE"


def _choice(
    rng: Random, family: str, kind: str, key: str, question: str, options: list[str], picks: tuple[str, str]
) -> Problem:
    """A question with shuffled options; `picks` are the options chosen by the careful and the careless author."""
    rng.shuffle(options)
    listed = " ".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
    letters = [LETTERS[options.index(pick)] for pick in picks]
    careful, careless = (f"It is {pick}, so {letter}" for pick, letter in zip(picks, letters, strict=True))
    return Problem(family, kind, key, f"{question} {listed}", careful, careless, answer=letters[0])


def _ordering(rng: Random, family: str, people: int) -> Problem:
    """A chain of comparisons; asked for the last of the chain, a careless author still names the first."""
    names = rng.sample(NAMES, people)
    comparative, first, last = rng.choice(ORDERINGS)
    reversed_question = rng.random() < 0.5
    chain = " ".join(f"{x} is {comparative} than {y}." for x, y in pairwise(names))
    question = f"{chain} Who is the {last if reversed_question else first}?"
    right = names[-1] if reversed_question else names[0]
    key = f"{comparative}:{int(reversed_question)}:{'>'.join(names)}"
    return _choice(rng, family, "ordering", key, question, list(names), (right, names[0]))


def _category(rng: Random, family: str, options: int) -> Problem:
    """Find the member of a category, or what is not one; a careless author overlooks the "not"."""
    category, foreign = rng.sample(list(CATEGORIES), 2)
    negated = rng.random() < 0.5
    if negated:
        members, right = rng.sample(CATEGORIES[category], options - 1), rng.choice(CATEGORIES[foreign])
        words, careless = [*members, right], members[0]
    else:
        others = rng.sample(CATEGORIES[foreign], options - 1)
        right = careless = rng.choice(CATEGORIES[category])
        words = [*others, right]
    question = f"Which one is {'not ' if negated else ''}{category}?"
    key = f"{category}:{int(negated)}:{','.join(sorted(words))}"
    return _choice(rng, family, "category", key, question, words, (right, careless))


def make_problem(rng: Random) -> Problem:
    """An ordering of three people or a category question with three options."""
    return _ordering(rng, "reasoning", 3) if rng.random() < 0.5 else _category(rng, "reasoning", 3)


def make_hard_problem(rng: Random) -> Problem:
    """An ordering of four people or a category question with five options."""
    return _ordering(rng, "reasoning-hard", 4) if rng.random() < 0.5 else _category(rng, "reasoning-hard", 5)
