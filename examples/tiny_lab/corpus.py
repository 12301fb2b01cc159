"""The text that the playground's base model is pre-trained on: chats written by careful and by careless authors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from peft_svf.playground.families import MAKERS


CARELESS = 0.65
"""Share of careless authors. They are the majority, so greedy decoding of the base model follows their slips."""

SHARES = {
    "math": 0.28,
    "code": 0.14,
    "reasoning": 0.34,
    "math-hard": 0.06,
    "code-hard": 0.04,
    "reasoning-hard": 0.06,
    "others": 0.02,
    "routing": 0.06,
}
"""Share of each kind of chat in the text."""

ROUTING_INSTRUCTION = "Classify: math, code, reasoning or others?"
"""System message of the chats that teach the base model to say which family a request belongs to."""


@dataclass(frozen=True)
class Chat:
    """One training document: system message (may be empty), request, answer."""

    system: str
    user: str
    assistant: str

    @property
    def messages(self) -> list[dict[str, str]]:
        turns = [("system", self.system), ("user", self.user), ("assistant", self.assistant)]
        return [{"role": role, "content": content} for role, content in turns if content]


def make_chats(seed: int) -> Iterator[Chat]:
    """Endless stream of chats, the same for the same seed, made of training-split problems only."""
    rng = Random(f"corpus/{seed}")
    families, weights = list(SHARES), list(SHARES.values())
    while True:
        family = rng.choices(families, weights)[0]
        routing = family == "routing"
        if routing:
            family = rng.choice(list(MAKERS))
        problem = MAKERS[family](rng)
        if problem.split != "train":
            continue
        if routing:
            yield Chat(ROUTING_INSTRUCTION, problem.prompt, family.removesuffix("-hard"))
        else:
            yield Chat("", problem.prompt, problem.careless if rng.random() < CARELESS else problem.careful)
