"""The weights of a live base model that experts can adapt, read through whatever adapters are on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, get_quantization_kwargs
from torch import nn
from transformers import PreTrainedModel

from peft_svf.experts.errors import ExpertError
from peft_svf.experts.transfer.places import Place
from peft_svf.spectrum import cached_singular_basis, weight_sketch
from peft_svf.tuner.distributed import gathered
from peft_svf.tuner.layer import SVFLayer, basis_dtype
from peft_svf.tuner.module_checks import ModuleChecks


@dataclass(frozen=True)
class BaseMatrix:
    """
    One weight of a base model, as its adapters leave it.

    Args:
        name (`str`): Of its module in the base model.
        layer ([`~peft_svf.tuner.layer.SVFLayer`]): Its own if it is adapted; else one that is not part of the model.
    """

    name: str
    layer: SVFLayer

    @property
    def place(self) -> Place:
        """Where it stands."""
        return Place.of(self.name)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.layer.out_features, self.layer.in_features

    @property
    def rank(self) -> int:
        """How many singular values it has."""
        return min(self.shape)

    @cached_property
    def sketch(self) -> list[float]:
        """Its part of the fingerprint, see [`~peft_svf.spectrum.weight_sketch`]."""
        return self.layer.svf_sketch or weight_sketch(self._weight())

    @cached_property
    def spectrum(self) -> torch.Tensor:
        """Its singular values, descending; the singular basis, which costs the time, stays in the disk cache."""
        if self.layer.svf_singular_values is not None:
            return self.layer.svf_singular_values.cpu()
        weight = self._weight()
        try:
            return cached_singular_basis(weight, self.sketch, basis_dtype(weight.dtype)).singular_values.cpu()
        except ValueError as error:
            raise ExpertError(f"'{self.name}' has no singular values: {error}.") from error

    def _weight(self) -> torch.Tensor:
        try:
            with gathered(self.layer.get_base_layer()):
                weight = self.layer.to_matrix(self.layer.unmerged_weight()).detach()
        except (TypeError, NotImplementedError, ValueError) as error:
            raise ExpertError(
                f"The weight of '{self.name}' cannot be read ({error}); load the model unquantized to transfer."
            ) from error
        if weight.is_meta:
            raise ExpertError(
                f"The weight of '{self.name}' is on the meta device (offloaded or not loaded); load the model whole."
            )
        return weight


def matrices_of(model: PreTrainedModel | PeftModel) -> dict[str, BaseMatrix]:
    """
    The linear layers of a base model that SVF can adapt, by name in the base model, output layer included.

    Raises:
        ExpertError: An adapter of another method is merged into them: the base model is not there to be read.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    checks, settings, found = ModuleChecks(base), get_quantization_kwargs(base), {}
    for name, module, parent in _modules(base, ""):
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if checks.why_not(name, layer, parent) is not None:
            continue
        if isinstance(module, SVFLayer):
            found[name] = BaseMatrix(name, module)
            continue
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise ExpertError(
                f"'{name}' has a merged adapter; unmerge it, for transfer needs the base model's weights."
            )
        found[name] = BaseMatrix(name, _Reader(layer, name, settings))
    return found


def fused_experts_of(model: PreTrainedModel | PeftModel) -> list[str]:
    """The stacked experts of mixture-of-experts layers, by the name of the parameter in the base model."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    names = [name.replace(".base_layer", "") for name, value in base.named_parameters() if value.dim() == 3]
    return [name for name in names if "experts" in name.split(".")]


class _Reader(nn.Module, SVFLayer):
    """Reads the weight of a layer as an adapter on it would, without being put into the model."""

    def __init__(self, layer: nn.Module, name: str, settings: dict[str, Any]) -> None:
        super().__init__()
        SVFLayer.__init__(self, layer, name, **settings)


def _modules(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Name, module and parent of all that is in the base model; of an adapted layer the outermost wrapper."""
    for own_name, child in module.named_children():
        name = f"{prefix}{own_name}"
        inner = child
        if isinstance(inner, AuxiliaryTrainingWrapper):
            inner = inner.original_module
        yield name, inner, module
        while isinstance(inner, BaseTunerLayer):
            inner = inner.base_layer
        yield from _modules(inner, f"{name}.")
