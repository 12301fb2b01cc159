"""Singular bases on disk, so that a second adapter on the same base model loads what the first one computed.

One safetensors file a matrix, `<out>x<in>-<dtype>-<hash of the sketch>.safetensors`, in one folder. Files appear whole
(written aside, then renamed), are verified when they are read, and the least recently used ones go when the folder
outgrows its limit. Nothing that happens to the folder ever stops a model from being adapted.

Environment variables, read at every call:
    PEFT_SVF_CACHE       the folder, `<HF_HOME>/peft_svf/singular_bases` if not set; "off" or "0" turns caching off
    PEFT_SVF_CACHE_SIZE  what the files may take together, e.g. "20GB" (default "50GB")
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from peft_svf.spectrum.basis import Side, SingularBasis, singular_basis
from peft_svf.spectrum.fingerprint import sketch_distance


FOLDER_VARIABLE = "PEFT_SVF_CACHE"
SIZE_VARIABLE = "PEFT_SVF_CACHE_SIZE"
DEFAULT_SIZE = "50GB"
OFF = ("off", "0", "no", "false")

SMALLEST_CACHED = 256  # below this rank a basis is computed in less than 10 ms, which is not worth a file
SAME_WEIGHT = 1e-12  # relative distance of two sketches; the order of summation alone makes about 1e-14
UNIT_LENGTH = 1e-2  # tolerance of the rows' lengths, which rounding to bfloat16 changes by at most 4e-3
LOCK_SECONDS = 600.0  # then a process that waits for another (stopped, perhaps) computes the basis itself
LEFTOVER_SECONDS = 3600.0  # age at which a temporary file or a lock is taken for one of a killed process

_FORMAT = "peft-svf singular basis 1"
_BASIS_FILE = re.compile(r"(\d+)x(\d+)-([a-z0-9_]+)-[0-9a-f]{16}\.safetensors")
_HELPER_FILE = re.compile(r"\.\d+x\d+-[a-z0-9_]+-[0-9a-f]{16}\.(lock|[0-9a-f]{32}\.partial)")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_unusable_folders: set[Path] = set()


@dataclass(frozen=True)
class CachedFile:
    """A file of the cache, as its name and its folder describe it; `shape` is the weight's (out, in)."""

    path: Path
    shape: tuple[int, int]
    dtype: str
    size: int
    last_used: float


class WrongFileError(ValueError):
    """A file of the cache does not hold what its name promises."""


def cached_singular_basis(weight: torch.Tensor, sketch: Sequence[float], dtype: torch.dtype) -> SingularBasis:
    """The singular basis of `weight`, read from the cache or else computed in float64 and stored there.

    Args:
        weight (`torch.Tensor`): Shape (out, in), any floating-point dtype, on any device.
        sketch (`Sequence[float]`): Its fingerprint, from [`weight_sketch`].
        dtype (`torch.dtype`): Of the vectors that are returned and stored.

    Returns:
        `SingularBasis`: `vectors` in `dtype` on the device of `weight`; `singular_values` in float64 (on the CPU if
        that device has no float64).

    Raises:
        ValueError: `weight` has no singular basis (see [`singular_basis`]), or PEFT_SVF_CACHE_SIZE is not a size.

    Warns:
        If a damaged file had to be replaced, and once a process if bases cannot be stored in the folder.
    """
    folder = cache_folder()
    if folder is None or not _is_worth_caching(weight, sketch):
        return _compute(weight, dtype)
    limit = cache_limit()
    path = folder / _file_name(sketch, dtype)
    basis = _look_up(path, weight, sketch, dtype, warn=False)
    if basis is None and folder in _unusable_folders:
        return _compute(weight, dtype)
    if basis is None:
        with _locked(path):
            # Another process may have stored it while this one waited.
            basis = _look_up(path, weight, sketch, dtype, warn=True)
            if basis is None:
                basis = _compute(weight, dtype)
                _store(path, basis, sketch, limit)
    return basis


def cache_folder() -> Path | None:
    """The folder of the cache, which need not exist yet; `None` if caching is turned off."""
    value = os.environ.get(FOLDER_VARIABLE, "").strip()
    if value.lower() in OFF:
        return None
    return Path(value).expanduser() if value else Path(constants.HF_HOME) / "peft_svf" / "singular_bases"


def cache_limit() -> int:
    """How many bytes the files may take together.

    Raises:
        ValueError: PEFT_SVF_CACHE_SIZE is not a size.
    """
    text = os.environ.get(SIZE_VARIABLE, "").strip() or DEFAULT_SIZE
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text, re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f"{SIZE_VARIABLE} is {text!r}; write a number and a unit, for example 20GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def list_cached_files(folder: Path) -> list[CachedFile]:
    """The bases in `folder`, the least recently used first; other files are left out.

    Raises:
        OSError: `folder` cannot be read. A folder that does not exist is empty.
    """
    found = []
    for path, status in _our_files(folder, _BASIS_FILE):
        rows, columns, dtype = _BASIS_FILE.fullmatch(path.name).groups()  # type: ignore[union-attr]
        found.append(CachedFile(path, (int(rows), int(columns)), dtype, status.st_size, status.st_mtime))
    return sorted(found, key=lambda file: file.last_used)


def clear_cache(folder: Path) -> tuple[int, int]:
    """Remove all bases from `folder`, with the locks and temporary files of killed processes; nothing else.

    Returns:
        `tuple[int, int]`: How many bases were removed, and the bytes of all removed files.

    Raises:
        OSError: `folder` cannot be read or a file cannot be removed.
    """
    bases = _our_files(folder, _BASIS_FILE)
    removed = [*bases, *_our_files(folder, _HELPER_FILE)]
    for path, _ in removed:
        path.unlink(missing_ok=True)
    return len(bases), sum(status.st_size for _, status in removed)


def _is_worth_caching(weight: torch.Tensor, sketch: Sequence[float]) -> bool:
    if weight.dim() != 2 or min(weight.shape) < SMALLEST_CACHED or not weight.is_floating_point():
        return False
    if list(sketch[:2]) != list(weight.shape):
        raise ValueError(f"the sketch is that of another weight: it says {sketch[:2]}, not {tuple(weight.shape)}")
    return all(map(math.isfinite, sketch)) and sketch[2] > 0  # otherwise the computation says what is wrong


def _file_name(sketch: Sequence[float], dtype: torch.dtype) -> str:
    rows, columns, norm, *projections = sketch
    # Rounded, because another device sums in another order. A value at the edge of a step is found under one name or
    # the other; at worst the same basis is computed and stored twice.
    rounded = [f"{norm:.8e}", *(str(round(value / norm * 1e8)) for value in projections)]
    digest = hashlib.sha256(json.dumps([_FORMAT, *rounded]).encode()).hexdigest()[:16]
    return f"{rows:.0f}x{columns:.0f}-{_dtype_name(dtype)}-{digest}.safetensors"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _compute(weight: torch.Tensor, dtype: torch.dtype) -> SingularBasis:
    basis = singular_basis(weight)
    return SingularBasis(basis.side, basis.vectors.to(dtype).to(weight.device), basis.singular_values)


def _look_up(
    path: Path, weight: torch.Tensor, sketch: Sequence[float], dtype: torch.dtype, warn: bool
) -> SingularBasis | None:
    """The basis in the file `path` if it is there, whole, and that of `weight`."""
    try:
        basis = _read(path, weight, sketch, dtype)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        if warn:
            warnings.warn(f"the cached singular basis {path} is damaged ({error}); it is computed again")
        return None
    if basis is not None:
        with suppress(OSError):  # a folder that others filled may be read-only
            os.utime(path)
    return basis


def _read(path: Path, weight: torch.Tensor, sketch: Sequence[float], dtype: torch.dtype) -> SingularBasis | None:
    """Raises one of many errors if the file is damaged; `None` if it is whole and belongs to another weight."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if not sketch_distance(json.loads(metadata["sketch"]), sketch) <= SAME_WEIGHT:
            return None
        # Copies: pages of a mapped file are lost, and the process with them, when another host deletes it (NFS).
        vectors = file.get_tensor("vectors").to(weight.device, copy=True)
        singular_values = file.get_tensor("singular_values").clone()
    side: Side = "input" if weight.shape[1] <= weight.shape[0] else "output"
    if metadata["side"] != side:
        raise WrongFileError(f"its side is {metadata['side']}")
    _check_numbers(vectors, singular_values, min(weight.shape), dtype)
    if weight.device.type != "mps":  # no float64 there
        singular_values = singular_values.to(weight.device)
    return SingularBasis(side, vectors, singular_values)


def _check_numbers(vectors: torch.Tensor, singular_values: torch.Tensor, rank: int, dtype: torch.dtype) -> None:
    if vectors.shape != (rank, rank) or singular_values.shape != (rank,):
        raise WrongFileError(f"its shapes are {tuple(vectors.shape)} and {tuple(singular_values.shape)}")
    if vectors.dtype != dtype or singular_values.dtype != torch.float64:
        raise WrongFileError(f"its dtypes are {vectors.dtype} and {singular_values.dtype}")
    if not (singular_values.isfinite().all() and (singular_values >= 0).all() and (singular_values.diff() <= 0).all()):
        raise WrongFileError("its singular values are not finite and descending")
    # The rows of an orthonormal matrix have length 1. Ten times faster than `isfinite` on the CPU, and it sees the
    # blocks of zeros that a crash of the machine leaves in a file.
    lengths = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.promote_types(dtype, torch.float32))
    if not ((lengths - 1).abs() < UNIT_LENGTH).all():  # also so for NaN
        raise WrongFileError("its vectors are not orthonormal")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of one file of the cache; goes on without it where it cannot be had.

    Without the lock two processes may do the same work, no more: files are replaced atomically.
    """
    lock_path = path.with_name(f".{path.stem}.lock")
    lock = FileLock(lock_path, timeout=LOCK_SECONDS)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        pass
    except OSError as error:
        _give_up(path.parent, error)
    try:
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # filelock leaves the file; whoever still waits for it sees that it is gone
                lock_path.unlink()
            lock.release()


def _store(path: Path, basis: SingularBasis, sketch: Sequence[float], limit: int) -> None:
    if path.parent in _unusable_folders:
        return
    tensors = {"vectors": basis.vectors.cpu(), "singular_values": basis.singular_values.cpu()}
    data = save(tensors, {"format": _FORMAT, "side": basis.side, "sketch": json.dumps(list(sketch))})
    if len(data) > limit:
        return
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.partial")
    try:
        # Not `save_file`, whose files nobody else may read: the cache of a group is in one folder.
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError as error:
        _give_up(path.parent, error)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    with suppress(OSError):
        _evict(path, limit)


def _evict(newest: Path, limit: int) -> None:
    """Remove what killed processes left and then, until `limit` is kept, the files not used for the longest time."""
    for path, status in _our_files(newest.parent, _HELPER_FILE):
        if time.time() - status.st_mtime > LEFTOVER_SECONDS:
            path.unlink(missing_ok=True)
    files = list_cached_files(newest.parent)
    excess = sum(file.size for file in files) - limit
    for file in files:
        if excess <= 0:
            break
        if file.path != newest:
            file.path.unlink(missing_ok=True)
            excess -= file.size


def _our_files(folder: Path, name: re.Pattern[str]) -> list[tuple[Path, os.stat_result]]:
    found = []
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            # Between the listing and the look at a file, another process may have removed it.
            with suppress(FileNotFoundError):
                if name.fullmatch(entry.name) and entry.is_file():
                    found.append((Path(entry.path), entry.stat()))
    return found


def _give_up(folder: Path, error: OSError) -> None:
    """Store nothing more in `folder` in this process, and say so once."""
    if folder not in _unusable_folders:
        _unusable_folders.add(folder)
        warnings.warn(
            f"singular bases cannot be stored in {folder} ({error}), so they are computed again next time; set "
            f"{FOLDER_VARIABLE} to a writable folder with free space, or to off"
        )
