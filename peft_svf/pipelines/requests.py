"""Request: one prompt of a pipeline's call, and the expert or the mixture that it is pinned to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.utils.data import Dataset
from transformers.utils.chat_template_utils import Chat

from peft_svf.dispatch.route import Route
from peft_svf.dispatch.simple import checked_mixture
from peft_svf.experts.bank import BASE_LABEL, ExpertBank


Pinned: TypeAlias = str | Mapping[str, float]  # an expert, "others" for the base model, or a mixture by expert


@dataclass(frozen=True)
class Request:
    """
    What the first pass needs to know of a row.

    Args:
        prompt (`Any`): what is answered.
        pinned (`str` or `Mapping[str, float]`, *optional*): no dispatcher is asked about this row.
    """

    prompt: Any
    pinned: Pinned | None


def check_pinned(bank: ExpertBank, pinned: Any) -> Pinned:
    """
    Return what `expert=` says if `bank` can do it.

    Raises:
        ValueError: an unknown expert, a mixture of nothing, a weight that is not finite.
        TypeError: neither a name nor a mapping.
    """
    if isinstance(pinned, str):
        return bank.check_expert(pinned)
    if not isinstance(pinned, Mapping):
        raise TypeError(
            "expert= pins all prompts of a call to one name or one mixture such as {'math': 0.7, 'code': 0.3}, not to "
            f"a {type(pinned).__name__}; to pin single prompts pass [{{'text': ..., 'expert': ...}}, ...]."
        )
    if not pinned:
        raise ValueError(f"The mixture is empty; name at least one expert, or '{BASE_LABEL}' for the base model.")
    return checked_mixture(bank, pinned)


def pinned_route(bank: ExpertBank, pinned: Sequence[Pinned], like: Route | None) -> Route:
    """
    The route of rows that are pinned.

    Args:
        bank (`ExpertBank`): the experts.
        pinned (`Sequence[str | Mapping[str, float]]`): B of them.
        like (`Route`, *optional*): a route of other rows in the same batch, whose groups and convention it takes over.

    Raises:
        ValueError: weights that do not sum to 1, for which the convention of `like` would mean something else.
    """
    experts = tuple(bank.experts)
    weights = torch.zeros(len(pinned), len(experts))  # (B, K)
    for row, choice in enumerate(pinned):
        mixture = {choice: 1.0} if isinstance(choice, str) else choice
        for name, weight in mixture.items():
            if name != BASE_LABEL:
                weights[row, experts.index(name)] = weight
    if like is None:
        return Route(weights, experts)
    if not like.residual and not torch.allclose(weights.sum(-1), torch.ones(len(pinned))):
        raise ValueError(
            "Prompts pinned to weights that do not sum to 1 (the base model among them) cannot share a batch with a "
            "route of residual=False; pass batch_size=1, or answer them in a call of their own."
        )
    if like.groups:
        weights = weights[:, None].expand(-1, len(like.groups), -1)
    return Route(weights, experts, groups=like.groups, residual=like.residual)


def check_prompt(prompt: Any) -> str | Chat:
    """
    Return `prompt` as text or `Chat`.

    Raises:
        ValueError: an empty text, an empty chat, an empty last user message, a text that no encoding can write.
        TypeError: neither text nor chat.
    """
    if isinstance(prompt, list | tuple):
        prompt = Chat(prompt)  # type: ignore[arg-type]
    if isinstance(prompt, Chat):
        if not prompt.messages:
            raise ValueError("The chat is empty; give it at least one message with 'role' and 'content'.")
        role, content = prompt.messages[-1]["role"], prompt.messages[-1]["content"]
        empty = not content.strip() if isinstance(content, str) else not content  # a list of typed parts
        if role == "user" and empty:
            raise ValueError("The last message of the chat is empty; write the user's request into its 'content'.")
        return prompt
    if not isinstance(prompt, str):
        raise TypeError(f"A prompt is a text or a chat (a list of messages), not {type(prompt).__name__}.")
    if not prompt.strip():
        raise ValueError("The prompt is empty; pass a text with at least one visible character.")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:  # tokenizers call it a wrong type
        character = prompt[error.start]
        raise ValueError(
            f"The prompt is no valid text: character {error.start} is {character!r}, half of a pair. Read the text in "
            "its own encoding, or with errors='replace'."
        ) from error
    return prompt


def check_inputs(inputs: Any) -> Any:
    """
    Return what a pipeline was called with in a form that transformers knows.

    A dataset of the library datasets becomes a generator of its rows, a tuple a list.

    Raises:
        ValueError: no prompts, or a dataset without a column of prompts.
        TypeError: a column of a dataset.
    """
    if isinstance(inputs, list | tuple) and not inputs:
        raise ValueError("There is nothing to answer: the list of prompts (or the chat) is empty.")
    if isinstance(inputs, tuple):
        return list(inputs)
    if type(inputs).__module__.partition(".")[0] != "datasets" or isinstance(inputs, Dataset):
        return inputs
    columns = getattr(inputs, "column_names", None)
    if not isinstance(columns, list):
        raise TypeError(
            f"A {type(inputs).__name__} of the library datasets is no list; pass list(column), or "
            "transformers.pipelines.pt_utils.KeyDataset(dataset, 'column') to have it answered lazily."
        )
    if not {"text", "messages"} & set(columns):
        raise ValueError(
            f"The dataset has the columns {columns}, but a prompt is in 'text' or 'messages' (and its expert in "
            "'expert'); rename the column, or pass KeyDataset(dataset, 'column')."
        )
    return (row for row in inputs)
