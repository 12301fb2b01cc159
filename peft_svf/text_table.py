"""Tables of plain text, in aligned columns."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = (), indent: str = "  ") -> str:
    """
    Rows of equal length in aligned columns.

    Args:
        rows (`Sequence[Sequence[str]]`): The cells.
        right (`Sequence[int]`, *optional*): Indices of the columns whose cells are aligned to the right.
        indent (`str`, *optional*, defaults to two spaces): Before every row.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)
