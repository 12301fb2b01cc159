"""The files of a card in its folder: each appears as a whole, README.md last, and after an error none has changed."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft_svf.experts.files import make_readable


CARD = "README.md"  # PEFT rewrites the metadata of one that it finds whenever it saves: it is written last
LEVERS, LEARNING_CURVE, CONFUSION = "levers.png", "learning_curve.png", "confusion_matrix.png"
EVAL_RESULTS = ".eval_results"


@contextmanager
def card_files(folder: Path) -> Iterator[Path]:
    """Yield an empty folder within `folder`; what it holds when the block ends is moved up. A path may lie deeper."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}: save it there first, then write its card")
    staging = folder / f".card-{uuid.uuid4().hex}"
    staging.mkdir()
    try:
        yield staging
        make_readable(staging)
        files = sorted(path.relative_to(staging) for path in staging.rglob("*") if path.is_file())
        for file in sorted(files, key=lambda file: file.name == CARD):
            (folder / file).parent.mkdir(exist_ok=True)
            os.replace(staging / file, folder / file)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
