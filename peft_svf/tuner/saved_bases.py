"""Singular bases that are saved with an expert (`save_basis=True`), so that loading it computes nothing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from peft_svf.spectrum import SingularBasis
from peft_svf.tuner.layer import SVFLayer, basis_dtype
from peft_svf.tuner.names import name_in_state_dict


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
        dtype = basis_dtype(_weight_dtype(layer))  # transformers' loader converts to it
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
