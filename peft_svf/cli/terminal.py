"""Text of models and of files on a terminal: shown, never obeyed."""

from __future__ import annotations

import sys
import unicodedata

from peft_svf.text_table import table


__all__ = ["indented", "one_line", "table", "visible", "with_interval"]

KEPT = "\n\t"
REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(text: str) -> str:
    r"""
    The text with everything that a terminal would act on, or that would reorder what is shown, written as an escape.

    An answer that sets the window's title, clears the screen or overwrites the line above is printed as `\x1b[2J`, not
    carried out. Line breaks and tabs stay. So do characters that the terminal's encoding has; others are escaped.
    """
    text = text.replace("\r\n", "\n")
    shown = "".join(_escaped(character) if _acts(character) else character for character in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def indented(who: str, text: str, width: int = 16) -> str:
    """A text beside its author, its further lines under its first."""
    margin = f"{visible(who):{width}}"
    return margin + visible(text).strip().replace("\n", "\n" + " " * len(margin))


def one_line(text: str, width: int = 60) -> str:
    """The beginning of a text, without line breaks, for a cell of a table."""
    line = visible(" ".join(text.split()))
    return line if len(line) <= width else line[: width - 1] + "…"


def with_interval(share: float, low: float, high: float) -> str:
    """`"47.3 % [41.7, 53.0]"`, of shares in [0, 1]."""
    return f"{100 * share:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def _acts(character: str) -> bool:
    if character in KEPT:
        return False
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in REORDERING


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
