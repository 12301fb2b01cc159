"""What an adapter is on disk: its offsets, the fingerprint of its base model and, if asked for, its singular bases."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import delete_adapter
from peft.utils import _get_submodules
from torch import nn

from peft_svf.tuner.adapted import adapted_layers
from peft_svf.tuner.base_check import collect_fingerprint
from peft_svf.tuner.bases import common_source
from peft_svf.tuner.config import SVFConfig
from peft_svf.tuner.distributed import keys_behind_wrappers
from peft_svf.tuner.layer import SVFLayer
from peft_svf.tuner.names import name_in_base
from peft_svf.tuner.saved_bases import export_bases, import_bases


Tensors = dict[str, torch.Tensor]


def complete_checkpoint(
    model: nn.Module, config: SVFConfig, adapter_name: str, state_dict: Tensors, entries: Tensors
) -> Tensors:
    """Add what PEFT does not know of to the `entries` of an adapter that it chose from the `state_dict` of `model`.

    Also writes the fingerprint of this base model into `config`, which PEFT saves next.
    """
    layers = adapted_layers(model, adapter_name)
    config.base_fingerprint = collect_fingerprint({name_in_base(name): layer for name, layer in layers.items()})
    config.basis_source = config.basis_source or common_source(layers)
    hidden_keys = keys_behind_wrappers(model, adapter_name).values()
    entries.update({key: state_dict[key] for key in hidden_keys if key in state_dict})
    return {**entries, **export_bases(model, adapter_name)} if config.save_basis else entries


def take_bases(model: nn.Module, adapter_name: str, state_dict: Tensors) -> Tensors:
    """Give the singular bases in a checkpoint to the layers that wait for them, and return the rest of it.

    Raises:
        ValueError: They are damaged or do not fit. The adapter is taken out of the model again.
    """
    hidden_keys = keys_behind_wrappers(model, adapter_name)
    rest = {hidden_keys.get(key, key): tensor for key, tensor in state_dict.items()}
    bases = {name_in_base(key): rest.pop(key) for key in list(rest) if ".svf_saved_basis." in key}
    try:
        import_bases({name_in_base(name): module for name, module in model.named_modules()}, adapter_name, bases)
    except ValueError:
        _take_out(model, adapter_name)
        raise
    return rest


def complete_offsets(model: nn.Module, adapter_name: str, state_dict: Tensors) -> Tensors:
    """Add zeros for the offsets that the adapter has and the checkpoint lacks, so that none of the old ones stays.

    Warns:
        If there are such offsets.

    Raises:
        ValueError: Offsets of another length. Nothing is changed yet; `load_state_dict` would copy the others first.
    """
    ending = f".svf_offset.{adapter_name}.weight"
    here = {key: value for key, value in model.state_dict().items() if key.endswith(ending)}
    for key, value in here.items():
        found = state_dict.get(key)
        if found is not None and found.shape != value.shape:
            raise ValueError(
                f"the checkpoint has {found.numel()} offsets for '{name_in_base(key.removesuffix(ending))}', the "
                f"adapter '{adapter_name}' has {value.numel()}; load it under another name"
            )
    missing = [key for key in here if key not in state_dict]
    state_dict.update({key: torch.zeros(here[key].shape, dtype=here[key].dtype) for key in missing})
    if missing:
        warnings.warn(
            f"the checkpoint has no offsets for {len(missing)} of the modules that the adapter '{adapter_name}' "
            f"adapts, for instance '{name_in_base(missing[0].removesuffix(ending))}'; they work as in the base model"
        )
    return state_dict


def _take_out(model: nn.Module, adapter_name: str) -> None:
    """Undo the injection of an adapter whose weights turn out to be unusable."""
    delete_adapter(model, adapter_name, "svf_", SVFLayer)
    for name, layer in reversed(list(model.named_modules())):  # wrappers of one module from the inside to the outside
        if isinstance(layer, SVFLayer) and not layer.svf_offset:
            parent, _, child_name = _get_submodules(model, name)
            setattr(parent, child_name, layer.base_layer)
    peft_config: Any = model.peft_config
    peft_config.pop(adapter_name, None)
