"""Where the singular bases of adapted layers come from: weights, a checkpoint, the disk cache or a saved expert."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from peft_svf.spectrum import SingularBasis, cached_singular_basis, sketch_distance, sketch_of_stack, weight_sketch
from peft_svf.tuner.base_check import OTHER_QUANTIZATION, OTHER_ROUNDING
from peft_svf.tuner.checkpoint_weights import CheckpointWeights
from peft_svf.tuner.distributed import gathered, share_basis
from peft_svf.tuner.layer import SVFLayer
from peft_svf.tuner.names import name_in_state_dict
from peft_svf.tuner.parameter import ParamWrapper


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
    return cached_singular_basis(weight, sketch, _basis_dtype(weight.dtype)), sketch


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


class SavedBasis(nn.Module):
    """Where a loader puts the basis that comes with the weights of an adapter; NaN before that.

    Attributes:
        vectors (`torch.Tensor`): Q, shape (r, k), with one more axis in front for a stack of matrices.
        singular_values (`torch.Tensor`): Shape (r,).
        sketch (`list[float]`): The fingerprint of the weight that Q was computed from.
    """

    vectors: torch.Tensor
    singular_values: torch.Tensor

    def __init__(self, layer: SVFLayer, adapter_name: str, sketch: list[float]) -> None:
        super().__init__()
        shape = _needed_shape(layer, [adapter_name])
        dtype = _basis_dtype(_weight_dtype(layer))  # transformers' loader converts to it
        nan = torch.full((), torch.nan, dtype=dtype, device=layer.base_device())  # expanded, it takes no memory
        self.register_buffer("vectors", nan.expand(shape))
        self.register_buffer("singular_values", nan.to(torch.promote_types(dtype, torch.float32)).expand(shape[:-1]))
        self.sketch = sketch


class SavedBases(nn.ModuleDict):
    """[`SavedBasis`] by adapter name: `svf_saved_basis` of a layer, as long as it waits for the weights of an adapter.

    Keys in a checkpoint are `<module>.svf_saved_basis.vectors` and `.singular_values`. They are made like those of the
    offsets, so that transformers' `load_adapter`, which knows nothing of SVF, finds its way to them.
    """

    def hand_over(self, layer: SVFLayer) -> None:
        """Give the layer the basis with the most columns.

        Raises:
            RuntimeError: It was not loaded or is damaged.
        """
        each = [saved for saved in self.values() if isinstance(saved, SavedBasis)]
        saved = max(each, key=lambda saved: saved.vectors.shape[-1])
        try:
            basis = _checked_basis(layer.svf_name, layer, saved.vectors, saved.singular_values)
        except ValueError as error:
            raise RuntimeError(f"{error}, or the weights of the adapter were not loaded") from error
        layer.set_basis(basis, saved.sketch)
        stop_waiting(layer)


def wait_for_bases(layers: dict[str, SVFLayer], adapter_name: str, fingerprint: dict[str, list[float]]) -> None:
    """Make room for the bases of an adapter that was saved with them, in those of the layers that need one.

    Args:
        layers (`dict[str, SVFLayer]`): Adapted layers by the name in the fingerprint.
        adapter_name (`str`): The adapter.
        fingerprint (`dict[str, list[float]]`): The sketches that it was saved with.

    Raises:
        ValueError: The fingerprint lacks a module.
    """
    for name, layer in layers.items():
        if not layer.needs_basis():
            continue
        if name not in fingerprint:
            raise ValueError(f"the adapter's configuration lacks the fingerprint of '{name}'; the file is damaged")
        layer._modules.setdefault("svf_saved_basis", SavedBases())
        layer.svf_saved_basis[adapter_name] = SavedBasis(layer, adapter_name, fingerprint[name])


def stop_waiting(layer: SVFLayer) -> None:
    """Once a layer has its basis, no other is wanted."""
    layer._modules.pop("svf_saved_basis", None)


def common_source(layers: dict[str, SVFLayer]) -> str | None:
    """The checkpoint that the bases of the layers were computed from, if it was one and the same."""
    sources = {layer.svf_basis_source for layer in layers.values()}
    return sources.pop() if len(sources) == 1 else None


def export_bases(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """The bases of an adapter as entries of the state dict of `model`.

    Raises:
        RuntimeError: They have not been loaded yet.
    """
    entries = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SVFLayer) and adapter_name in layer.svf_offset:
            layer.require_basis()
            columns = _needed_shape(layer, [adapter_name])[-1]
            prefix = f"{name_in_state_dict(name)}.svf_saved_basis.{adapter_name}"
            entries[f"{prefix}.vectors"] = layer.svf_basis[..., :columns].contiguous()
            entries[f"{prefix}.singular_values"] = layer.svf_singular_values
    return entries


def import_bases(modules: dict[str, nn.Module], adapter_name: str, entries: dict[str, torch.Tensor]) -> None:
    """Give the entries of [`export_bases`] to the layers that wait for them.

    A loader could do it, as transformers' does, but this finds a damaged file at once and keeps the dtype.

    Args:
        modules (`dict[str, nn.Module]`): The modules of a model by name.
        adapter_name (`str`): The adapter.
        entries (`dict[str, torch.Tensor]`): The entries, with the same names and without that of the adapter.

    Raises:
        ValueError: An entry is missing or does not fit; the message names the module. No layer was changed.
    """
    layers = {name: layer for name, layer in modules.items() if isinstance(layer, SVFLayer)}
    found: list[tuple[SVFLayer, SingularBasis, list[float]]] = []
    for name, layer in layers.items():
        rooms = layer._modules.get("svf_saved_basis")
        if rooms is not None and (room := rooms._modules.get(adapter_name)) is not None:
            found.append((layer, _checked_basis(name, layer, *_entries_of(name, entries)), room.sketch))
    for layer, basis, sketch in found:
        layer.set_basis(basis, sketch)
        stop_waiting(layer)


def _entries_of(name: str, entries: dict[str, torch.Tensor]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    prefix = f"{name}.svf_saved_basis"
    return entries.get(f"{prefix}.vectors"), entries.get(f"{prefix}.singular_values")


def _checked_basis(
    name: str, layer: SVFLayer, vectors: torch.Tensor | None, singular_values: torch.Tensor | None
) -> SingularBasis:
    if vectors is None or singular_values is None:
        raise ValueError(f"the expert was saved with `save_basis=True`, but its file lacks the basis of '{name}'")
    *shape, columns = _needed_shape(layer, layer.svf_offset)
    found_columns = vectors.shape[-1] if vectors.dim() else 0
    if list(vectors.shape[:-1]) != shape or found_columns < columns or list(singular_values.shape) != shape:
        raise ValueError(
            f"the saved singular basis of '{name}' has shape {tuple(vectors.shape)}, but the layer needs "
            f"{(*shape, columns)}; load the expert onto the model it was trained on"
        )
    if not (vectors.is_floating_point() and vectors.isfinite().all() and singular_values.isfinite().all()):
        raise ValueError(f"the saved singular basis of '{name}' holds NaN or infinite values; the file is damaged")
    return SingularBasis(layer.svf_side, vectors, singular_values)


def _needed_shape(layer: SVFLayer, adapter_names: Iterable[str]) -> tuple[int, ...]:
    """(r, k) of the basis that some adapters of a layer need, with one more axis in front for a stack of matrices."""
    shapes = [layer.svf_offset[name].get_parameter("weight").shape for name in adapter_names]
    return (*shapes[0][:-1], layer.components, max(shape[-1] for shape in shapes))


def _weight_dtype(layer: SVFLayer) -> torch.dtype:
    """The dtype of the base weight, dequantized if that tells it; the format of a quantized one does not."""
    weight = next(layer.get_base_layer().parameters(), None)
    if weight is None or layer.quantization_backend is not None:
        return getattr(getattr(weight, "quant_state", None), "dtype", torch.float32)  # bitsandbytes, 4 bits
    return weight.dtype


def _basis_dtype(weight_dtype: torch.dtype) -> torch.dtype:
    """What the basis of a weight is kept in: the dtype of the weight, or float32 for formats of fewer bits."""
    return weight_dtype if weight_dtype in (torch.float16, torch.bfloat16, torch.float64) else torch.float32
