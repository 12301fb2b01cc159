"""The tests of the installed PEFT: its source distribution from the package index holds them, the wheel does not."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath


class DownloadError(Exception):
    """The package index could not be reached, or does not have this version."""


def fetch_peft_tests(folder: Path) -> Path:
    """Download the source distribution of the installed PEFT version, once, and unpack its tests.

    Args:
        folder (`Path`): Where to keep the result.

    Returns:
        `Path`: A folder that holds PEFT's `tests` as a package.

    Raises:
        DownloadError: pip could not download it; the message is pip's.
        FileNotFoundError: The source distribution of this version has no tests.
    """
    version = importlib.metadata.version("peft")
    target = folder / f"peft-{version}"
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder))
    try:
        archive = _download(version, unfinished)
        count = _unpack_tests(archive, unfinished)
        if count == 0:
            raise FileNotFoundError(f"{archive.name} holds no tests: take the tests from the tag v{version} of PEFT")
        archive.unlink()
        os.replace(unfinished, target)
    except OSError:
        if not target.is_dir():  # else another process was faster: its result is as good
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def _download(version: str, folder: Path) -> Path:
    # pip checks the archive against the index's hash. `--no-binary peft` and not `:all:`, or pip would also build the
    # build tools from source.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "peft", "--dest", str(folder), f"peft=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    archives = list(folder.glob("peft-*.tar.gz"))
    if done.returncode != 0 or len(archives) != 1:
        raise DownloadError(f"no source distribution of peft {version}\n{done.stderr.strip()}")
    return archives[0]


def _unpack_tests(archive: Path, folder: Path) -> int:
    """Write the `.py` files of `peft-<version>/tests` below `folder`; nothing else of an archive is ever written."""
    tests = folder / "tests"
    tests.mkdir()
    (tests / "__init__.py").touch()  # in PEFT's repository, but not in its source distribution
    count = 0
    with tarfile.open(archive) as files:
        for member in files:
            parts = PurePosixPath(member.name).parts
            content = files.extractfile(member) if member.isfile() else None
            if content is None or len(parts) != 3 or parts[1] != "tests" or not parts[2].endswith(".py"):
                continue
            (tests / parts[2]).write_bytes(content.read())
            count += 1
    return count
