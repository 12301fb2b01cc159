"""One generated problem of the playground: prompt, the answers of two kinds of author, and what judges an answer."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Problem:
    """A prompt with the answer of a careful and of a careless author.

    A careless author makes one typical slip of the trade (forgets a carry, forgets parentheses, overlooks a "not").
    Where a problem offers no occasion for the slip, both authors write the same answer.

    Args:
        family (`str`): `"math"`, `"code"`, `"reasoning"` or `"others"`.
        kind (`str`): Sub-skill within the family, e.g. `"add"`.
        key (`str`): The problem without its dressing: equal for two wordings of one problem. Splits are made by it.
        prompt (`str`): What the user asks.
        careful (`str`): The right answer as a careful author writes it.
        careless (`str`): The answer of a careless author.
        answer (`str`): What a reward compares with: the number (math) or the letter (reasoning); empty for code.
        tests (`tuple[str, ...]`): Unit tests, one `assert` each (code only).
    """

    family: str
    kind: str
    key: str
    prompt: str
    careful: str
    careless: str
    answer: str = ""
    tests: tuple[str, ...] = field(default=())

    @property
    def has_slip(self) -> bool:
        """Whether careful and careless authors differ here."""
        return self.careful != self.careless

    @property
    def split(self) -> str:
        """Split this problem belongs to, decided by its key alone: one tenth test, one tenth validation, rest train.

        Two wordings of a problem fall into the same split, so a held-out prompt is held out in every dressing.
        """
        bucket = int.from_bytes(hashlib.sha256(f"{self.family}|{self.key}".encode()).digest()[:4], "big") % 10
        return {0: "test", 1: "validation"}.get(bucket, "train")
