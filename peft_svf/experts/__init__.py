"""Trained experts as objects: alone, in banks, mixed (`algebra`), moved to another base (`transfer`), exported."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from peft_svf.experts.bank import BASE_LABEL, ExpertBank, ExpertBankError, ExpertEntry
from peft_svf.experts.errors import ExpertError, HubError
from peft_svf.experts.expert import Expert
from peft_svf.experts.lora_export import LoraError, convert_to_lora, save_as_lora


if TYPE_CHECKING:
    from peft_svf.experts import algebra, transfer
    from peft_svf.experts.merged_export import MergeError, save_merged
    from peft_svf.experts.mergekit import save_for_mergekit
    from peft_svf.experts.released_code import import_released_expert

# The functions of `algebra` and `transfer` stay in these packages: `algebra.mix`, `transfer.transfer`
__all__ = [
    "BASE_LABEL",
    "Expert",
    "ExpertBank",
    "ExpertBankError",
    "ExpertEntry",
    "ExpertError",
    "HubError",
    "LoraError",
    "MergeError",
    "algebra",
    "convert_to_lora",
    "import_released_expert",
    "save_as_lora",
    "save_for_mergekit",
    "save_merged",
    "transfer",
]

_PACKAGES = ("algebra", "transfer")
_LATER = {
    "MergeError": "merged_export",
    "import_released_expert": "released_code",
    "save_for_mergekit": "mergekit",
    "save_merged": "merged_export",
}


def __getattr__(name: str) -> Any:
    """What few programs need comes when it is asked for."""
    if name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name in _LATER:
        return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
