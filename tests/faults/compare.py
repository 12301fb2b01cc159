"""Differences between two runs, of which only times and the order of sets are none."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


TIMES = re.compile(r"(runtime|per_second|seconds|step_time|_time$)")
EXPERT = ("adapter_config.json", "adapter_model.safetensors", "README.md")
CHECKPOINT = (*EXPERT, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_progress.json")


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Paths at which two nested structures are not equal, bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other}, key=str):
            if TIMES.search(str(key)):
                continue
            if key not in one or key not in other:
                yield f"{where}/{key} is only in one"
            else:
                yield from differences(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from differences(a, b, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield f"{where} differs"
    elif hasattr(one, "tobytes") and hasattr(other, "tobytes"):
        if one.tobytes() != other.tobytes():
            yield f"{where} differs"
    elif repr(one) != repr(other):
        yield f"{where}: {one!r:.60} against {other!r:.60}"


def read(path: Path) -> Any:
    """Content of a file of a run, whose bytes may differ where its meaning does not."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".pt", ".pth"):
        return torch.load(path, weights_only=False)
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        if isinstance(content.get("target_modules"), list):  # a set in PEFT
            content["target_modules"].sort()
        return content
    return path.read_text()


def compare_folders(folder: Path, reference: Path, names: tuple[str, ...]) -> list[str]:
    """Differences between the files `names` of two folders."""
    found: list[str] = []
    for name in names:
        present = [(parent / name).is_file() for parent in (folder, reference)]
        if present == [True, True]:
            try:
                content = read(folder / name)
            except Exception as error:  # whatever a half-written file gives
                found.append(f"{folder.name}/{name} cannot be read: {error}")
                continue
            found += differences(content, read(reference / name), f"{folder.name}/{name}")
        elif any(present):
            found.append(f"{folder.name}/{name} is only in one")
    return found


def compare_after_kill(place: Path, reference: Path) -> list[str]:
    """What a kill must not leave behind: a checkpoint, or a model, that is not that of the uninterrupted run."""
    found: list[str] = []
    for checkpoint in (place / "run").glob("checkpoint-*"):
        found += compare_folders(checkpoint, reference / "history" / checkpoint.name, CHECKPOINT)
    if (place / "run" / "adapter_config.json").exists():
        found += compare_folders(place / "run", reference / "run", EXPERT)
    return found


def compare_ends(place: Path, reference: Path) -> list[str]:
    """Differences between a run that was killed and resumed until it came to its end, and the reference."""
    found = compare_after_kill(place, reference)
    found += compare_folders(place / "run", reference / "run", EXPERT)
    found += compare_folders(place, reference, ("result.json",))
    names = [sorted(path.name for path in (parent / "run").glob("checkpoint-*")) for parent in (place, reference)]
    found += differences(*names, "checkpoints")
    if (place / "run" / "_saving").exists():
        found.append("_saving was left behind")
    return found
