"""The templates of the cards: Jinja, whose values are Markdown that was made harmless before."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCardData

from peft_svf.hub_cards.metadata import check_survives


_TEMPLATES = Path(__file__).parent / "templates"


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES, encoding="utf-8"),
        undefined=jinja2.StrictUndefined,  # a missing value is a fault of ours, never an empty place on a card
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render_card(template: str, metadata: ModelCardData, name: str, **values: Any) -> str:
    """
    The text of a card, metadata first.

    Args:
        template (`str`): File among the templates.
        metadata (`ModelCardData`): Its front matter.
        name (`str`): Of the expert or bank, for errors.
        values: For the template; texts are Markdown already.

    Raises:
        ValueError: `huggingface_hub` would read other metadata from the card.
    """
    text = _environment().get_template(template).render(card_data=metadata.to_yaml(), **values)
    check_survives(text, metadata, name)
    return text
