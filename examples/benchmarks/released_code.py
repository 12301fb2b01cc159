"""SVF as the code released with the paper computes it (github.com/SakanaAI/self-adaptive-llms, utils.py): two-sided.

U, S and V of every weight are kept. Every step composes W' = U diag(S ⊙ z) Vᵀ · ΣS / Σ(S ⊙ z), with z = sigmoid(p),
writes it over the weight of the model, takes the gradient of the whole weight, and sends it back through a second
composition. Here the columns of U are scaled directly, where the released code multiplies by a dense diagonal matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from models import adapted_linears
from torch import nn


class Decomposition(nn.Module):
    """U, S and V of one weight, and the trained logits p, in the dtype of the weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        left, singular_values, right = torch.svd(weight.detach().float())
        self.register_buffer("left", left.to(weight.dtype))  # (out, r)
        self.register_buffer("singular_values", singular_values.to(weight.dtype))  # (r,)
        self.register_buffer("right", right.to(weight.dtype))  # (in, r)
        self.logits = nn.Parameter(0.1 + 0.01 * torch.randn_like(self.singular_values))

    def forward(self) -> torch.Tensor:
        """The composed weight, shape (out, in)."""
        scaled = self.singular_values * torch.sigmoid(self.logits)
        return (self.left * scaled) @ self.right.T * (self.singular_values.sum() / scaled.sum())


class ReleasedCode(nn.Module):
    """A model with the decompositions of its linear layers."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        base.requires_grad_(False)
        self.base = base
        self.linears = adapted_linears(base)
        self.decompositions = nn.ModuleList([Decomposition(linear.weight) for linear in self.linears.values()])

    def training_step(self, tokens: torch.Tensor) -> Callable[[], None]:
        """One step of AdamW on the next-token loss, as a function without arguments."""
        self.train()
        optimizer = torch.optim.AdamW(self.decompositions.parameters(), lr=1e-3)
        weights = [linear.weight.requires_grad_() for linear in self.linears.values()]

        def step() -> None:
            optimizer.zero_grad()
            with torch.no_grad():
                for weight, composed in zip(weights, self.decompositions, strict=True):
                    weight.copy_(composed())
            self.base(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            for weight, composed in zip(weights, self.decompositions, strict=True):
                composed().backward(weight.grad)
                weight.grad = None
            optimizer.step()

        return step
