"""LastLogits: a model's forward that computes and returns the last logits only, where the model can."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


class LastLogits:
    """
    Calls a causal language model on inputs of any device.

    Args:
        model (`PreTrainedModel`): the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.can_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.vocabulary = int(model.config.get_text_config().vocab_size)

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor], keep: int, cache: DynamicCache | None = None) -> Tensor:
        """
        Logits at the last `keep` positions, shape `(B, keep, V)`.

        Args:
            inputs (`dict[str, Tensor]`): arguments of the model's forward; a boolean 4-D mask becomes an additive one.
            keep (`int`): at least 1.
            cache (`DynamicCache`, *optional*): what precedes the inputs; the new tokens are added to it.
        """
        mask = inputs.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            inputs = {**inputs, "attention_mask": self._additive(mask)}
        placed = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        options = {"logits_to_keep": keep} if self.can_keep else {}
        logits = self.model(**placed, past_key_values=cache, use_cache=cache is not None, **options).logits
        return logits[:, -keep:]

    def computed(self, keep: int, positions: int) -> int:
        """How many logits of one row the model really holds at once when asked for `keep` of its `positions`."""
        return self.vocabulary * (keep if self.can_keep else positions)

    def _additive(self, mask: Tensor) -> Tensor:
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
