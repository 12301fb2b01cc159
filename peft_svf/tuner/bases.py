"""Where the singular bases of adapted layers come from: their weights, another checkpoint, or the disk cache."""

from __future__ import annotations

from functools import partial

import torch
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from peft_svf.spectrum import SingularBasis, cached_singular_basis, sketch_distance, sketch_of_stack, weight_sketch
from peft_svf.tuner.base_check import OTHER_QUANTIZATION, OTHER_ROUNDING
from peft_svf.tuner.checkpoint_weights import CheckpointWeights
from peft_svf.tuner.distributed import gathered, share_basis
from peft_svf.tuner.layer import SVFLayer, basis_dtype
from peft_svf.tuner.parameter import ParamWrapper
from peft_svf.tuner.saved_bases import stop_waiting


SECONDS_WITHOUT_PROGRESS_BAR = 2.0


def compute_bases(layers: dict[str, SVFLayer], basis_source: str | None) -> None:
    """Give a singular basis to those of the layers that need one, layer after layer, on each layer's own device.

    Args:
        layers (`dict[str, SVFLayer]`): Adapted layers by module name.
        basis_source (`str`, *optional*): Folder or Hub id of the checkpoint to take the weights from, instead of the
            layers themselves.

    Raises:
        ValueError: A weight has no singular basis, cannot be dequantized, is missing from `basis_source` or is another
            one there, or is not the one that the layer's basis was computed from; the message names the module.
    """
    pending = {
        name: layer
        for name, layer in layers.items()
        if layer.needs_basis() or basis_source not in (None, layer.svf_basis_source)
    }
    checkpoint = CheckpointWeights(basis_source) if basis_source and pending else None
    for name, layer in logging.tqdm(pending.items(), desc="Singular bases", delay=SECONDS_WITHOUT_PROGRESS_BAR):
        try:
            share_basis(layer, partial(_prepare_basis, name, layer, checkpoint))
            stop_waiting(layer)
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"SVF cannot adapt '{name}': {error}") from error


def _prepare_basis(name: str, layer: SVFLayer, checkpoint: CheckpointWeights | None) -> None:
    weight = _weight_of(layer) if checkpoint is None else _read_weight(checkpoint, name, layer)
    _check_same_weight(layer, weight)
    if not layer.needs_basis():
        return
    if isinstance(layer, ParamWrapper):
        layer.compute_basis(weight, _find_basis)
    else:
        layer.set_basis(*_find_basis(weight))
    layer.svf_basis_source = None if checkpoint is None else checkpoint.source


def _find_basis(weight: torch.Tensor) -> tuple[SingularBasis, list[float]]:
    """The singular basis and the sketch of one matrix."""
    sketch = weight_sketch(weight)
    return cached_singular_basis(weight, sketch, basis_dtype(weight.dtype)), sketch


def _weight_of(layer: SVFLayer) -> torch.Tensor:
    """The layer's own weight, shape (out, in)."""
    try:
        with gathered(layer.get_base_layer()) as is_gathered:
            weight = layer.to_matrix(layer.unmerged_weight())
            return weight.clone() if is_gathered else weight
    except (TypeError, NotImplementedError) as error:
        raise ValueError(
            f"its weight, of type {type(layer.get_base_layer()).__name__}, cannot be dequantized; pass "
            "`basis_source=<folder or Hub id of the unquantized base model>` to SVFConfig, or load an expert that was "
            "saved with `save_basis=True`"
        ) from error


def _read_weight(checkpoint: CheckpointWeights, name: str, layer: SVFLayer) -> torch.Tensor:
    """The layer's weight as the checkpoint has it, shape (out, in)."""
    if isinstance(layer, ParamWrapper):
        weight = checkpoint.read_parameter(name).to(layer.base_device())
        expected = layer.get_param().shape
    else:
        weight = checkpoint.read(name).to(layer.base_device())
        expected = torch.Size((layer.out_features, layer.in_features))
        # A quantized layer that replaces a Conv1D remembers it; the checkpoint still has the weight as (in, out).
        base_layer = layer.get_base_layer()
        weight = weight.T if issubclass(getattr(base_layer, "source_cls", type(base_layer)), Conv1D) else weight
    if weight.shape != expected:
        raise ValueError(f"its shape is {tuple(expected)}, that in '{checkpoint.source}' {tuple(weight.shape)}")
    try:
        own = _weight_of(layer)
    except ValueError:
        return weight  # cannot be dequantized, so cannot be compared
    distance = 0.0 if own.is_meta else sketch_distance(_sketch(own), _sketch(weight))
    if distance > OTHER_QUANTIZATION and weight.isfinite().all():
        raise ValueError(
            f"its weight in '{checkpoint.source}' is another one: it differs by {distance:.1e} of its norm; give the "
            "unquantized checkpoint of this model as `basis_source`"
        )
    return weight


def _check_same_weight(layer: SVFLayer, weight: torch.Tensor) -> None:
    """Adapters on one layer share its basis, so a basis with more columns must come from the same weight."""
    if layer.svf_sketch is None:
        return
    distance = sketch_distance(layer.svf_sketch, _sketch(weight))
    if distance > OTHER_ROUNDING:
        raise ValueError(
            f"it has a singular basis already, of a weight that differs by {distance:.1e} of its norm; give all "
            "adapters of a model the same `basis_source`, and load them before the first forward pass"
        )


def _sketch(weight: torch.Tensor) -> list[float]:
    """The sketch of a matrix or of a stack of matrices."""
    return weight_sketch(weight) if weight.dim() == 2 else sketch_of_stack([weight_sketch(each) for each in weight])


def common_source(layers: dict[str, SVFLayer]) -> str | None:
    """The checkpoint that the bases of the layers were computed from, if it was one and the same."""
    sources = {layer.svf_basis_source for layer in layers.values()}
    return sources.pop() if len(sources) == 1 else None
