"""The examples that a mixture is searched on, and the guard that nothing is evaluated on them."""

from __future__ import annotations

import hashlib
import inspect
import json
import unicodedata
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow
from datasets import Dataset

from peft_svf.answering import Prompt, answer_text, image_column


ADAPTATION_FILE = "adaptation.json"  # beside the expert that a search has found
_SHOWN_ROWS = 10
# What TRL passes to every reward function besides the columns of the dataset
_TRL_KEYWORDS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")

Examples: TypeAlias = Dataset | Sequence[Mapping[str, Any]]


class AdaptationExamplesError(ValueError):
    """Rows to be evaluated are among the examples that the mixture was adapted on."""


def as_examples(examples: Examples, reward: Callable[..., Any]) -> Dataset:
    """
    The examples as a dataset, once it is known that they can be answered and judged.

    Args:
        examples (`Dataset` or `Sequence[dict]`): Rows with `prompt` and the columns that the reward needs.
        reward (`Callable`): A reward function in TRL's signature.

    Raises:
        ValueError: No examples, a missing column, an empty prompt, or one prompt twice; the message says which.
        TypeError: Neither a dataset nor a list of dicts.
    """
    if not isinstance(examples, Dataset):
        examples = _from_rows(examples)
    if len(examples) == 0:
        raise ValueError("There are no examples to adapt on: pass a few rows with `prompt` and the reward's columns.")
    name = getattr(reward, "__name__", "the reward")
    for column, reader in [("prompt", "adaptation"), *((column, name) for column in reward_columns(reward))]:
        if column not in examples.column_names:
            raise ValueError(f"The examples lack the column '{column}' that {reader} needs; they have "
                             f"{examples.column_names}.")  # fmt: skip
    for row, prompt in enumerate(examples["prompt"]):
        if not isinstance(prompt, str | list):
            raise TypeError(f"The prompt of example {row} is a text or a chat, not {type(prompt).__name__}.")
    if empty := [row for row, text in enumerate(map(_text, examples["prompt"])) if not text]:
        raise ValueError(f"The prompt of example {empty[0]} is empty: leave the row out, or write its prompt.")
    hashes = row_hashes(examples)
    for row, own in enumerate(hashes):
        if (first := hashes.index(own)) < row:
            raise ValueError(f"The examples {first} and {row} have the same prompt: leave one of them out.")
    return examples


def _from_rows(rows: Any) -> Dataset:
    if isinstance(rows, str | Mapping) or not isinstance(rows, Iterable):
        raise TypeError(f"Examples are a `datasets.Dataset` or a list of dicts, not {type(rows).__name__}.")
    rows = list(rows)
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"Example {i} is a dict with `prompt` and the reward's columns, not {type(row).__name__}.")
        if lacking := sorted(rows[0].keys() - row.keys()):
            raise ValueError(f"Example {i} lacks '{lacking[0]}', which example 0 has.")
    try:
        return Dataset.from_list([dict(row) for row in rows])
    except pyarrow.ArrowException as error:
        raise TypeError(
            f"A column of the examples holds values of different types ({error}); prompts are all texts, or all chats."
        ) from error


def reward_columns(reward: Callable[..., Any]) -> list[str]:
    """The dataset columns that a reward function in TRL's signature cannot do without."""
    try:
        parameters = inspect.signature(reward).parameters.values()
    except (TypeError, ValueError):  # a builtin, or an object that hides its signature
        return []
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [
        parameter.name
        for parameter in parameters
        if parameter.kind in named
        and parameter.default is inspect.Parameter.empty
        and parameter.name not in _TRL_KEYWORDS
    ]


def row_hashes(dataset: Dataset) -> list[str]:
    """[`prompt_hash`] of every row, with its images where there are any."""
    column = image_column(dataset.column_names)
    images = [None] * len(dataset) if column is None else dataset[column]
    return [prompt_hash(prompt, image) for prompt, image in zip(dataset["prompt"], images, strict=True)]


def prompt_hash(prompt: Prompt, images: Any = None) -> str:
    """
    SHA-256 of what a prompt asks, however it is written down.

    A text and a chat that says the same have the same hash: white space is normalized, and system messages, which
    instruct and do not ask, are left out. Where there are images, the question is about them, so they count too.

    Args:
        prompt (`str` or `list[dict]`): Text or chat.
        images (`PIL.Image.Image` or a list of them, *optional*): What the prompt is about.
    """
    digest = hashlib.sha256(_text(prompt).encode())
    for image in images if isinstance(images, list | tuple) else [] if images is None else [images]:
        digest.update(f"\0{image.mode} {image.size}".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()


def _text(prompt: Prompt) -> str:
    if not isinstance(prompt, str):
        asked = [message for message in prompt if message.get("role") != "system"]
        prompt = "\n\n".join(answer_text([message]) for message in asked or prompt)
    return " ".join(unicodedata.normalize("NFC", prompt).split())


def refuse_adaptation_examples(dataset: Dataset, hashes: Collection[str], adapted: str) -> None:
    """
    Raise if rows of `dataset` are among the examples that something was adapted on.

    Args:
        dataset (`Dataset`): Rows to be evaluated, with the column `prompt`.
        hashes (`Collection[str]`): [`prompt_hash`] of the examples.
        adapted (`str`): What was adapted, for the message.

    Raises:
        AdaptationExamplesError: Names the rows and the remedy.
    """
    known = set(hashes)
    rows = [row for row, own in enumerate(row_hashes(dataset) if known else []) if own in known]
    if not rows:
        return
    shown = ", ".join(map(str, rows[:_SHOWN_ROWS])) + (", ..." if len(rows) > _SHOWN_ROWS else "")
    raise AdaptationExamplesError(
        f"{adapted} was adapted on {len(rows)} of the {len(dataset)} rows to be evaluated ({shown}), so its score "
        "would be too good: evaluate on another split, or leave these rows out with `dataset.select`."
    )


def saved_hashes(expert: str | Path) -> list[str]:
    """
    The hashes of the examples that an expert was adapted on; none if it does not come from a few-shot search.

    Args:
        expert (`str` or `Path`): A folder that [`FewShotDispatcher.save_pretrained`] wrote, or an expert's Hub id.

    Raises:
        ValueError: The file that records them is damaged.
    """
    path = Path(expert) / ADAPTATION_FILE
    if not Path(expert).is_dir():
        found = _from_hub(str(expert))
        if found is None:
            return []
        path = found
    if not path.is_file():
        return []
    try:
        hashes = json.loads(path.read_text("utf-8"))["example_hashes"]
        return [str(own) for own in hashes]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not say which examples the expert was adapted on ({error!r}): save it again, or remove the "
            "file if the expert does not come from a few-shot search."
        ) from error


def _from_hub(repo_id: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        return Path(hf_hub_download(repo_id, ADAPTATION_FILE))
    except (EntryNotFoundError, HFValidationError):  # also if offline and not in the cache
        return None
