"""What is known of an expert, kept with the live model that has it for as long as the expert stays what it is."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from peft_svf.tuner.adapted import adapted_layers


_ATTRIBUTE = "_expert_facts"


@dataclass(frozen=True)
class _Known:
    facts: dict[str, Any]
    state: str | None  # of the adapter when they were recorded


def attach_facts(model: nn.Module, adapter_name: str, facts: Mapping[str, Any]) -> None:
    """
    Let a live model know its expert; in place of what it knew of an adapter of this name.

    Args:
        model (`PeftModel`): Has the adapter.
        adapter_name (`str`): The adapter.
        facts (`Mapping[str, Any]`): Of JSON types, the content of an `expert.json`; they are copied.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    known: dict[str, _Known] = vars(model).setdefault(_ATTRIBUTE, {})
    known.pop(adapter_name, None)
    if facts:
        known[adapter_name] = _Known(copy.deepcopy(dict(facts)), _state(model, adapter_name))


def facts_of(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """
    What is known of the expert that a live model has; nothing once its offsets or its strength are others.

    An expert that is trained on is another one: results of the former would be false of it.
    """
    known = _known(model, adapter_name)
    return {} if known is None or facts_are_outdated(model, adapter_name) else copy.deepcopy(known.facts)


def facts_are_outdated(model: nn.Module, adapter_name: str) -> bool:
    """Whether there were facts, and the expert is another one now."""
    known = _known(model, adapter_name)
    return known is not None and known.state not in (None, _state(model, adapter_name))


def _known(model: nn.Module, adapter_name: str) -> _Known | None:
    found: dict[str, _Known] = vars(getattr(model, "_orig_mod", model)).get(_ATTRIBUTE, {})
    return found.get(adapter_name)


def _state(model: nn.Module, adapter_name: str) -> str | None:
    """A hash of the adapter's values, whatever their device and dtype; `None` where they are not in memory."""
    found = hashlib.sha256()
    for name, layer in sorted(adapted_layers(model, adapter_name).items()):
        values = layer.svf_offset[adapter_name].get_parameter("weight").detach()
        if values.is_meta:
            return None
        found.update(f"{name} {tuple(values.shape)} {layer.svf_strength[adapter_name]}\n".encode())
        found.update(values.to("cpu", torch.float32).contiguous().numpy().tobytes())
    return found.hexdigest()
