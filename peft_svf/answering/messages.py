"""Prompts and completions as texts or as messages, and the column of images that prompts may be about."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias


Messages: TypeAlias = list[dict[str, str]]
Prompt: TypeAlias = str | Messages

IMAGE_COLUMNS = ("image", "images")  # TRL's names


def image_column(columns: Collection[str]) -> str | None:
    """The column with the image, or the images, of each prompt; `None` if there is none."""
    return next((name for name in IMAGE_COLUMNS if name in columns), None)


def answer_text(completion: str | Messages | Any) -> str:
    """Text of one completion, conversational (`[{"role": "assistant", "content": ...}]`) or plain.

    A conversation without a last message, or with one that holds no text, is an empty answer.
    """
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else None
    if isinstance(content, list):  # parts of a multimodal message
        return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def plain_prompt(messages: Sequence[Mapping[str, Any]]) -> str:
    """A chat as a text, for models without a chat template: what the messages say, empty lines between them.

    Ends with a line break, behind which the model goes on.
    """
    return "\n\n".join(answer_text([dict(message)]).strip() for message in messages) + "\n"
