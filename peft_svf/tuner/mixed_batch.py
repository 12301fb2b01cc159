"""Mixed batches: one batch whose rows run under different adapters, through the same two matrix products."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import GenerationConfig

from peft_svf.tuner.layer import SVFLayer, stack_offsets


BASE_MODEL = "__base__"  # PEFT's name for "no adapter" in `adapter_names`


class MixedBatch:
    """Which adapter each row of one call of forward or generate runs under. Lives as long as the call.

    Args:
        adapter_names (`list[str]`):
            One name for each row that the caller passed, `"__base__"` for the base model.
        expansion (`int`, *optional*, defaults to 1):
            How many rows generate makes of one: beams or returned sequences.
    """

    def __init__(self, adapter_names: list[str], expansion: int = 1) -> None:
        self.adapter_names = adapter_names
        self.expansions = {1, expansion}  # 1: the encoder of an encoder-decoder model
        self.tokens = 1  # of a row, as the last layer with a batch axis saw it
        self._tables: dict[SVFLayer, torch.Tensor] = {}
        self._indices: dict[tuple[int, torch.device], torch.Tensor] = {}
        self._rows_of = {name: index for index, name in enumerate(sorted(set(adapter_names)))}

    def row_offsets(self, layer: SVFLayer, x: torch.Tensor) -> torch.Tensor:
        """The offsets for each row of the input of `layer`, shape (B, 1, …, k) with as many axes as x.

        Raises:
            ValueError: The rows of x are not those of the call (several times over), or an adapter is merged.
        """
        if layer.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        repeats = self._repeats(x)
        if layer not in self._tables:  # once for each call, not for each token
            self._tables[layer] = self._stack(layer)
        table = self._tables[layer]
        offsets = table[self._index(repeats, table.device)]  # (B, k)
        return offsets.view(offsets.shape[0], *(1,) * (x.dim() - 2), offsets.shape[1])

    def repeat_names(self, rows: int) -> list[str]:
        """The names once for each of `rows` rows; the rows of one prompt lie next to each other."""
        repeats = self._divide(rows)
        return [name for name in self.adapter_names for _ in range(repeats)]

    def _stack(self, layer: SVFLayer) -> torch.Tensor:
        """The offsets of the adapters of this batch, shape (K, k); zeros for the base model."""
        offsets = {name: layer.offset(name) for name in self._rows_of if name in layer.svf_offset}
        base = next(layer.svf_offset.parameters()).new_zeros(1)
        return stack_offsets([offsets.get(name, base) for name in self._rows_of])

    def _index(self, repeats: int, device: torch.device) -> torch.Tensor:
        if (repeats, device) not in self._indices:
            rows = torch.tensor([self._rows_of[name] for name in self.adapter_names], device=device)
            self._indices[repeats, device] = rows.repeat_interleave(repeats)
        return self._indices[repeats, device]

    def _repeats(self, x: torch.Tensor) -> int:
        """How many rows of x belong to one row of the call."""
        repeats = self._divide(x.shape[0])
        if x.dim() > 2:
            self.tokens = x.shape[1]
            allowed = self.expansions
        else:  # some models (OPT) flatten the tokens of all rows into one axis
            allowed = self.expansions | {expansion * self.tokens for expansion in self.expansions}
        if repeats not in allowed:
            self._refuse(x.shape[0])
        return repeats

    def _divide(self, rows: int) -> int:
        if not self.adapter_names or rows % len(self.adapter_names):
            self._refuse(rows)
        return rows // len(self.adapter_names)

    def _refuse(self, rows: int) -> None:
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(self.adapter_names)} and {rows} respectively."
        )


def pass_mixed_batch(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], batch: MixedBatch
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of the layers that act on single rows: SVF layers, and modules that PEFT trains in full."""
    if isinstance(module, AuxiliaryTrainingWrapper):  # takes plain names and does not repeat them itself
        names = batch.repeat_names(len(args[0])) if args else batch.adapter_names
        # For PEFT a name without a copy of this module is an error; it means the module of the base model.
        names = [name if name in module._adapters else BASE_MODEL for name in names]
        return args, {**kwargs, "adapter_names": names}
    return args, {**kwargs, "adapter_names": batch}


def generation_expansion(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """How many rows `model.generate(*args, **kwargs)` makes of one: the larger of beams and returned sequences."""
    given = kwargs.get("generation_config") or next((arg for arg in args if isinstance(arg, GenerationConfig)), None)
    places = (given, getattr(model, "generation_config", None))  # what the first leaves open, the second fills in

    def setting(name: str) -> int:
        return next(filter(None, (kwargs.get(name), *(getattr(place, name, None) for place in places))), 1)

    return max(setting("num_beams"), setting("num_return_sequences"))
