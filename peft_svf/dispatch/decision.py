"""Decision: from the scores of the labels to a route, the best label or a mixture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from peft_svf.dispatch.route import Route
from peft_svf.experts.bank import BASE_LABEL


@dataclass(frozen=True)
class Decision:
    """
    How probabilities of labels become mixture weights.

    Args:
        mode (`str`, *optional*, defaults to `"best"`):
            `"best"`: the expert of the most probable label answers alone. `"soft"`: the probability of its label is an
            expert's weight, and that of "others" stays with the base model.
        margin (`float`, *optional*, defaults to 0.0):
            In [0, 1], for `"best"`. If the best probability exceeds the second best by less, the base model answers.
        top_k (`int`, *optional*):
            For `"soft"`: only so many experts, the most probable ones, which share what all experts would have had.
        temperature (`float`, *optional*, defaults to 1.0):
            Divides the logarithms of the scores before they are normalised: above 1 the probabilities get more even.

    Raises:
        ValueError: a value out of its range, or an option that the mode does not have.
    """

    mode: str = "best"
    margin: float = 0.0
    top_k: int | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("margin", "temperature"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise ValueError(f"{name} is a number, not {value!r}.")
        if self.mode not in ("best", "soft"):
            raise ValueError(f'mode must be "best" (one expert) or "soft" (a mixture), not {self.mode!r}.')
        if not 0.0 <= self.margin <= 1.0:
            raise ValueError(f"margin is a difference of probabilities between 0 and 1, not {self.margin}.")
        if self.margin and self.mode == "soft":
            raise ValueError('margin belongs to mode="best"; in a soft route doubt shows in the weights already.')
        if self.top_k is not None and self.mode == "best":
            raise ValueError('top_k belongs to mode="soft"; mode="best" always takes one expert.')
        is_count = isinstance(self.top_k, int) and not isinstance(self.top_k, bool) and self.top_k >= 1
        if self.top_k is not None and not is_count:
            raise ValueError(f"top_k is a number of experts, at least 1, not {self.top_k!r}.")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature must be a positive number, not {self.temperature}.")

    def route(self, scores: Tensor, experts: Sequence[str], labels: Sequence[str]) -> Route:
        """
        Decide.

        Args:
            scores (`torch.Tensor` of shape `(B, K + 1)`): logarithms, of the K experts and of "others".
            experts (`Sequence[str]`): the K names.
            labels (`Sequence[str]`): the K + 1 labels, "others" last.

        Returns:
            [`Route`]: with the probability of every label as scores.
        """
        probabilities = (scores / self.temperature).softmax(-1)  # (B, K + 1)
        explained = tuple(dict(zip(labels, row, strict=True)) for row in probabilities.tolist())
        if self.mode == "soft":
            return Route(self._share(probabilities[:, :-1]), tuple(experts), explained)
        names = [*experts, BASE_LABEL]
        best, second = probabilities.topk(2, dim=-1).values.unbind(-1)
        unsure = (best - second < self.margin).tolist()
        winners = probabilities.argmax(-1).tolist()
        chosen = [BASE_LABEL if doubt else names[i] for i, doubt in zip(winners, unsure, strict=True)]
        return Route.one_hot(chosen, experts, explained)

    def _share(self, weights: Tensor) -> Tensor:
        """The probabilities of the experts (B, K), all given to the `top_k` most probable ones."""
        if self.top_k is None or self.top_k >= weights.shape[1]:
            return weights
        kept = weights.topk(self.top_k, dim=-1)
        total, share = weights.sum(-1, keepdim=True), kept.values.sum(-1, keepdim=True)
        shared = kept.values / share.clamp(min=torch.finfo(share.dtype).tiny) * total
        return torch.zeros_like(weights).scatter(1, kept.indices, shared)
