"""Quantized base layers: their weights as numbers, and how they come back after merging."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn


def device_of(layer: nn.Module) -> torch.device:
    """Where the weights of a layer are; the CPU if they are not there yet."""
    tensors = (*layer.parameters(), *layer.buffers())
    return next((tensor.device for tensor in tensors if not tensor.is_meta), torch.device("cpu"))


def dequantized_weight(layer: nn.Module, backend: QuantizationBackend) -> torch.Tensor:
    """The weight of a quantized linear layer, shape (out, in), in the dtype it was quantized from.

    Raises:
        TypeError: The format cannot be dequantized (GPTQ, AWQ and the like).
        NotImplementedError: The same from torchao.
        ValueError: bitsandbytes has not quantized the weight yet.
    """
    weight: Any = getattr(layer, "weight", None)
    state = getattr(weight, "quant_state", None)
    if backend.backend_name == "bnb 8bit" and weight.has_fp16_weights:
        return weight.data  # quantized anew at every forward
    if (backend.backend_name == "bnb 8bit" and weight.dtype != torch.int8) or (
        backend.backend_name == "bnb 4bit" and state is None
    ):
        raise ValueError("its weight is not quantized yet; move the model to its device first: `model.to(device)`")
    if getattr(state, "packing_format_for_cpu", False):
        return _dequantized_packed_weight(weight.data, state)
    return backend.get_base_weight(layer)


def _dequantized_packed_weight(data: torch.Tensor, packed: Any) -> torch.Tensor:
    """The same for a 4-bit weight that bitsandbytes has packed.

    On CPUs with AVX512-BF16 it packs weights for its inference kernel at the first forward in eval mode, in place, and
    rounds their scales to bfloat16. `dequantize_4bit` then returns garbage, and so does bitsandbytes' own way back
    unless the scales are quantized too. Here the codes are unpacked and the rounded scales used: that is the weight
    which the layer computes with.
    """
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse, dequantize_4bit

    state = copy.copy(packed)
    state.original_nested = False  # or the scales would be quantized again
    codes, state = _convert_weight_packed_for_cpu_inverse(data, state)
    state.absmax = packed.absmax.T.reshape(-1).to(torch.float32)  # one for each block of the weight, row by row
    return dequantize_4bit(codes, state)


class UnmergedLayer:
    """A quantized base layer as it was before merging: the tensors and the quantization state themselves, no copies.

    Attributes:
        original (`nn.Module`): A shallow copy of the layer, which keeps them; for dequantizing, not for a forward.
    """

    PARTS = ("_parameters", "_buffers", "state", "quant_state")  # the last two belong to bitsandbytes

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.original = copy.copy(layer)
        vars(self.original).update(self._parts_of(layer))
        # PEFT changes attributes of the old parameter when it makes a new one.
        self.attributes = [(p, dict(vars(p))) for p in layer.parameters(recurse=False)]

    def restore(self, owner: BaseTunerLayer) -> None:
        """Put the layer back to what it was, on the device where it is now."""
        device = device_of(owner.get_base_layer())
        for parameter, attributes in self.attributes:
            vars(parameter).clear()
            vars(parameter).update(attributes)
        vars(self.layer).update(self._parts_of(self.original))
        if not isinstance(owner.base_layer, BaseTunerLayer):
            owner.base_layer = self.layer  # HQQ makes a new module when it quantizes
        if device_of(owner.get_base_layer()) != device:
            self.layer.to(device)

    def _parts_of(self, layer: nn.Module) -> dict[str, Any]:
        return {part: copy.copy(value) for part, value in vars(layer).items() if part in self.PARTS}
