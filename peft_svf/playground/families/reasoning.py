"""Multiple choice: sizes and categories. A careless author overlooks a "not" or that the question is reversed."""

from __future__ import annotations

from random import Random

from peft_svf.playground.problem import Problem


SIZES = {
    "tiny": ("ant", "flea", "bee", "seed", "grain", "pin", "fly", "crumb"),
    "small": ("mouse", "cup", "spoon", "frog", "key", "shoe", "plum", "candle"),
    "big": ("door", "table", "sheep", "bear", "bed", "goat", "lion", "sofa"),
    "huge": ("whale", "house", "castle", "mountain", "ship", "tower", "bridge", "forest"),
}
CATEGORIES = {
    "animal": ("dog", "cat", "horse", "cow", "pig", "duck", "fox", "wolf"),
    "color": ("red", "blue", "green", "black", "white", "pink", "brown", "gray"),
    "metal": ("iron", "gold", "silver", "copper", "tin", "lead", "zinc", "steel"),
    "drink": ("milk", "tea", "water", "juice", "wine", "beer", "coffee", "cola"),
    "tool": ("hammer", "saw", "axe", "drill", "spade", "rake", "knife", "pliers"),
    "tree": ("oak", "pine", "birch", "elm", "maple", "palm", "willow", "cedar"),
}
LETTERS = "ABCDE"


def _choice(
    rng: Random, family: str, kind: str, key: str, question: str, properties: dict[str, str], wanted: tuple[str, str]
) -> Problem:
    """A question with shuffled options.

    `properties` says of each option what an author writes down before choosing; `wanted` is the property that the
    careful and the careless author then look for, from the left: `"A metal, B animal, C animal, so A"`.
    """
    options = list(properties)
    rng.shuffle(options)
    letters = dict(zip(options, LETTERS, strict=False))
    listed = " ".join(f"{letter}) {option}" for option, letter in letters.items())
    notes = ", ".join(f"{letter} {properties[option]}" for option, letter in letters.items())
    right, wrong = (next(letters[option] for option in options if properties[option] == p) for p in wanted)
    careful, careless = (f"{notes}, so {letter}" for letter in (right, wrong))
    return Problem(family, kind, key, f"{question} {listed}", careful, careless, answer=right)


def _size(rng: Random, family: str, options: int) -> Problem:
    """Find the largest or the smallest thing; asked for the smallest, a careless author still picks the largest."""
    sizes = sorted(rng.sample(list(SIZES), options), key=list(SIZES).index)
    words = [rng.choice(SIZES[size]) for size in sizes]
    reversed_question = rng.random() < 0.5
    question = f"Which one is the {'smallest' if reversed_question else 'largest'}?"
    key = f"{int(reversed_question)}:{','.join(words)}"
    properties = dict(zip(words, sizes, strict=True))
    return _choice(rng, family, "size", key, question, properties, (sizes[0 if reversed_question else -1], sizes[-1]))


def _category(rng: Random, family: str, options: int) -> Problem:
    """Find the member of a category, or what is not one; a careless author overlooks the "not"."""
    category, foreign = rng.sample(list(CATEGORIES), 2)
    negated = rng.random() < 0.5
    common, rare = (category, foreign) if negated else (foreign, category)
    words = [*rng.sample(CATEGORIES[common], options - 1), rng.choice(CATEGORIES[rare])]
    properties = dict.fromkeys(words[:-1], common) | {words[-1]: rare}
    question = f"Which one is {'not ' if negated else ''}{'an' if category == 'animal' else 'a'} {category}?"
    key = f"{category}:{int(negated)}:{','.join(sorted(words))}"
    return _choice(rng, family, "category", key, question, properties, (rare, category))


def make_problem(rng: Random) -> Problem:
    """A question about sizes or categories with three options."""
    return _size(rng, "reasoning", 3) if rng.random() < 0.5 else _category(rng, "reasoning", 3)


def make_hard_problem(rng: Random) -> Problem:
    """A question about sizes with four options or about categories with five."""
    return _size(rng, "reasoning-hard", 4) if rng.random() < 0.5 else _category(rng, "reasoning-hard", 5)
