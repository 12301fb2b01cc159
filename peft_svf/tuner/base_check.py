"""Does an adapter meet the base model it was trained on? Offsets mean nothing in the basis of other weights."""

from __future__ import annotations

import math
import warnings

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_svf.spectrum import sketch_distance, weight_sketch
from peft_svf.tuner.layer import SVFLayer


# Relative differences of a weight, ‖ΔW‖_F / ‖W‖_F. Rounding to bfloat16 gives 1e-3, to int8 about 5e-3.
OTHER_MODEL = 1e-2
OTHER_ROUNDING = 1e-6


def collect_fingerprint(model: nn.Module, adapter_name: str) -> dict[str, list[float]]:
    """The sketches of all weights that `adapter_name` adapts, by module name."""
    return {
        name: layer.svf_sketch
        for name, layer in model.named_modules()
        if isinstance(layer, SVFLayer) and adapter_name in layer.svf_offset
    }


def check_base_model(model: nn.Module, fingerprint: dict[str, list[float]], base_model: str | None) -> None:
    """Compare the weights of `model` with the fingerprint of an adapter, before anything is changed.

    Args:
        model (`nn.Module`): The model that the adapter is about to be put into.
        fingerprint (`dict[str, list[float]]`): Sketches by module name (see [`collect_fingerprint`]).
        base_model (`str`, *optional*): The name or path of the model that the adapter was trained on.

    Warns:
        Once, with the largest difference, if the weights are the same up to rounding.

    Raises:
        ValueError: A weight is missing, has another shape or differs by more than 1e-2 of its norm.
    """
    modules = dict(model.named_modules())
    largest, largest_name, reason = 0.0, "", ""
    for name, expected in fingerprint.items():
        found = _sketch_module(modules[name]) if name in modules else None
        distance = math.inf if found is None else sketch_distance(found, expected)
        if distance > largest:
            largest, largest_name, reason = distance, name, _describe(found, expected, distance)
        if distance == math.inf:
            break
    expected_base = f"'{base_model}'" if base_model else "the model it was trained on"
    if largest > OTHER_MODEL:
        raise ValueError(
            f"this adapter belongs to another base model: '{largest_name}' {reason}; load it onto {expected_base}"
        )
    if largest > OTHER_ROUNDING:
        warnings.warn(
            "this adapter meets slightly different weights than it was trained on: the largest relative difference "
            f"is {largest:.1e}, in '{largest_name}'; to be exact, load {expected_base} in the dtype and quantization "
            "of the training"
        )


def _sketch_module(module: nn.Module) -> list[float] | None:
    if isinstance(module, SVFLayer):
        return module.svf_sketch  # also right while an adapter is merged
    layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    backend = resolve_quantization_backend(layer)
    if backend is not None:
        return weight_sketch(backend.get_base_weight(layer))
    if not isinstance(layer, (nn.Linear, Conv1D)) or layer.weight.is_meta:
        return None
    return weight_sketch(layer.weight.T if isinstance(layer, Conv1D) else layer.weight)


def _describe(found: list[float] | None, expected: list[float], distance: float) -> str:
    if found is None:
        return "is not a linear layer of this model"
    if len(found) != len(expected) or not all(map(math.isfinite, expected)):
        return "has a damaged fingerprint"
    if found[:2] != expected[:2]:
        return f"is {found[0]:.0f}×{found[1]:.0f} here and was {expected[0]:.0f}×{expected[1]:.0f} in training"
    return f"differs by {distance:.1e} of its norm"
