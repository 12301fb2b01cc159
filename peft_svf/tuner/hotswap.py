"""Replace an expert by another one in place: the same tensors, so nothing is compiled or allocated again.

PEFT's `hotswap_adapter` is for LoRA only. `model.load_adapter(path, <existing name>)` copies in place too, but never
looks at the new expert's configuration: one of another base model or parametrization is swapped in silently.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.utils.hub import cached_file

from peft_svf.tuner.adapted import adapted_name
from peft_svf.tuner.base_check import check_base_model
from peft_svf.tuner.config import SVFConfig
from peft_svf.tuner.layer import SVFLayer
from peft_svf.tuner.names import PEFT_PREFIX, name_in_base


OFFSET_SUFFIX = ".svf_offset.weight"
BASIS_INFIX = ".svf_saved_basis."  # of `save_basis=True`; the model has these bases already


def hotswap_adapter(
    model: nn.Module,
    model_name_or_path: str | Path,
    adapter_name: str = "default",
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
) -> None:
    """
    Replace the values of a loaded expert by those of another one, in place.

    Everything about the new expert is checked before the first value is copied: on an error nothing has changed. No
    tensor is replaced, so that a model which `torch.compile` has compiled goes on without compiling again. Layers that
    the new expert does not adapt get offset 0, which is the base model. The strength of the adapter
    ([`SVFModel.set_strength`]) and whether it is trainable stay as they are.

    Args:
        model (`nn.Module`): The model with the loaded expert, compiled or not.
        model_name_or_path (`str` or `Path`): Folder or Hub id of the new expert, in safetensors format.
        adapter_name (`str`, *optional*, defaults to `"default"`): The loaded expert, which keeps its name.
        subfolder, revision, cache_dir, token: As in `PeftConfig.from_pretrained`.

    Raises:
        ValueError: There is no such adapter or it is merged; the new expert belongs to another base model, adapts more
            layers or parts of the model, has another rank or parametrization, or its file is damaged.
        OSError: There is no such file.

    Example:

    ```py
    >>> model = torch.compile(PeftModel.from_pretrained(base_model, "experts/math"))
    >>> hotswap_adapter(model, "experts/code")  # `model` is now the code expert, without compiling again
    ```
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    live = _find_live(model, adapter_name)
    hub = {"revision": revision, "cache_dir": cache_dir, "token": token}
    new_config = PeftConfig.from_pretrained(str(model_name_or_path), subfolder=subfolder, **hub)
    _check_config(new_config, live.config, model_name_or_path, adapter_name)
    _check_base(model, new_config, set(live.layers.values()))
    new = _read_tensors(model_name_or_path, subfolder or "", hub)
    _check_names(new, live.tensors, model_name_or_path, adapter_name)
    _check_layers(new, new_config, live.layers)
    _check_values(new, live.tensors)
    with torch.no_grad():
        for key, tensor in live.tensors.items():
            if key in new:
                tensor.copy_(new[key])
            else:
                tensor.zero_()
    # What is saved later: the new expert's values in all of the old one's layers, whose other settings stay right.
    live.config.base_model_name_or_path = new_config.base_model_name_or_path or live.config.base_model_name_or_path
    live.config.revision = new_config.revision


class _Live(NamedTuple):
    """The loaded adapter: its tensors, not copies, and the names of what it adapts, by their keys in a checkpoint."""

    config: SVFConfig
    tensors: dict[str, torch.Tensor]
    layers: dict[str, str]


def _find_live(model: nn.Module, adapter_name: str) -> _Live:
    configs = getattr(model, "peft_config", {})
    config = configs.get(adapter_name)
    if not isinstance(config, SVFConfig):
        raise ValueError(
            f"there is no SVF adapter named '{adapter_name}' to replace; loaded are {', '.join(configs) or 'none'}; "
            "add a new one with `load_adapter`"
        )
    live = _Live(config, {}, {})
    for name, module in model.named_modules():
        prefix = PEFT_PREFIX + name_in_base(name)
        if isinstance(module, SVFLayer) and adapter_name in module.svf_offset:
            _refuse_merged(module, adapter_name)
            live.tensors[prefix + OFFSET_SUFFIX] = module.svf_offset[adapter_name].get_parameter("weight")
            live.layers[prefix + OFFSET_SUFFIX] = name_in_base(adapted_name(name, module))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            parts = module.state_dict()
            for saved, key in module.adapter_state_dict_load_map(adapter_name).items():
                live.tensors[f"{prefix}.{saved}"] = parts[key]
    return live


def _refuse_merged(layer: SVFLayer, adapter_name: str) -> None:
    if adapter_name in layer.merged_adapters:
        raise ValueError(
            f"the adapter '{adapter_name}' is merged into the base weights; call `model.unmerge_adapter()` before "
            "replacing it"
        )


def _read_tensors(source: str | Path, subfolder: str, hub: dict[str, Any]) -> dict[str, torch.Tensor]:
    path = str(cached_file(str(source), SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **hub))
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"'{path}' is damaged ({error}); save or download the expert again") from error
    tensors = {key: tensor for key, tensor in tensors.items() if BASIS_INFIX not in key}
    if not any(key.endswith(OFFSET_SUFFIX) for key in tensors):
        raise ValueError(f"'{path}' holds no offsets; save the expert again")
    return tensors


def _check_config(new: PeftConfig, live: SVFConfig, source: str | Path, adapter_name: str) -> None:
    if not isinstance(new, SVFConfig):
        kind = PeftType(new.peft_type).value
        raise ValueError(f"'{source}' is an adapter of type {kind}; only an SVF expert can replace an SVF expert")
    for name in ("parametrization", "trainable_token_indices"):
        if getattr(new, name) != getattr(live, name):
            raise ValueError(
                f"the expert in '{source}' has {name}={getattr(new, name)!r}, '{adapter_name}' has "
                f"{getattr(live, name)!r}; {_under_a_new_name(source)}"
            )


def _check_base(model: nn.Module, config: SVFConfig, live: set[str]) -> None:
    """Compare the fingerprint of the new expert with the sketches that the live layers have; no weight is read."""
    if not config.base_fingerprint:
        warnings.warn("the new expert has no fingerprint of its base model, so nothing tells whether it is this one")
        return
    base: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    base = getattr(base, "_orig_mod", base)
    # Other layers of this model are refused later, for what they are.
    compared = {n: sketch for n, sketch in config.base_fingerprint.items() if n in live or not _exists(base, n)}
    config = copy.copy(config)
    config.base_fingerprint = compared
    check_base_model(base, config)


def _exists(model: nn.Module, name: str) -> bool:
    owner, _, last = name.rpartition(".")
    try:
        return hasattr(model.get_submodule(owner), last)
    except AttributeError:
        return False


def _check_names(
    new: dict[str, torch.Tensor], live: dict[str, torch.Tensor], source: str | Path, adapter_name: str
) -> None:
    additional = [key for key in new if key not in live]
    if additional:
        raise ValueError(
            f"the expert in '{source}' also holds {_list(additional)}, which '{adapter_name}' does not; "
            + _under_a_new_name(source)
        )
    in_full = [key for key in live if key not in new and not key.endswith(OFFSET_SUFFIX)]
    if in_full:
        raise ValueError(
            f"'{adapter_name}' also trains {_list(in_full)}, for which the expert in '{source}' has no values; "
            + _under_a_new_name(source)
        )


def _check_layers(new: dict[str, torch.Tensor], config: SVFConfig, layers: dict[str, str]) -> None:
    """The file must hold the offsets of the layers that the configuration knows, and of these only.

    A layer that it lacks is damage, not an expert without that layer. And the keys of fused expert parameters tell how
    many of a module are adapted, not which.
    """
    known = config.base_fingerprint
    wrong = [name for key, name in layers.items() if known and (key in new) != (name in known)]
    if wrong:
        raise ValueError(
            f"the new expert's file and its configuration disagree about {_list(wrong)}: the file is damaged, or the "
            "expert adapts other fused parameters; save it again, or load it onto a model of its own"
        )


def _check_values(new: dict[str, torch.Tensor], live: dict[str, torch.Tensor]) -> None:
    for key, tensor in new.items():
        name, expected = _list([key]), live[key]
        if tensor.shape != expected.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} in the new expert and {tuple(expected.shape)} in the loaded "
                "one: their ranks differ; load the new one under a new name with `load_adapter`"
            )
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN, infinite values or no numbers; the new expert's file is damaged")


def _list(keys: list[str], most: int = 4) -> str:
    """Checkpoint keys as module names for a message, the first few of them."""
    names = [f"'{key.removeprefix(PEFT_PREFIX).removesuffix(OFFSET_SUFFIX)}'" for key in keys]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _under_a_new_name(source: str | Path) -> str:
    return f"load it under a new name: `model.load_adapter('{source}', <new name>)`"
