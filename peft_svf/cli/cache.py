"""`peft-svf cache`: what the singular bases on disk are and take, and how to be rid of them."""

from __future__ import annotations

from datetime import datetime

from peft_svf.cli.terminal import table
from peft_svf.spectrum.cache import (
    FOLDER_VARIABLE,
    SIZE_VARIABLE,
    CachedFile,
    cache_folder,
    cache_limit,
    clear_cache,
    list_cached_files,
)


def run_list() -> None:
    """Print one line for each cached basis, the last used first, then what they take together.

    Raises:
        ValueError: PEFT_SVF_CACHE_SIZE is not a size.
        OSError: The folder cannot be read.
    """
    folder = cache_folder()
    if folder is None:
        print_off()
        return
    limit = cache_limit()
    files = list_cached_files(folder)
    if files:
        rows = [("weight", "dtype", "size", "last used"), *(describe(file) for file in reversed(files))]
        print(table(rows, right=range(4)))
        total = f"{count_bases(len(files))}, {format_bytes(sum(file.size for file in files))}"
    else:
        total = "No singular bases are cached"
    print(f"{total} in {folder} ({FOLDER_VARIABLE}); limit {format_bytes(limit)} ({SIZE_VARIABLE})")


def run_clear() -> None:
    """Remove all cached bases and say how many there were; files of others in the folder stay.

    Raises:
        OSError: The folder cannot be read or a file cannot be removed.
    """
    folder = cache_folder()
    if folder is None:
        print_off()
        return
    number, size = clear_cache(folder)
    print(f"Removed {count_bases(number)}, {format_bytes(size)}, from {folder}")


def print_off() -> None:
    """For both commands: there is no folder to look at."""
    print(f"Caching is turned off by {FOLDER_VARIABLE}; set it to the folder that is meant, or unset it")


def describe(file: CachedFile) -> tuple[str, str, str, str]:
    """The cells of one file."""
    rows, columns = file.shape
    last_used = datetime.fromtimestamp(file.last_used).strftime("%Y-%m-%d %H:%M")
    return f"{rows}x{columns}", file.dtype, format_bytes(file.size), last_used


def count_bases(number: int) -> str:
    """`"1 singular basis"`, `"2 singular bases"`."""
    return f"{number} singular {'basis' if number == 1 else 'bases'}"


def format_bytes(size: int) -> str:
    """`"4.2 MB"`, in powers of 1000 as PEFT_SVF_CACHE_SIZE counts them."""
    value, units = float(size), ["bytes", "KB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:  # what would be printed as 1000.0
        value, units = value / 1000, units[1:]
    return f"{size} bytes" if units[0] == "bytes" else f"{value:.1f} {units[0]}"
