"""RouteWeights: what a bank needs to know of a route, which is made above it."""

from __future__ import annotations

from typing import Protocol

import torch


class RouteWeights(Protocol):
    """What a bank needs to know of a [`~peft_svf.dispatch.Route`]."""

    @property
    def weights(self) -> torch.Tensor:
        """Shape (B, K) or (B, G, K)."""

    @property
    def experts(self) -> tuple[str, ...]:
        """The K experts."""

    @property
    def groups(self) -> tuple[str, ...]:
        """The G groups of matrices, if the weights have any."""

    @property
    def residual(self) -> bool:
        """Whether the base model has the rest of the weight."""
