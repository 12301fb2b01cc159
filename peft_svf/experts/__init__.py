"""Trained experts as objects."""

from peft_svf.experts.bank import BASE_LABEL, ExpertBank, ExpertBankError, ExpertEntry
from peft_svf.experts.errors import ExpertError, HubError
from peft_svf.experts.expert import Expert
from peft_svf.experts.lora_export import LoraError, convert_to_lora, save_as_lora


__all__ = [
    "BASE_LABEL",
    "Expert",
    "ExpertBank",
    "ExpertBankError",
    "ExpertEntry",
    "ExpertError",
    "HubError",
    "LoraError",
    "convert_to_lora",
    "save_as_lora",
]
