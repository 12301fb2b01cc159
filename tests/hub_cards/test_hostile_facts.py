"""Facts of a stranger's expert.json are text on a card and nothing else: no Markdown, HTML, YAML, Jinja or Python."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from peft_svf.experts import ExpertEntry
from peft_svf.experts.errors import ExpertError
from peft_svf.hub_cards import (
    BankCardData,
    Confusion,
    ExpertCardData,
    render_bank_card,
    render_expert_card,
    write_expert_card,
)
from peft_svf.hub_cards.text import clean, inline, literal, paragraph


NASTY = [
    "a | b | c",
    "x\n\n# Heading\n\n---\nlicense: mit\n---\n",
    "```\nimport os\n```",
    "`code` **bold** _em_ ~~gone~~",
    "[click](javascript:alert(1)) ![p](http://evil/p.png) <http://evil>",
    "<script>alert(1)</script><img src=x onerror=1> <!-- --> &lt;b&gt; &#60;",
    "{{ 7 * 7 }} {% include 'x' %} {# c #}",
    "- item\n1. one\n> quote\n| - | - |\n+ plus",
    '"); import os; os.system("x") #',
    "\\",
    "a\\| b \\` \\(x\\) $$y$$ $z$",
    "\u202eevil\u2066 \x00\x1b[31m\ud800 \u2028 \x85",
    "!!python/object/apply:os.system ['x']",
    "- a: &anchor *alias",
    "---",
    "...",
    "# x",
    "1) x",
    "===",
    "x" * 5000,
]
TEXTS = ("label", "task", "reward", "baseline", "kl_estimator", "hardware", "license", "description", "method")
MORE = ("precision", "pipeline_tag", "parametrization", "base_revision", "adapted_modules", "fingerprint_id")


def hostile(nasty: str) -> dict[str, Any]:
    """An expert.json in which every text is `nasty`."""
    return {
        **dict.fromkeys((*TEXTS, *MORE), nasty),
        "name": nasty,
        "base_model": nasty,
        "versions": {nasty: nasty},
        "validation": {"metric": nasty, "best": nasty, "step": nasty, "prompts": nasty},
        "datasets": [nasty],
        "language": [nasty],
        "results": [
            {
                "task": nasty,
                "n": 10,
                "expert": 0.5,
                "base": 0.4,
                "notes": nasty,
                "benchmark": {"dataset": "a/b", "split": nasty, "config": nasty, "revision": nasty},
            },
            {"task": nasty, "n": 3, "expert": 1.0, "chosen_on": True},
        ],
        "origin": {
            "operation": nasty,
            "formula": nasty,
            "statement": nasty,
            "sources": [{"name": nasty, "repo_id": nasty, "revision": nasty, "weight": nasty, nasty: [nasty]}],
            "settings": {nasty: nasty},
        },
        nasty: nasty,
    }


def shape(tokens: list[Any]) -> list[tuple[str, str]]:
    """The structure of a document, without its texts."""
    return [(token.type, token.tag) for token in tokens]


@pytest.mark.parametrize("nasty", NASTY, ids=range(len(NASTY)))
def test_a_hostile_fact_changes_no_structure(
    nasty: str, read_card: Callable[[str], Any], parse_markdown: Callable[[str], list[Any]]
) -> None:
    harmless = render_expert_card(ExpertCardData.from_metadata(hostile("plain words")))
    text = render_expert_card(ExpertCardData.from_metadata(hostile(nasty)))
    card, expected = read_card(text), read_card(harmless)
    assert set(card.data) <= {*expected.data, "license_name"}
    assert card.data["tags"] == ["peft", "svf", "transformer2"] and card.data["pipeline_tag"] == "text-generation"
    assert "base_model" not in card.data and "datasets" not in card.data and card.data["license"] == "other"
    assert [len(row) for row in card.rows] == [len(row) for row in expected.rows]
    assert card.headings[1:] == expected.headings[1:] and len(card.code) == 3
    assert card.html == [] and card.links == expected.links
    for code in card.code:
        ast.parse(code)
    tokens = parse_markdown(text)
    assert shape(tokens) == shape(parse_markdown(harmless))
    inner = [child for token in tokens for child in token.children or []]
    assert {child.type for child in inner} <= {"text", "softbreak", "code_inline", "link_open", "link_close",
                                               "em_open", "em_close", "text_special"}  # fmt: skip
    assert {child.attrGet("href") for child in inner if child.type == "link_open"} == {
        "https://arxiv.org/abs/2501.06252"
    }
    assert sum(child.type == "em_open" for child in inner) == 1  # the title of the paper


def test_the_cards_tests_can_fail(parse_markdown: Callable[[str], list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the escaping, the same comparison finds the difference."""
    from peft_svf.hub_cards import expert_sections

    harmless = shape(parse_markdown(render_expert_card(ExpertCardData.from_metadata(hostile("plain words")))))
    monkeypatch.setattr(expert_sections, "inline", str)
    assert shape(parse_markdown(render_expert_card(ExpertCardData.from_metadata(hostile("a | b"))))) != harmless


@pytest.mark.parametrize("nasty", [text for text in NASTY if text.strip("-.= ")], ids=len)
def test_a_hostile_bank_changes_no_structure(
    nasty: str, read_card: Callable[[str], Any], parse_markdown: Callable[[str], list[Any]]
) -> None:
    def bank(text: str) -> str:
        facts = {"math": ExpertCardData.from_metadata(hostile(text))}
        confusion = Confusion((text,), (text, "others"), ((3, 1),), 0.75, (0.3, 0.9), text)
        return render_bank_card(
            BankCardData(
                text,
                {"math": ExpertEntry(text, text)},
                facts,
                None,
                text,
                text,
                text,
                text,
                False,
                confusion,
                text,
                text,
            )
        )

    card, expected = read_card(bank(nasty)), read_card(bank("plain words"))
    assert [len(row) for row in card.rows] == [len(row) for row in expected.rows]
    assert card.html == [] and card.links == expected.links and card.headings[1:] == expected.headings[1:]
    assert shape(parse_markdown(bank(nasty))) == shape(parse_markdown(bank("plain words")))


@pytest.mark.parametrize("nasty", NASTY, ids=range(len(NASTY)))
def test_what_is_escaped_reads_as_what_was_meant(nasty: str, parse_markdown: Callable[[str], list[Any]]) -> None:
    def shown(markdown: str) -> str:
        (block,) = [token for token in parse_markdown(markdown) if token.type == "inline"]
        return "".join(child.content for child in block.children)

    assert shown(f"cell: {inline(nasty)}") == f"cell: {clean(nasty)}"
    assert shown(paragraph(nasty)) == clean(nasty)
    assert ast.literal_eval(literal(nasty)) == clean(nasty)
    assert "\n" not in inline(nasty) and len(unescape(inline(nasty))) < 1500
    inline(nasty).encode("utf-8")


@pytest.mark.parametrize(
    ("fact", "value"),
    [
        ("name", 5),
        ("label", ["math"]),
        ("steps", "60"),
        ("steps", -1),
        ("steps", True),
        ("kl_coefficient", math.nan),
        ("learning_rate", math.inf),
        ("seeds", [0.5]),
        ("seeds", 3),
        ("results", {"task": "x"}),
        ("results", [{"task": "x", "n": "many", "expert": 0.5}]),
        ("results", [{"task": "x", "n": 3, "expert": 50}]),
        ("results", [{"task": "x", "n": 3, "expert": math.nan}]),
        ("results", [{"task": "x", "n": 3, "expert": 0.5, "gain_interval": [1]}]),
        ("results", [{"task": "x", "n": 3, "expert": 0.5, "benchmark": "gsm8k"}]),
        ("results", [{"task": "x", "n": 3, "base": 0.2}]),
        ("origin", "mixed"),
        ("origin", {"sources": "x"}),
        ("origin", {"formula": {}}),
        ("versions", {"torch": 2}),
        ("learning_curve", [{"step": "x"}]),
        ("validation", [1]),
        ("repo_id", "../../etc"),
    ],
)
def test_a_fact_of_the_wrong_kind_is_named_and_nothing_written(fact: str, value: Any, tmp_path: Path) -> None:
    tmp_path.joinpath("expert.json").write_text(json.dumps({"name": "x", fact: value}))
    with pytest.raises((ValueError, ExpertError), match=f"{fact}|is not finite"):
        write_expert_card(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["expert.json"]
