"""Finds the adapted layers of a model."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from peft_svf.tuner.layer import SVFLayer
from peft_svf.tuner.parameter import ParamWrapper


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, SVFLayer]:
    """The layers of `model` that have offsets of the adapter `adapter_name`, by module or parameter name."""
    return {
        adapted_name(name, layer): layer
        for name, layer in model.named_modules()
        if isinstance(layer, SVFLayer) and adapter_name in layer.svf_offset
    }


def adapted_name(name: str, layer: SVFLayer) -> str:
    """The name of what a layer adapts: of a module, or of a parameter however deep its wrapper is nested."""
    if not isinstance(layer, ParamWrapper):
        return name
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return f"{name}.{layer.parameter_name}"


def wrapping_modules(model: nn.Module) -> Iterator[BaseTunerLayer | AuxiliaryTrainingWrapper]:
    """The modules of `model` that PEFT has put around others, without a look inside adapted layers."""
    pending: list[nn.Module | None] = [model]
    while pending:
        module = pending.pop()
        if isinstance(module, BaseTunerLayer):
            yield module
            pending.append(module._modules["base_layer"])
        elif module is not None:
            if isinstance(module, AuxiliaryTrainingWrapper):
                yield module
            pending.extend(module._modules.values())
