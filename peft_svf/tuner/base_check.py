"""Does an adapter meet the base model it was trained on? Offsets mean nothing in the basis of other weights."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils import get_quantization_kwargs, resolve_quantization_backend
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_svf.spectrum import sketch_distance, weight_sketch
from peft_svf.tuner.config import SVFConfig
from peft_svf.tuner.distributed import gathered
from peft_svf.tuner.layer import SVFLayer
from peft_svf.tuner.parameter import ParamWrapper, sketch_parameter
from peft_svf.tuner.quantized import dequantized_weight


# Relative differences of a weight, ‖ΔW‖_F / ‖W‖_F. Measured: rounding to bfloat16 2e-3, to int8 5e-3 to 9e-3 (more for
# longer rows), to nf4 0.09, to fp4 0.12; unrelated weights of one size differ by 1.4. A sketch estimates such a
# difference up to a factor of two or three, and the largest among all modules counts.
OTHER_ROUNDING = 1e-6
OTHER_MODEL = 1e-2
OTHER_THAN_8_BIT = 3e-2
OTHER_QUANTIZATION = 0.5


def collect_fingerprint(layers: dict[str, SVFLayer]) -> dict[str, list[float]]:
    """The sketches of all adapted weights, by module name."""
    return {name: layer.svf_sketch for name, layer in layers.items() if layer.svf_sketch is not None}


def check_base_model(model: nn.Module, config: SVFConfig) -> None:
    """Compare the weights of `model` with the fingerprint of an adapter, before anything is changed.

    Where the adapter brings its singular bases along, or takes them from the unquantized checkpoint, the weights of
    the model only need to be a quantization of those it was trained on; of a weight that cannot be dequantized, only
    the shape is compared.

    Args:
        model (`nn.Module`): The model that the adapter is about to be put into.
        config (`SVFConfig`): The adapter's configuration, with its fingerprint.

    Warns:
        Once, with the largest difference, if the weights are the same up to rounding.

    Raises:
        ValueError: A weight is missing, has another shape or differs by more than 1e-2 of its norm (a quantized weight
            by more than 3e-2; 0.5 with a basis from elsewhere).
    """
    differences = _compare_modules(model, config)
    worst, base = _largest(differences), _base_of(config)
    may_be_quantization = worst.distance <= OTHER_QUANTIZATION
    if worst.is_other and may_be_quantization and worst.has_basis:
        raise ValueError(
            f"this adapter has another singular basis than the adapters that the model already has: '{worst.name}' "
            f"{worst.reason}; adapters on one model share the bases, so load this one onto a model of its own"
        )
    if worst.is_other and may_be_quantization and worst.is_quantized:
        raise ValueError(
            f"this adapter was trained on other weights than those of this quantized model: '{worst.name}' "
            f"{worst.reason}; {_from_source(config)}, or load {base} in the dtype and quantization of the training"
        )
    if worst.is_other:
        raise ValueError(
            f"this adapter belongs to another base model: '{worst.name}' {worst.reason}; load it onto {base}"
            + (" in the dtype and quantization of the training" if may_be_quantization else "")
        )
    worst = _largest([d for d in differences if d.has_basis or not _brings_bases(config)])
    if worst.distance > OTHER_ROUNDING:
        remedy = f"load {base} in the dtype and quantization of the training"
        if worst.is_quantized and not worst.has_basis:
            remedy += f", or {_from_source(config)}"
        warnings.warn(_slightly_different(worst) + remedy)


def compare_fingerprints(found: dict[str, list[float]], config: SVFConfig) -> None:
    """Compare the weights that the singular bases came from, `basis_source`, with the fingerprint of an adapter.

    Args:
        found (`dict[str, list[float]]`): The sketches of these weights, by module name.
        config (`SVFConfig`): The adapter's configuration, with its fingerprint.

    Warns:
        Once, with the largest difference, if the weights are the same up to rounding.

    Raises:
        ValueError: A weight is missing, has another shape or differs by more than 1e-2 of its norm.
    """
    worst = _largest([_compare(name, found.get(name), e) for name, e in (config.base_fingerprint or {}).items()])
    if worst.is_other:
        raise ValueError(
            f"this adapter was trained on other weights than those of `basis_source={config.basis_source!r}`: "
            f"'{worst.name}' {worst.reason}; give the checkpoint of {_base_of(config)} instead, or, to compute the "
            "bases from the model itself, `None`"
        )
    if worst.distance > OTHER_ROUNDING:
        warnings.warn(
            f"{_slightly_different(worst)}give the checkpoint of {_base_of(config)} in the dtype of the training as "
            "`basis_source`"
        )


@dataclass(frozen=True)
class _Difference:
    """How far one weight is from the one that an adapter was trained on, and how far it may be."""

    name: str = ""
    distance: float = 0.0
    limit: float = OTHER_MODEL
    reason: str = ""
    is_quantized: bool = False
    has_basis: bool = False  # from an adapter that the model already has

    @property
    def is_other(self) -> bool:
        return self.distance > self.limit


def _largest(differences: list[_Difference]) -> _Difference:
    return max(differences, key=lambda difference: difference.distance / difference.limit, default=_Difference())


def _compare_modules(model: nn.Module, config: SVFConfig) -> list[_Difference]:
    modules, settings, differences = dict(model.named_modules()), get_quantization_kwargs(model), []
    for name, expected in (config.base_fingerprint or {}).items():
        found = _sketch(modules, name, settings)
        if found is not None and len(found) == 2:  # a shape is all that can be had
            found = [*found, *expected[2:]]
        is_quantized = name in modules and _backend_of(modules[name], settings) is not None
        has_basis = _has_basis(modules, name)
        limit = OTHER_THAN_8_BIT if is_quantized else OTHER_MODEL
        if _brings_bases(config) and not has_basis:
            limit = OTHER_QUANTIZATION
        differences.append(_compare(name, found, expected, limit, is_quantized, has_basis))
        if differences[-1].distance == math.inf:
            break
    return differences


def _compare(
    name: str,
    found: list[float] | None,
    expected: list[float],
    limit: float = OTHER_MODEL,
    is_quantized: bool = False,
    has_basis: bool = False,
) -> _Difference:
    distance = math.inf if found is None else sketch_distance(found, expected)
    reason = _describe(found, expected, distance)
    return _Difference(name, distance, limit, reason, is_quantized, has_basis and distance < math.inf)


def _sketch(modules: dict[str, nn.Module], name: str, settings: dict[str, Any]) -> list[float] | None:
    """The sketch of a module's weight; only its shape if it cannot be read; `None` if it is no linear layer."""
    if name not in modules:
        owner, _, parameter_name = name.rpartition(".")
        return sketch_parameter(modules[owner], parameter_name) if owner in modules else None
    module = modules[name]
    if isinstance(module, SVFLayer) and module.svf_sketch is not None:
        return module.svf_sketch  # also right while an adapter is merged
    layer, backend = _base_layer(module), _backend_of(module, settings)
    if backend is not None:
        try:
            return weight_sketch(dequantized_weight(layer, backend))
        except (TypeError, NotImplementedError):  # PEFT's answer for GPTQ, AWQ and other opaque formats
            return _shape(layer)
    if not isinstance(layer, (nn.Linear, Conv1D)):
        return None
    if layer.weight.is_meta:
        return _shape(layer)
    with gathered(layer):
        return weight_sketch(layer.weight.T if isinstance(layer, Conv1D) else layer.weight)


def _has_basis(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether an adapter of the model has brought the singular basis of this module or parameter."""
    layer = modules.get(name) if name in modules else modules.get(name.rpartition(".")[0])
    while isinstance(layer, ParamWrapper) and layer.parameter_name != name.rpartition(".")[2]:
        layer = layer.base_layer
    return isinstance(layer, SVFLayer) and layer.svf_sketch is not None


def _base_layer(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _backend_of(module: nn.Module, settings: dict[str, Any]) -> QuantizationBackend | None:
    return resolve_quantization_backend(_base_layer(module), **settings)


def _shape(layer: nn.Module) -> list[float]:
    in_features, out_features = _get_in_out_features(layer)
    return [float(out_features), float(in_features)]


def _brings_bases(config: SVFConfig) -> bool:
    return bool(config.save_basis or config.basis_source)


def _base_of(config: SVFConfig) -> str:
    name = config.base_model_name_or_path
    return f"'{name}'" if name else "the model it was trained on"


def _from_source(config: SVFConfig) -> str:
    source = config.base_model_name_or_path or "<folder or Hub id>"
    return (
        "take the singular bases from the unquantized weights: load the adapter with "
        f"`config=SVFConfig.from_pretrained(<adapter>, basis_source='{source}')`"
    )


def _slightly_different(worst: _Difference) -> str:
    return (
        "this adapter meets slightly different weights than it was trained on: the largest relative difference is "
        f"{worst.distance:.1e}, in '{worst.name}'; to be exact, "
    )


def _describe(found: list[float] | None, expected: list[float], distance: float) -> str:
    if found is None:
        return "is not a linear layer of this model"
    if len(found) != len(expected) or not all(map(math.isfinite, expected)):
        return "has a damaged fingerprint"
    if found[:2] != expected[:2]:
        return f"is {found[0]:.0f}×{found[1]:.0f} here and was {expected[0]:.0f}×{expected[1]:.0f} in training"
    return f"differs by {distance:.1e} of its norm"
