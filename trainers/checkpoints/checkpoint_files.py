"""Checkpoint folders on disk: which are complete, how one appears and disappears as a whole."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import struct
import zipfile
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError


logger = logging.getLogger(__name__)

STAGING = "_saving"  # "_": transformers never uploads such names, nor takes them for checkpoints
WEIGHTS = ("adapter_model.*", "model*.safetensors", "pytorch_model*", "global_step*")
OPTIMIZER = ("optimizer*", "global_step*", "rank*-of-*-optimizer.pt")
ENTRY_POINTS = ("adapter_config.json", "config.json")  # what `from_pretrained` looks for
JIT_SENTINEL = "checkpoint-is-incomplete.txt"  # transformers writes it with `enable_jit_checkpoint`


def checkpoints(run: Path) -> list[Path]:
    """Folders `checkpoint-<step>` in `run`, by step."""
    if not run.is_dir():
        return []
    found = [path for path in run.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


# -- complete or not -------------------------------------------------------------------------------------------------
def why_unusable(checkpoint: Path, with_optimizer: bool = True) -> str | None:
    """What keeps training from going on at `checkpoint`.

    Weights are not read: a file is judged by its type and length, so this takes milliseconds.

    Args:
        checkpoint (`Path`): The folder.
        with_optimizer (`bool`, *optional*, defaults to `True`): Whether optimizer, schedule and random state must be
            there, without which training goes on with other numbers.

    Returns:
        `str` or None: The reason, or None if the checkpoint is complete.
    """
    if not checkpoint.is_dir():
        return "there is no such folder"
    if (checkpoint / JIT_SENTINEL).exists():
        return f"it still has {JIT_SENTINEL}"
    for path in sorted(checkpoint.rglob("*")):
        damage = _damage(path) if path.is_file() else None
        if damage:
            return f"{path.relative_to(checkpoint)} {damage}"
    if not (checkpoint / "trainer_state.json").is_file():
        return "trainer_state.json is missing"
    if not _any(checkpoint, WEIGHTS):
        return "the weights are missing"
    if next(checkpoint.rglob("adapter_model.*"), None) and not next(checkpoint.rglob("adapter_config.json"), None):
        return "adapter_config.json is missing"
    if with_optimizer and not _any(checkpoint, OPTIMIZER):
        return "the optimizer state is missing (`save_only_model=True` leaves it out)"
    if with_optimizer and not _any(checkpoint, ("scheduler.pt", "global_step*")):
        return "scheduler.pt is missing"
    if with_optimizer and not _any(checkpoint, ("rng_state*.pth",)):
        return "rng_state.pth is missing"
    return None


def _any(folder: Path, patterns: Collection[str]) -> bool:
    return any(next(folder.rglob(pattern), None) is not None for pattern in patterns)


def _damage(path: Path) -> str | None:
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            return None if path.stat().st_size == _length_by_header(path) else "is truncated"
        elif path.suffix in (".pt", ".pth", ".bin"):  # `torch.save` writes archives, whose directory comes last
            return None if zipfile.is_zipfile(path) else "is truncated"
    except (ValueError, struct.error, AttributeError, TypeError, KeyError):
        return "is damaged"
    except OSError as error:
        return f"cannot be read ({error})"
    return None


def _length_by_header(path: Path) -> int:
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(min(length, path.stat().st_size)))  # a damaged length may be any number
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return int(8 + length + max(ends, default=0))


def newest_usable(run: Path, with_optimizer: bool = True) -> tuple[Path | None, dict[Path, str]]:
    """The complete checkpoint of the highest step, and what is wrong with each that lies above it."""
    skipped: dict[Path, str] = {}
    for checkpoint in reversed(checkpoints(run)):
        reason = why_unusable(checkpoint, with_optimizer)
        if reason is None:
            return checkpoint, skipped
        skipped[checkpoint] = reason
    return None, skipped


# -- appearing and disappearing as a whole ---------------------------------------------------------------------------
def sync(folder: Path) -> None:
    """Wait until everything under `folder` is on the disk, so that a power cut after a rename cannot empty files."""
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders, and needs no sync of them
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_folder(staged: Path, final: Path) -> None:
    """Make `staged` appear as `final` in one rename; a folder that is there already is replaced.

    Two renames cannot be one: `clean` puts the replaced folder back if the process dies between them.
    """
    replaced = staged.parent / f"replaced-{final.name}"
    if final.exists():
        os.rename(final, replaced)
    os.rename(staged, final)
    _sync_one(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def publish_model(staged: Path, final: Path) -> None:
    """Move the files of a saved model into `final`, which may hold other things.

    Each file is replaced in one rename, and the configuration, without which `from_pretrained` finds no model, comes
    last. If an older one differs it goes first: at no moment does one model's configuration lie beside another's
    weights.
    """
    files = sorted(path.relative_to(staged) for path in staged.rglob("*") if path.is_file())
    entries = [file for file in files if file.name in ENTRY_POINTS]
    for file in entries:
        if (final / file).exists() and (final / file).read_bytes() != (staged / file).read_bytes():
            os.unlink(final / file)
    for file in [*(file for file in files if file.name not in ENTRY_POINTS), *entries]:
        (final / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged / file, final / file)
    for folder in {final / file.parent for file in files}:
        _sync_one(folder)


def clean(run: Path) -> None:
    """Remove what a killed process left unfinished in `run`, and put back what it was about to replace."""
    staging = run / STAGING
    if not staging.is_dir():
        return
    for replaced in staging.glob("replaced-checkpoint-*"):
        original = run / replaced.name.removeprefix("replaced-")
        if not original.exists():
            with contextlib.suppress(FileNotFoundError):  # on a shared disk another node was quicker
                os.rename(replaced, original)
    shutil.rmtree(staging, ignore_errors=True)


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint so that no half of it is ever taken for one."""
    trash = checkpoint.parent / STAGING / f"deleted-{checkpoint.name}"
    trash.parent.mkdir(exist_ok=True)
    os.rename(checkpoint, trash)
    shutil.rmtree(trash, ignore_errors=True)


def rotate(run: Path, limit: int | None, protected: Collection[Path]) -> None:
    """Delete the oldest checkpoints of `run` until `limit` are left, but none of `protected`."""
    if not limit or limit < 0:
        return
    kept = {path.resolve() for path in protected}
    oldest_first = sorted(checkpoints(run), key=lambda path: (path.stat().st_mtime, _step(path)))
    candidates = [path for path in oldest_first if path.resolve() not in kept]
    for path in candidates[: max(0, len(oldest_first) - max(limit, len(kept)))]:
        try:
            delete(path)
        except OSError as error:
            logger.warning(f"The old checkpoint {path} could not be deleted: {error}")


# -- errors ----------------------------------------------------------------------------------------------------------
def is_storage_error(error: BaseException, folder: Path) -> bool:
    """Whether writing to `folder` failed, as opposed to what was to be written.

    A full disk is not always an OSError: `torch.save` raises RuntimeErrors of C++, the tokenizers a bare Exception.
    """
    words = ("inline_container.cc", "iostream error", "(os error ")
    failed = isinstance(error, (OSError, SafetensorError)) or any(word in str(error) for word in words)
    return isinstance(error, Exception) and (failed or is_full(folder))


def is_full(folder: Path) -> bool:
    """Whether the disk that holds `folder` has less than a few blocks left."""
    return free_bytes(folder) < 2**16


def free_bytes(folder: Path) -> int:
    """Space left on the disk that holds `folder`, which need not exist yet."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def last_written(folder: Path) -> str:
    """Name of the file under `folder` that was written last."""
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    newest = max(files, key=lambda path: path.stat().st_mtime_ns, default=None)
    return "its first file" if newest is None else str(newest.relative_to(folder))
