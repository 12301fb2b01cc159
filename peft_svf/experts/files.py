"""Files and folders written as a whole: made beside their place, then renamed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file beside `path` that then takes its place, so that `path` is never half written.

    One process at a time may do so; what a killed one leaves, `.partial-<name>`, the next overwrites.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """
    Yield an empty sibling of `target` that takes its place when the block ends; on an exception nothing changes.

    Args:
        target (`Path`): absolute path; an existing folder is replaced, and put back if the rename fails.
    """
    target = target.resolve()  # of a link, what it leads to is replaced
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    staging.mkdir()
    try:
        yield staging
        if target.exists():
            previous = target.parent / f".{target.name}.{uuid.uuid4().hex}"
            target.rename(previous)
            try:
                staging.rename(target)
            except OSError:
                previous.rename(target)
                raise
            shutil.rmtree(previous)
        else:
            staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def make_readable(folder: Path) -> None:
    """Let other users read every file under `folder`: safetensors 0.8 writes files of mode 0600."""
    for path in folder.rglob("*"):
        path.chmod(path.stat().st_mode | (0o755 if path.is_dir() else 0o644))
