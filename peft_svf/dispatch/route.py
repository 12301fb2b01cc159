"""Route: which experts answer each row of a batch, and the Dispatcher protocol that decides it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

from peft_svf.experts.bank import BASE_LABEL


Prompt: TypeAlias = str | Sequence[Mapping[str, Any]]  # plain text, or a chat: messages with "role" and "content"


@dataclass(frozen=True)
class Route:
    """
    Mixture weights over the experts of a bank for each row of a batch.

    Args:
        weights (`torch.Tensor` of shape `(B, K)`, float):
            A one-hot row is a chosen expert, a row of zeros the base model, any other row a mixture.
        experts (`tuple[str, ...]`): the K expert names, the columns of `weights`.
        scores (`tuple[dict[str, float] | None, ...]`):
            Per row, label to probability (with the base label); `None` for a row that nothing was asked about.

    Raises:
        ValueError: shapes that do not fit, or weights that are not finite.
    """

    weights: torch.Tensor
    experts: tuple[str, ...]
    scores: tuple[dict[str, float] | None, ...]

    def __post_init__(self) -> None:
        expected = (len(self.scores), len(self.experts))
        if tuple(self.weights.shape) != expected:
            raise ValueError(
                f"Route: weights have shape {tuple(self.weights.shape)}, expected (rows, experts) {expected}."
            )
        if not torch.isfinite(self.weights).all():
            raise ValueError("Route: weights must be finite.")

    def __len__(self) -> int:
        return len(self.scores)

    @classmethod
    def one_hot(
        cls,
        chosen: Sequence[str],
        experts: Sequence[str],
        scores: Sequence[dict[str, float] | None] | None = None,
    ) -> Route:
        """
        The route that gives row b the expert `chosen[b]`, or the base model for `"others"`.

        Raises:
            ValueError: a chosen name that is neither in `experts` nor the base label.
        """
        weights = torch.zeros(len(chosen), len(experts))  # (B, K)
        for row, name in enumerate(chosen):
            if name == BASE_LABEL:
                continue
            if name not in experts:
                raise ValueError(f"Route: unknown expert '{name}'; known are {[*experts, BASE_LABEL]}.")
            weights[row, list(experts).index(name)] = 1.0
        return cls(weights, tuple(experts), tuple(scores) if scores is not None else (None,) * len(chosen))

    def chosen(self) -> list[str]:
        """
        The expert name of each row, `"others"` for the base model.

        Raises:
            ValueError: a row is a mixture.
        """
        names = []
        for row, weights in enumerate(self.weights.tolist()):
            used = [(name, weight) for name, weight in zip(self.experts, weights, strict=True) if weight != 0]
            if used and (len(used) > 1 or used[0][1] != 1):
                raise ValueError(
                    f"Row {row} of the route is the mixture {dict(used)}, not one expert or the base model."
                )
            names.append(used[0][0] if used else BASE_LABEL)
        return names


@runtime_checkable
class Dispatcher(Protocol):
    """What turns prompts into a route."""

    def route(self, prompts: Sequence[Prompt]) -> Route:
        """
        Decide which experts answer `prompts`.

        Args:
            prompts (`Sequence[str | list[dict]]`): one text or chat per row; of a chat, the last user message counts.
        """
        ...


def user_text(prompt: Prompt) -> str:
    """
    The text of a prompt that is classified: the prompt itself, or the last user message of a chat.

    Raises:
        ValueError: the chat has no user message with text in it.
    """
    if isinstance(prompt, str):
        return prompt
    for message in reversed(prompt):
        if message["role"] == "user":
            content = message["content"]
            if not isinstance(content, str):  # a list of typed parts
                content = "\n".join(part["text"] for part in content if part.get("type") == "text")
            return content
    raise ValueError(f'The chat has no user message to route by; add one, or pin an expert (expert="{BASE_LABEL}").')
