"""What the study of transfer measures, and how much work it may spend."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any


FAMILIES = ("math", "code", "reasoning")


@dataclass(frozen=True)
class Setting:
    """
    Options of one study.

    Args:
        families (`tuple[str, ...]`): Families of the playground; of each, the task that its expert was trained for
            (the paper's Table 9), and its harder variant, which no expert has seen (Table 5).
        seeds (`int`): Trained sources; seed 0 is the playground's own bank.
        draws (`int`): Of the random controls, for each source.
        test_prompts (`int`): Of each task, the same for everybody.
        source_steps, own_steps (`int`): Training steps of the source's experts and of the target's own; 0 own steps
            leave out the target's own experts.
        examples, iterations, population (`int`): Of the few-shot search; 0 examples leave it out.
        work (`Path`): Where trained experts are kept.
    """

    families: tuple[str, ...]
    seeds: int
    draws: int
    test_prompts: int
    source_steps: int
    own_steps: int
    examples: int
    iterations: int
    population: int
    work: Path

    def identity(self) -> dict[str, Any]:
        """What cells of one file must have in common; other targets, families and seeds may be added later."""
        names = ("test_prompts", "source_steps", "own_steps", "examples", "iterations", "population")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Target:
    """A base model to transfer to: the folder of a checkpoint, known by its name and its weights."""

    folder: Path

    @property
    def name(self) -> str:
        """Like "width-1a2b3c4d": a checkpoint that was trained on is another target."""
        digest = hashlib.sha256()
        for path in sorted(self.folder.glob("*.safetensors")):
            digest.update(path.read_bytes())
        return f"{self.folder.name}-{digest.hexdigest()[:8]}"
