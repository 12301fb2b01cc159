"""How far training has moved the singular values, and in which layers and modules."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from peft_svf.tuner.layer import SVFLayer, stack_offsets
from peft_svf.tuner.names import in_layer
from peft_svf.tuner.offset import SVFOffset


class OffsetStatistics:
    """
    Size of z − 1, the change of the singular values' scale, over the active adapters of a model. With the
    parametrization of `SVFConfig.paper()` this is the z that the layer applies, not the logit.

    Args:
        model (`nn.Module`):
            A model with SVF layers, whole: before FSDP or DeepSpeed have taken it apart.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [module for module in model.modules() if isinstance(module, SVFLayer)]
        self.layers = [layer for layer in layers if any(name in layer.svf_offset for name in layer.active_adapters)]
        self.shapes = {id(offset): offset.weight.shape for layer in self.layers for offset in _offsets(layer)}
        self.groups = groups_of([layer.svf_name for layer in self.layers])

    @torch.no_grad()
    def collect(self, by_place: bool = False) -> dict[str, float]:
        """
        Args:
            by_place (`bool`, *optional*, defaults to `False`):
                Whether to tell layers and modules apart.

        Returns:
            `dict[str, float]`: `z/rms_change` and `z/max_change`, root mean square and maximum of |z − 1| over all
            adapted singular values, and `by_place` the former as `z/layers/<index>` and `z/modules/<name>`. Empty
            without SVF layers, and where no process holds whole offsets (DeepSpeed ZeRO-3, FSDP1); FSDP2's shards
            are gathered, so all processes have to call this.
        """
        changes = [self._change(layer) for layer in self.layers]
        if not changes or any(change is None for change in changes):
            return {}
        whole = [change for change in changes if change is not None]
        device = whole[0].device
        squares = torch.stack([change.square().sum().to(device) for change in whole])
        largest = torch.stack([change.abs().max().to(device) for change in whole])
        *sums, maximum = torch.cat([squares, largest.max().unsqueeze(0)]).tolist()  # the one wait for the device
        counts = [change.numel() for change in whole]

        def rms(members: Iterable[int]) -> float:
            members = list(members)
            return math.sqrt(sum(sums[i] for i in members) / sum(counts[i] for i in members))

        statistics = {"z/rms_change": rms(range(len(sums))), "z/max_change": maximum}
        if by_place:
            statistics |= {f"z/{group}": rms(members) for group, members in self.groups.items()}
        return statistics

    def _change(self, layer: SVFLayer) -> Tensor | None:
        """z − 1 of one layer under its active adapters, shape (…, k); None if this process has only a part of it."""
        changes = []
        for name in [name for name in layer.active_adapters if name in layer.svf_offset]:
            offset = layer.svf_offset[name]
            weight: Any = offset.weight.full_tensor() if isinstance(offset.weight, DTensor) else offset.weight
            if not isinstance(offset, SVFOffset) or weight.shape != self.shapes.get(id(offset), weight.shape):
                return None
            change = functional_call(offset, {"weight": weight}, (layer.svf_singular_values,))
            changes.append(change * layer.svf_strength[name])
        return stack_offsets(changes).sum(0)


def groups_of(names: list[str]) -> dict[str, list[int]]:
    """Indices of the modules `names` by layer (`layers/3`) and by their own name (`modules/down_proj`), in order.

    Where a model has several stacks of layers, the layer has the name of its stack: `layers/encoder.layers.3`.
    """
    places = [in_layer(name) for name in names]
    stacks = {place.stack for place in places if place}
    groups: dict[str, list[int]] = {}
    for i, place in enumerate(places):
        if place:
            label = str(place.layer) if len(stacks) == 1 else f"{place.stack}.{place.layer}"
            groups.setdefault(f"layers/{label}", []).append(i)
    for i, name in enumerate(names):
        groups.setdefault(f"modules/{name.rpartition('.')[2]}", []).append(i)
    return groups


def _offsets(layer: SVFLayer) -> list[SVFOffset]:
    return list(layer.svf_offset.children())  # type: ignore[arg-type]
