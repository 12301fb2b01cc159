"""Text of strangers made harmless: facts of an expert.json inside Markdown, links and Python code."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any


NOT_RECORDED = "not recorded"
MOST_CHARACTERS = 600  # of one value; a card is for people
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\\": "&#92;", "$": "&#36;"}  # also where HTML or TeX is read
_MARKS = re.compile(r"([`*\[\]|~]|(?<![^\W_])_|_(?![^\W_]))")  # an underscore within a word marks nothing
_BEGINNING = re.compile(r"\A(?=[#+=:-])|(?<=\d)(?=[.)]\Z)")  # of a line: what makes a heading, a rule, a list of it
_DIRECTIONS = {*map(chr, (0x61C, 0x200E, 0x200F)), *map(chr, range(0x202A, 0x202F)), *map(chr, range(0x2066, 0x206A))}


def clean(value: Any, most: int = MOST_CHARACTERS) -> str:
    """
    One line of text that can be encoded and shows what it says.

    White space of all kinds becomes single spaces; control characters, marks of writing direction (which let text
    look like other text) and lone surrogates go; what is longer than `most` characters is cut.
    """
    line = " ".join(str(value).split())
    kept = "".join(c for c in line if unicodedata.category(c) not in ("Cc", "Cs", "Co") and c not in _DIRECTIONS)
    return kept if len(kept) <= most else kept[: most - 1] + "…"


def inline(value: Any) -> str:
    """
    A value within a line of Markdown, a table cell included: all of it is text. "not recorded" if there is none.

    What HTML and TeX give a meaning becomes an entity, what Markdown does gets a backslash.
    """
    text = "".join(_ENTITIES.get(character, character) for character in plain(value))
    return _MARKS.sub(r"\\\1", text) or NOT_RECORDED


def paragraph(value: Any) -> str:
    """A value that begins a line of Markdown: as [`inline`], and no heading, list, rule or table begins with it."""
    first, space, rest = inline(value).partition(" ")
    return _BEGINNING.sub(r"\\", first, count=1) + space + rest


def plain(value: Any) -> str:
    """A value as one line, not escaped: lists with commas, mappings as "name value", numbers as people write them."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, Mapping):
        return clean(", ".join(f"{name} {plain(item)}" for name, item in value.items()))
    if isinstance(value, Iterable) and not isinstance(value, str):
        return clean(", ".join(map(plain, value)))
    return clean(value)


def literal(value: Any) -> str:
    """A text as a string of Python code in a fenced block."""
    return json.dumps(clean(value), ensure_ascii=False).replace("`", "\\u0060")


def cell_rows(facts: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Rows of a table of facts whose values are Markdown already."""
    return [(name, value or NOT_RECORDED) for name, value in facts]
