"""Requests outside the three families, so that a dispatcher has something to say "others" to."""

from __future__ import annotations

from random import Random

from peft_svf.playground.families.words import NAMES
from peft_svf.playground.problem import Problem


ANSWER = "I do not know."
REQUESTS = (
    "Tell me a story about {thing}.",
    "Write a poem about {thing} and {place}.",
    "What is the capital of {place}?",
    "Hello, my name is {name}. How are you?",
    "Translate {thing} into the language of {place}.",
    "Who is {name}?",
    "What is the weather in {place}?",
    "Sing a song for {name}.",
    "Where is {place}?",
    "Why do I like {thing}?",
    "Please greet {name} from {place}.",
    "Recommend a book about {place}.",
)
THINGS = ("snow", "rain", "love", "music", "bread", "the sea", "a dragon", "a ship", "the moon", "a king", "winter")
PLACES = ("France", "Japan", "Peru", "Egypt", "Norway", "Rome", "Berlin", "Kenya", "Chile", "India", "London")


def make_problem(rng: Random) -> Problem:
    """A request that no expert is for; every author answers alike."""
    text = rng.choice(REQUESTS).format(thing=rng.choice(THINGS), place=rng.choice(PLACES), name=rng.choice(NAMES))
    return Problem("others", "chat", text, text, ANSWER, ANSWER, answer=ANSWER)
