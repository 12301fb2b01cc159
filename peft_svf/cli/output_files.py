"""Whether a file that a command is to write can be written, asked before any work is done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def check_output_file(path: Path, option: str, endings: Sequence[str] = ()) -> None:
    """
    Raise unless `path` can be written as a file.

    Args:
        path (`Path`): The file; missing folders above it are made when it is written.
        option (`str`): The option that names it, for errors.
        endings (`Sequence[str]`, *optional*): What its name may end in; anything if empty.

    Raises:
        ValueError: If it is a folder, lies where nothing can be written, or has another ending.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: {option} takes the name of a file")
    if endings and path.suffix.lower() not in endings:
        raise ValueError(f"{option} {path}: the name must end in {', '.join(sorted(endings))}")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{option} {path} cannot be written: {parent} is no folder to write to")
