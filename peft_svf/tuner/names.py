"""Names of modules: as the base model has them, with the wrappers of PEFT and torch, and in a state dict."""

from __future__ import annotations

import re
from typing import NamedTuple


PEFT_PREFIX = "base_model.model."  # of names in a PeftModel and in every checkpoint
# What FSDP1 and activation checkpointing put into the names of modules, but not into those of a state dict.
HIDDEN_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_IN_LAYER = re.compile(r"(?:(.*?)\.)?(\d+)\.(.+)")


class InLayer(NamedTuple):
    """A module's name taken apart: `"model.layers.3.mlp.up_proj"` is `("model.layers", 3, "mlp.up_proj")`."""

    stack: str  # of layers; "" where names begin with the number
    layer: int
    rest: str


def name_in_state_dict(module_name: str) -> str:
    """The name of a module as the keys of a state dict have it."""
    for wrapper in HIDDEN_WRAPPERS:
        module_name = module_name.replace(wrapper, "")
    return module_name


def in_layer(name: str) -> InLayer | None:
    """Where a module is among the layers of a model, by the first number in its name; `None` outside of them."""
    match = _IN_LAYER.fullmatch(name)
    return None if match is None else InLayer(match[1] or "", int(match[2]), match[3])


def name_in_base(name: str) -> str:
    """A module's name as seen from the base model, without the wrappers of PEFT and torch."""
    for wrapper in (PEFT_PREFIX, "_orig_mod."):
        name = name.replace(wrapper, "")
    return name_in_state_dict(name)
