"""A task for small story models: name the animal of the opening sentence again within the next 40 tokens.

Anybody can check it, the base model (stories260K) does it one time in ten, and it adds no knowledge: what SVF is for.
"""

from __future__ import annotations

import random
from itertools import product
from typing import Any

from datasets import Dataset

from peft_svf.trainers.rewards import Verdict, reward_function
from peft_svf.trainers.tasks import Task


ADJECTIVES = ["big", "little", "small", "happy", "sad", "brave"]
ANIMALS = ["dog", "cat", "bird", "bear", "fish", "frog", "duck", "pig", "cow", "bunny", "mouse", "lion"]
NAMES = ["Tom", "Lily", "Max", "Sue", "Ben", "Mia", "Sam", "Anna", "Bob", "Lucy", "Tim", "Sara", "Jack", "Amy"]
SPLITS = ("train", "validation", "test")
MAX_NEW_TOKENS = 40


@reward_function
def names_the_animal(completions: list[str], animal: list[str]) -> list[Verdict]:
    """+1 if the continuation has the animal's name in it, in the singular or the plural; −1 otherwise."""
    return [
        Verdict.right(wanted) if wanted in words(completion) else Verdict.wrong(f"no {wanted}")
        for completion, wanted in zip(completions, animal, strict=True)
    ]


def words(text: str) -> set[str]:
    """The words of a text in lower case, without punctuation, "'s" and a plural's "s"."""
    bare = {word.strip(".,!?\"'").lower().removesuffix("'s") for word in text.split()}
    return bare | {word.removesuffix("s") for word in bare}


def openings(split: str) -> list[dict[str, Any]]:
    """Opening sentences of one split: a fifth for test, a fifth for validation, the rest for training."""
    everything = list(product(ADJECTIVES, ANIMALS, NAMES))
    random.Random(0).shuffle(everything)
    fifth = len(everything) // 5
    parts = {"test": everything[:fifth], "validation": everything[fifth : 2 * fifth], "train": everything[2 * fifth :]}
    return [
        {
            "id": f"{adjective}-{animal}-{name}",
            "prompt": f"Once upon a time, there was a {adjective} {animal} named {name}.",
            "animal": animal,
        }
        for adjective, animal, name in parts[split]
    ]


def load(split: str, n: int | None = None, seed: int = 0, **_: Any) -> Dataset:
    """The first `n` openings of one split in an order drawn with `seed`; all if None."""
    rows = openings(split)
    random.Random(seed).shuffle(rows)
    return Dataset.from_list(rows[:n])


STORIES = Task(
    "stories", "stories", load, names_the_animal, MAX_NEW_TOKENS, "Continue a story and stay with its animal."
)
