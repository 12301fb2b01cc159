"""Where the singular bases of adapted layers come from: weights, a checkpoint, the disk cache or a saved expert."""

from __future__ import annotations

import torch
from transformers.utils import logging

from peft_svf.spectrum import SingularBasis, weight_sketch
try:
    from peft_svf.spectrum.cache import cached_singular_basis
except ImportError:
    from peft_svf.spectrum import singular_basis
    def cached_singular_basis(weight, sketch, dtype):
        b = singular_basis(weight)
        return SingularBasis(b.side, b.vectors.to(weight.device, dtype), b.singular_values)
from peft_svf.tuner.checkpoint_weights import CheckpointWeights
from peft_svf.tuner.layer import SVFLayer


SECONDS_WITHOUT_PROGRESS_BAR = 2.0
SAVED_PARTS = ("svf_basis", "svf_singular_values")


def compute_bases(layers: dict[str, SVFLayer], basis_source: str | None) -> None:
    """Give a singular basis to those of the layers that need one, layer after layer, on each layer's own device.

    Args:
        layers (`dict[str, SVFLayer]`): Adapted layers by module name.
        basis_source (`str`, *optional*): Folder or Hub id of the checkpoint to take the weights from, instead of the
            layers themselves.

    Raises:
        ValueError: A weight has no singular basis, cannot be dequantized or is missing from `basis_source`; the
            message names the module.
    """
    pending = {name: layer for name, layer in layers.items() if layer.needs_basis()}
    checkpoint = CheckpointWeights(basis_source) if basis_source and pending else None
    for name, layer in logging.tqdm(pending.items(), desc="Singular bases", delay=SECONDS_WITHOUT_PROGRESS_BAR):
        try:
            weight = _weight_of(layer) if checkpoint is None else checkpoint.read(name).to(layer.base_device())
            _compute_basis(layer, layer.to_matrix(weight))
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"SVF cannot adapt '{name}': {error}") from error


def _compute_basis(layer: SVFLayer, weight: torch.Tensor) -> None:
    sketch = weight_sketch(weight)
    dtype = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16, torch.float64) else torch.float32
    layer.set_basis(cached_singular_basis(weight, sketch, dtype), sketch)


def _weight_of(layer: SVFLayer) -> torch.Tensor:
    try:
        return layer.unmerged_weight()
    except TypeError as error:
        raise ValueError(
            f"its weight, of type {type(layer.get_base_layer()).__name__}, cannot be dequantized; pass "
            "`basis_source=<folder or Hub id of the unquantized base model>` to SVFConfig, or load an expert that was "
            "saved with `save_basis=True`"
        ) from error


def export_bases(layers: dict[str, SVFLayer]) -> dict[str, torch.Tensor]:
    """The bases as entries of a checkpoint: `<module name>.svf_basis` and `<module name>.svf_singular_values`."""
    return {f"{name}.{part}": getattr(layer, part) for name, layer in layers.items() for part in SAVED_PARTS}


def import_bases(
    layers: dict[str, SVFLayer], state_dict: dict[str, torch.Tensor], fingerprint: dict[str, list[float]]
) -> None:
    """Take the entries of [`export_bases`] out of `state_dict` and give them to the layers that need a basis.

    Args:
        layers (`dict[str, SVFLayer]`): Adapted layers by module name.
        state_dict (`dict[str, torch.Tensor]`): A checkpoint by the same names; loses the entries.
        fingerprint (`dict[str, list[float]]`): The sketches that came with the checkpoint.

    Raises:
        ValueError: An entry is missing or does not fit; the message names the module. No layer was changed.
    """
    found = {
        name: SingularBasis(layer.svf_side, *(state_dict.pop(f"{name}.{part}", None) for part in SAVED_PARTS))
        for name, layer in layers.items()
    }
    pending = [name for name in found if layers[name].needs_basis()]
    for name in pending:
        _check_saved_basis(name, layers[name], found[name])
    for name in pending:
        layers[name].set_basis(found[name], fingerprint[name])


def _check_saved_basis(name: str, layer: SVFLayer, basis: SingularBasis) -> None:
    if basis.vectors is None or basis.singular_values is None:
        raise ValueError(
            f"the expert was saved with `save_basis=True` but its file lacks the singular basis of '{name}'"
        )
    components = layer.components
    columns = max(offset.weight.shape[0] for offset in layer.svf_offset.values())
    rows, found_columns = basis.vectors.shape if basis.vectors.dim() == 2 else (0, 0)
    if rows != components or found_columns < columns or basis.singular_values.shape != (components,):
        raise ValueError(
            f"the saved singular basis of '{name}' has shape {tuple(basis.vectors.shape)}, but the layer needs "
            f"({components}, {columns}); load the expert onto the model it was trained on"
        )
    if not (torch.isfinite(basis.vectors).all() and torch.isfinite(basis.singular_values).all()):
        raise ValueError(f"the saved singular basis of '{name}' holds NaN or infinite values; the file is damaged")
