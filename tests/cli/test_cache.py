"""`peft-svf cache`: it shows and removes what the cache wrote, and nothing else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from peft_svf.cli import main
from peft_svf.cli.cache import format_bytes
from peft_svf.spectrum import cached_singular_basis, weight_sketch


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of this test, which does not exist yet."""
    monkeypatch.setenv("PEFT_SVF_CACHE", str(tmp_path / "bases"))
    monkeypatch.setenv("PEFT_SVF_CACHE_SIZE", "20GB")
    return tmp_path / "bases"


def fill(folder: Path) -> list[Path]:
    """Two bases, the first last used in 2001, the second in 2020."""
    paths: list[Path] = []
    for shape, dtype, year in (((300, 256), torch.float32, 2001), ((1100, 260), torch.bfloat16, 2020)):
        weight = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        cached_singular_basis(weight, weight_sketch(weight), dtype)
        (path,) = set(folder.iterdir()) - set(paths)
        seconds = time.mktime((year, 2, 3, 4, 5, 6, 0, 0, -1))
        os.utime(path, (seconds, seconds))
        paths.append(path)
    return paths


def test_list_shows_each_basis_the_last_used_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (path.stat().st_size for path in fill(folder))
    (folder / "thesis.txt").write_text("years of work")
    assert main(["cache", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["weight", "dtype", "size", "last", "used"],
        ["1100x260", "bfloat16", f"{second / 1000:.1f}", "KB", "2020-02-03", "04:05"],
        ["300x256", "float32", f"{first / 1000:.1f}", "KB", "2001-02-03", "04:05"],
    ]
    total = f"2 singular bases, {(first + second) / 1000:.1f} KB"
    assert lines[3:] == [f"{total} in {folder} (PEFT_SVF_CACHE); limit 20.0 GB (PEFT_SVF_CACHE_SIZE)"]


def test_list_of_nothing_says_so_and_makes_no_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "list"]) == 0
    assert capsys.readouterr().out.startswith(f"No singular bases are cached in {folder}")
    assert not folder.exists()


def test_clear_removes_our_files_and_leaves_foreign_ones(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = fill(folder)
    stem = paths[0].stem
    ours = [*paths, folder / f".{stem}.lock", folder / f".{stem}.{'0' * 32}.partial"]
    for path in ours[2:]:
        path.write_bytes(b"12345")
    foreign = [
        folder / name for name in ("thesis.txt", "model.safetensors", f"{stem}.bak", ".lock", "256x256.partial")
    ]
    for path in foreign:
        path.write_text("years of work")
    (
        folder / f"{'1' * 3}x{'1' * 3}-float32-{'0' * 16}.safetensors"
    ).mkdir()  # a folder of somebody's under such a name
    size = sum(path.stat().st_size for path in ours)
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out == f"Removed 2 singular bases, {size / 1000:.1f} KB, from {folder}\n"
    assert not any(path.exists() for path in ours)
    assert all(path.read_text() == "years of work" for path in foreign)
    assert len(list(folder.iterdir())) == len(foreign) + 1
    assert main(["cache", "clear"]) == 0
    assert capsys.readouterr().out == f"Removed 0 singular bases, 0 bytes, from {folder}\n"


@pytest.mark.parametrize("action", ["list", "clear"])
def test_cache_that_is_off_has_no_folder(
    action: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PEFT_SVF_CACHE", "off")
    assert main(["cache", action]) == 0
    assert "turned off by PEFT_SVF_CACHE" in capsys.readouterr().out


@pytest.mark.parametrize("action", ["list", "clear"])
def test_file_in_place_of_the_folder_is_named(action: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write_text("years of work")
    assert main(["cache", action]) == 1
    assert str(folder) in capsys.readouterr().err
    assert folder.read_text() == "years of work"


def test_wrong_size_limit_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PEFT_SVF_CACHE_SIZE", "plenty")
    assert main(["cache", "list"]) == 1
    assert capsys.readouterr().err.startswith("peft-svf cache: PEFT_SVF_CACHE_SIZE is 'plenty'")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["cache"], "the following arguments are required: ACTION"), (["cache", "shrink"], "invalid choice: 'shrink'")],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 KB"),
        (999_949, "999.9 KB"),
        (999_950, "1.0 MB"),
        (5e10, "50.0 GB"),
    ],
)
def test_sizes_are_readable(size: int, text: str) -> None:
    assert format_bytes(size) == text
