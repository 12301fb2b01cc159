"""Route: which experts answer each row of a batch, and the Dispatcher protocol that decides it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

from peft_svf.experts.bank import BASE_LABEL


Prompt: TypeAlias = str | Sequence[Mapping[str, Any]]  # plain text, or a chat: messages with "role" and "content"

MIXTURE = "mixture"  # what `Route.names` calls a row of several experts


@dataclass(frozen=True)
class Route:
    """
    Mixture weights over the experts of a bank for each row of a batch.

    Args:
        weights (`torch.Tensor` of shape `(B, K)`, or `(B, G, K)` with `groups`):
            A one-hot row is a chosen expert, a row of zeros the base model, any other row a mixture. Kept as float32
            on the CPU.
        experts (`tuple[str, ...]`): the K expert names, the columns of `weights`.
        scores (`tuple[dict[str, float] | None, ...]`, *optional*):
            Per row, label to probability (with the base label); `None` for a row that nothing was asked about.
        groups (`tuple[str, ...]`, *optional*):
            Weights per layer or per matrix: G names of modules, or dotted beginnings of them ("model.layers.3"). A
            matrix belongs to the longest that fits; [`~ExpertBank.layer_groups`] and [`~ExpertBank.matrix_groups`]
            give names that together cover every adapted matrix.
        residual (`bool`, *optional*, defaults to `True`):
            Leave the base model at weight 1 − Σα: offset' = Σ αₖ offsetₖ. `False` is the formula of the paper as it
            stands, z' = Σ αₖ zₖ (Transformer², arXiv 2501.06252, section 3.2); if the weights of a row sum to 1, both
            are the same.

    Raises:
        ValueError: shapes that do not fit, weights that are not finite, an expert or a group twice.
    """

    weights: torch.Tensor
    experts: tuple[str, ...]
    scores: tuple[dict[str, float] | None, ...] = ()
    groups: tuple[str, ...] = ()
    residual: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", torch.as_tensor(self.weights, dtype=torch.float32, device="cpu"))
        if not self.scores:
            object.__setattr__(self, "scores", (None,) * len(self.weights))
        grouped = (len(self.groups),) if self.groups else ()
        expected = (len(self.scores), *grouped, len(self.experts))
        if tuple(self.weights.shape) != expected:
            raise ValueError(
                f"Route: weights have shape {tuple(self.weights.shape)}, expected "
                f"({'rows, groups, experts' if self.groups else 'rows, experts'}) {expected}."
            )
        if not torch.isfinite(self.weights).all():
            raise ValueError("Route: weights must be finite.")
        for names in (self.experts, self.groups):
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"Route: '{twice[0]}' is there twice.")

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rows: slice | Sequence[int]) -> Route:
        """The route of some rows."""
        chosen = range(len(self))[rows] if isinstance(rows, slice) else rows
        return replace(self, weights=self.weights[list(chosen)], scores=tuple(self.scores[row] for row in chosen))

    def repeat_rows(self, times: int) -> Route:
        """Every row `times` times in a row."""
        return self[[row for row in range(len(self)) for _ in range(times)]]

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
        return cls(weights, tuple(experts), tuple(scores) if scores is not None else ())

    @classmethod
    def mixture(cls, weights: Mapping[str, float], rows: int = 1, residual: bool = True) -> Route:
        """The same mixture for `rows` rows, given as expert name to weight; `"others"` names the rest, the base."""
        experts = tuple(name for name in weights if name != BASE_LABEL)
        row = torch.tensor([[float(weights[name]) for name in experts]])  # (1, K)
        return cls(row.expand(rows, -1), experts, residual=residual)

    @classmethod
    def concatenate(cls, routes: Sequence[Route]) -> Route:
        """
        The rows of several routes, one after another; an expert that a route does not name has weight 0 in it.

        Raises:
            ValueError: no routes, or routes of different groups or conventions.
        """
        if not routes or len({(route.groups, route.residual) for route in routes}) > 1:
            raise ValueError("Route: only routes of the same groups and the same convention can be put together.")
        experts = tuple(dict.fromkeys(name for route in routes for name in route.experts))
        parts = []
        for route in routes:
            part = torch.zeros(*route.weights.shape[:-1], len(experts))
            part[..., [experts.index(name) for name in route.experts]] = route.weights
            parts.append(part)
        scores = tuple(score for route in routes for score in route.scores)
        return cls(torch.cat(parts), experts, scores, routes[0].groups, routes[0].residual)

    def names(self) -> list[str]:
        """The expert name of each row, `"others"` for the base model, `"mixture"` for several experts."""
        return [self._name(row) or MIXTURE for row in range(len(self))]

    def chosen(self) -> list[str]:
        """
        The expert name of each row, `"others"` for the base model.

        Raises:
            ValueError: a row is a mixture.
        """
        names = []
        for row in range(len(self)):
            name = self._name(row)
            if name is None:
                raise ValueError(
                    f"Row {row} of the route is the mixture {self.row_weights()[row]}, not one expert or the base "
                    "model."
                )
            names.append(name)
        return names

    def row_weights(self) -> list[dict[str, float]]:
        """The weights of each row that are not zero, by expert; with groups, their means over the groups."""
        weights = self.weights.mean(1) if self.groups else self.weights  # (B, K)
        return [
            {name: weight for name, weight in zip(self.experts, row, strict=True) if weight != 0}
            for row in weights.tolist()
        ]

    def _name(self, row: int) -> str | None:
        """The only expert of a row, or the base label; `None` if it is a mixture."""
        mixture = self.weights[row] if self.groups else self.weights[row][None]  # (G or 1, K)
        if not mixture.any():
            return BASE_LABEL if self.residual else None
        column = int(mixture[0].argmax())
        one_hot = torch.zeros_like(mixture)
        one_hot[:, column] = 1.0
        return self.experts[column] if torch.equal(mixture, one_hot) else None


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
        TypeError: neither a text nor a list of messages.
    """
    if isinstance(prompt, str):
        return prompt
    messages: Sequence[Mapping[str, Any]] = prompt
    if not isinstance(prompt, Sequence) or not all(isinstance(message, Mapping) for message in prompt):
        raise TypeError(f"A prompt is a text or a chat (a list of messages), not {_kind(prompt)}.")
    for message in reversed(messages):
        if message["role"] == "user":
            content = message["content"]
            if not isinstance(content, str):  # a list of typed parts
                content = "\n".join(part["text"] for part in content if part.get("type") == "text")
            return content
    raise ValueError(f'The chat has no user message to route by; add one, or pin an expert (expert="{BASE_LABEL}").')


def check_prompts(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """
    Return `prompts`, unless it is a single one: a text would be routed letter by letter.

    Raises:
        TypeError: one text or one chat instead of a list of them.
    """
    is_chat = isinstance(prompts, Sequence) and len(prompts) > 0 and all(isinstance(item, Mapping) for item in prompts)
    if isinstance(prompts, str | Mapping) or is_chat:
        raise TypeError("route() takes a list of prompts, but this is a single one: pass [prompt].")
    return prompts


def _kind(prompt: object) -> str:
    return "a list of other things" if isinstance(prompt, Sequence) else type(prompt).__name__
