"""Does an adapter meet the base model it was trained on? Offsets mean nothing in the basis of other weights."""

from __future__ import annotations

import math
import warnings

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_svf.spectrum import sketch_distance, weight_sketch
from peft_svf.tuner.config import SVFConfig
from peft_svf.tuner.layer import SVFLayer


# Relative differences of a weight, ‖ΔW‖_F / ‖W‖_F. Rounding to bfloat16 gives 1e-3, to int8 about 5e-3.
OTHER_MODEL = 1e-2
OTHER_QUANTIZATION = 0.3  # int4 gives about 0.1; unrelated weights of one size give 1.4
OTHER_ROUNDING = 1e-6


def collect_fingerprint(layers: dict[str, SVFLayer]) -> dict[str, list[float]]:
    """The sketches of all adapted weights, by module name."""
    return {name: layer.svf_sketch for name, layer in layers.items() if layer.svf_sketch is not None}


def check_base_model(model: nn.Module, config: SVFConfig) -> None:
    """Compare the weights of `model` with the fingerprint of an adapter, before anything is changed.

    Where the adapter brings its singular bases along, or takes them from the unquantized checkpoint, the weights of
    the model only need to be a quantization of those it was trained on.

    Args:
        model (`nn.Module`): The model that the adapter is about to be put into.
        config (`SVFConfig`): The adapter's configuration, with its fingerprint.

    Warns:
        Once, with the largest difference, if the weights are the same up to rounding.

    Raises:
        ValueError: A weight is missing, has another shape or differs by more than 1e-2 of its norm (0.3 with a basis
            from elsewhere).
    """
    modules = dict(model.named_modules())
    has_own_basis = bool(config.save_basis or config.basis_source)
    found = {
        name: _sketch_module(modules[name]) if name in modules else None for name in config.base_fingerprint or {}
    }
    compare_fingerprints(found, config, has_own_basis)


def compare_fingerprints(
    found: dict[str, list[float] | None], config: SVFConfig, allows_quantization: bool = False
) -> None:
    """Compare sketches of weights with the fingerprint of an adapter; warns and raises as [`check_base_model`]."""
    largest, largest_name, reason = 0.0, "", ""
    for name, expected in (config.base_fingerprint or {}).items():
        distance = math.inf if found.get(name) is None else sketch_distance(found[name], expected)
        if distance > largest:
            largest, largest_name, reason = distance, name, _describe(found.get(name), expected, distance)
        if distance == math.inf:
            break
    base_model = config.base_model_name_or_path
    expected_base = f"'{base_model}'" if base_model else "the model it was trained on"
    if largest > (OTHER_QUANTIZATION if allows_quantization else OTHER_MODEL):
        raise ValueError(
            f"this adapter belongs to another base model: '{largest_name}' {reason}; load it onto {expected_base}"
        )
    if largest > OTHER_ROUNDING and not allows_quantization:
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
