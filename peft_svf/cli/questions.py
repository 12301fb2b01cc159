"""Prompts that a command is asked about: from the command line, a file or standard input."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from peft_svf.dispatch.route import Prompt, user_text
from peft_svf.trainers.tasks.files import is_data_file, read_rows


TEXT = ".txt"
PROMPT_COLUMNS = ("prompt", "text", "messages")


@dataclass(frozen=True)
class Question:
    """
    One prompt.

    Args:
        prompt (`str` or `list[dict]`): A text, or a chat that ends with what the user asks.
        expert (`str` or `dict[str, float]`, *optional*): The expert or the mixture that a row of a file asks for.
        label (`str`, *optional*): The label that a row of a file gives it.
    """

    prompt: Prompt
    expert: str | dict[str, float] | None = None
    label: str | None = None

    @property
    def text(self) -> str:
        """What the user asks."""
        return user_text(self.prompt)


def read_questions(prompts: Sequence[str], file: Path | None) -> list[Question]:
    """
    The prompts of the command line, of a file, or else of standard input, which is one prompt as a whole.

    A file that ends in .txt has a prompt on every line that is not empty. In one with rows (.jsonl, .csv, ...) a row
    has the prompt in a column `prompt` (or `text`, or `messages`), and may have the columns `expert` and `label`.

    Raises:
        ValueError: If there are no prompts, or both prompts and a file, or a row is not as it should be.
        OSError: If the file cannot be read.
    """
    if prompts and file is not None:
        raise ValueError("the prompts come from the command line or from --file, not from both")
    if file is not None:
        questions = _of_text(file) if file.suffix.lower() == TEXT else _of_rows(file)
        if not questions:
            raise ValueError(f"{file} has no prompts in it")
        return questions
    texts = list(prompts) or [_standard_input()]
    if empty := [i for i, text in enumerate(texts, 1) if not text.strip()]:
        raise ValueError(f"prompt {empty[0]} is empty: pass a text with at least one visible character")
    return [Question(text) for text in texts]


def _standard_input() -> str:
    if PartialState().num_processes > 1:
        raise ValueError("several processes cannot share standard input: pass the prompts with --file")
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("there is no prompt: pass PROMPT ..., --file FILE, or a text on standard input")
    try:
        text = sys.stdin.read().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not text in UTF-8 ({error})") from error
    if not text:
        raise ValueError("there is no prompt: standard input is empty; pass PROMPT ... or --file FILE")
    return text


def _of_text(file: Path) -> list[Question]:
    try:
        lines = file.read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8 ({error}): save it as UTF-8") from error
    return [Question(line) for line in lines if line.strip()]


def _of_rows(file: Path) -> list[Question]:
    if not is_data_file(file):
        raise ValueError(f"--file {file}: the name must end in .txt (a prompt on every line), .jsonl or .csv")
    return [_question(row, f"row {i} of {file}") for i, row in enumerate(read_rows(file), 1)]


def _question(row: dict[str, Any], where: str) -> Question:
    column = next((name for name in PROMPT_COLUMNS if name in row), None)
    if column is None:
        raise ValueError(f"{where} has no column `prompt`, only {', '.join(row)}: add or rename the column")
    prompt = row[column]
    is_chat = isinstance(prompt, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and message.get("content")
        for message in prompt
    )
    if not (is_chat and prompt) and not (isinstance(prompt, str) and prompt.strip()):
        raise ValueError(
            f"`{column}` in {where} must be a text that is not empty, or a list of messages with `role` and `content`"
        )
    expert = row.get("expert")
    return Question(
        prompt, expert if isinstance(expert, dict) else _word(row, "expert", where), _word(row, "label", where)
    )


def _word(row: dict[str, Any], column: str, where: str) -> str | None:
    value = row.get(column)
    if value is None or value == "":
        return None
    if not isinstance(value, str):
        raise ValueError(f"`{column}` in {where} is {value!r}: it must be a text")
    return value.strip()
