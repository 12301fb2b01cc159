"""Reading a card back without our own code: metadata by huggingface_hub, Markdown by an independent parser."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from huggingface_hub import ModelCard


class ReadCard:
    """What a reader sees: metadata, headings, cells of tables, links, pictures, code, and raw HTML, if any."""

    def __init__(self, text: str) -> None:
        self.data = ModelCard(text).data.to_dict()
        self.text = str(ModelCard(text).text)
        self.code = re.findall(r"^```python\n(.*?)^```$", self.text, flags=re.DOTALL | re.MULTILINE)
        prose = re.sub(r"^```.*?^```$", "", self.text, flags=re.DOTALL | re.MULTILINE)
        self.headings = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
        self.rows = [
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in prose.splitlines()
            if line.startswith("|")
        ]
        self.links = re.findall(r"(?<!\\)\]\(([^)]*)\)", prose)
        self.html = re.findall(r"<[/!?A-Za-z][^>]*>", prose)

    def cell(self, name: str) -> str:
        """The second cell of the row that begins with `name`."""
        return next(row[1] for row in self.rows if row[0] == name)


@pytest.fixture(scope="session")
def read_card() -> Callable[[str], ReadCard]:
    return ReadCard


@pytest.fixture(scope="session")
def parse_markdown() -> Callable[[str], list[Any]]:
    """Tokens of a parser of CommonMark with tables."""
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark").enable("table")
    return lambda text: list(parser.parse(str(ModelCard(text).text)))
