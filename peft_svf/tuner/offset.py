"""The trained vectors of one weight under one adapter, in the two parametrizations of [`SVFConfig`]."""

from __future__ import annotations

import torch
from torch import nn


OFFSET_STD = 0.1  # of `init_weights=False`
LOGIT_MEAN, LOGIT_STD = 0.1, 0.01  # the paper's released code; z starts near sigmoid(0.1) ≈ 0.52, all alike
SPREAD_LOGIT_STD = 0.2  # of `init_weights=False`; the offsets then have a standard deviation of about 0.1


class SVFOffset(nn.Module):
    """The offsets z − 1: the trained parameter itself, shape (k,), or (experts, k) for a stack of matrices, float32.

    A module of its own, because FSDP wraps leaf modules that own a trainable `.weight`, and because TRL finds the
    parameters of an adapter by `.<adapter>.` inside their names.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, dtype=torch.float32))

    def initialize(self, init_weights: bool) -> None:
        """Leave the base model as it is (`True`), or draw random offsets (`False`)."""
        if not init_weights:
            nn.init.normal_(self.weight, std=OFFSET_STD)

    def forward(self, singular_values: torch.Tensor) -> torch.Tensor:
        """The offset z − 1, shape (…, k); the singular values, shape (…, r), do not matter to this parametrization."""
        return self.weight


class SVFLogit(SVFOffset):
    """Logits p of the paper's released code, shape (k,): z = sigmoid(p) · Σσ / Σσ·sigmoid(p).

    The factor keeps the nuclear norm of the weight. Where only k < r components are adapted, it is that of these k.
    """

    def initialize(self, init_weights: bool) -> None:
        """Draw logits around 0.1, nearly equal (`True`) or spread out (`False`)."""
        nn.init.normal_(self.weight, mean=LOGIT_MEAN, std=LOGIT_STD if init_weights else SPREAD_LOGIT_STD)

    def forward(self, singular_values: torch.Tensor) -> torch.Tensor:
        """The offset z − 1, shape (…, k), from all singular values, shape (…, r)."""
        scale = torch.sigmoid(self.weight)
        singular_values = singular_values[..., : scale.shape[-1]].to(scale.dtype)
        norm, scaled_norm = singular_values.sum(-1, keepdim=True), (singular_values * scale).sum(-1, keepdim=True)
        return scale * (norm / scaled_norm) - 1
