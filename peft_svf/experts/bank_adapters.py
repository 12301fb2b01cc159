"""Adapters taken out of a model or renamed in it, with everything else of the model as it was."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from peft_svf.experts.bank_loading import load_expert
from peft_svf.experts.live_facts import attach_facts, facts_of
from peft_svf.tuner.adapted import adapted_layers


def remove_adapter(model: PeftModel, name: str) -> PeftModel | PreTrainedModel:
    """Delete an adapter; without the last one the base model is left."""
    if len(model.peft_config) == 1:
        return model.unload()  # no PeftModel computes without an adapter
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT: another adapter is active now
        model.delete_adapter(name)
    for parameter, flag in flags:  # PEFT makes that one trainable
        parameter.requires_grad_(flag)
    return model


def rename_adapter(model: PeftModel, name: str, new_name: str) -> None:
    """
    Call an SVF adapter by another name: its copy is loaded under the new name, then the old one is deleted.

    PEFT and SVF keep adapters by their names in many places, whole modules and token embeddings among them, so saving
    and loading is the way that is sure to miss none. Strength, flags and active adapters are kept.

    Args:
        model (`PeftModel`): changed in place; as it was if loading fails.
        name, new_name (`str`): the adapter; a name that the model has no adapter of.

    Raises:
        ExpertBankError: the model cannot have an adapter of the new name.
    """
    tuner: Any = model.base_model
    active = [new_name if adapter == name else adapter for adapter in model.active_adapters]
    flags = {_renamed(key, name, new_name): p.requires_grad for key, p in model.named_parameters()}
    strengths = {key: layer.svf_strength[name] for key, layer in adapted_layers(model, name).items()}
    with tempfile.TemporaryDirectory(prefix="peft-svf-") as folder:
        root = Path(folder) / name if name == "default" else Path(folder)  # PEFT writes "default" at the root
        model.save_pretrained(str(root), selected_adapters=[name], save_embedding_layers=False)
        load_expert(model, Path(folder) / name, new_name, "the bank")
    model.peft_config[new_name].inference_mode = model.peft_config[name].inference_mode
    facts = facts_of(model, name)
    order = [new_name if adapter == name else adapter for adapter in model.peft_config][:-1]
    remove_adapter(model, name)
    for adapter in order:
        model.peft_config[adapter] = model.peft_config.pop(adapter)
    for key, layer in adapted_layers(model, new_name).items():
        layer.svf_strength[new_name] = strengths[key]
    attach_facts(model, new_name, facts)
    if list(model.active_adapters) != active:
        tuner.set_adapter(active)
        model.active_adapter = active[0] if len(active) == 1 else active
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(flags[key])


def _renamed(key: str, name: str, new_name: str) -> str:
    """A parameter's name; no module of the base model is called as an adapter is."""
    return ".".join(new_name if part == name else part for part in key.split("."))
