"""Cells of the study, a line of JSON each, written as soon as they are measured: an interrupted study goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peft_svf.experts.files import replace_file


@dataclass(frozen=True)
class Cell:
    """
    One method with one seed on one task of one target.

    Args:
        target, task, method (`str`): Which.
        seed (`int`): Of the source's training; of the target's own experts that of theirs; 0 for the base model.
        draw (`int`): Of a random control; 0 otherwise.
        successes (`tuple[int, ...]`): 1 for each prompt that was answered right, 0 for the others.
        seconds (`float`): What it took; a share of the batch where several were answered in one.
        details (`Mapping[str, Any]`, *optional*): For instance the mixture that few-shot search has found.
    """

    target: str
    task: str
    method: str
    seed: int
    draw: int
    successes: tuple[int, ...]
    seconds: float
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, int, int]:
        return self.target, self.task, self.method, self.seed, self.draw


class Cells:
    """
    All cells measured so far, and the file that they are in.

    Args:
        path (`Path`): The file; a line that a killed run has left unfinished is dropped.
        identity (`Mapping[str, Any]`): The settings that all cells have in common.

    Raises:
        ValueError: The file holds cells of other settings.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path, self._cells = path, dict[tuple[str, str, str, int, int], Cell]()
        header, *lines = _complete_lines(path) or [json.dumps({"setting": dict(identity)})]
        earlier = json.loads(header)["setting"]
        if changed := [name for name, value in identity.items() if earlier.get(name) != value]:
            name = changed[0]
            raise ValueError(
                f"{path} holds a study with another {name} ({earlier.get(name)!r}, not {identity[name]!r}): choose "
                "another --output, or the same settings"
            )
        for line in lines:
            self._remember(Cell(**{**json.loads(line), "successes": tuple(json.loads(line)["successes"])}))
        text = "\n".join([header, *lines]) + "\n"
        replace_file(path, lambda partial: partial.write_text(text, "utf-8"))

    def _remember(self, cell: Cell) -> None:
        self._cells[cell.key] = cell

    def __contains__(self, key: tuple[str, str, str, int, int]) -> bool:
        return key in self._cells

    def add(self, cell: Cell) -> None:
        """Keep a cell, on disk before this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(cell)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._remember(cell)

    def of(self, **which: Any) -> list[Cell]:
        """Those with these values, in the order in which they were measured."""
        return [cell for cell in self._cells.values() if all(getattr(cell, k) == v for k, v in which.items())]


def _complete_lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    *complete, _unfinished = path.read_text("utf-8").split("\n")  # what follows the last line break is nothing
    return complete
