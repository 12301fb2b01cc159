"""Trained experts as objects."""

from peft_svf.experts.bank import BASE_LABEL, ExpertBank, ExpertBankError, ExpertEntry


__all__ = ["BASE_LABEL", "ExpertBank", "ExpertBankError", "ExpertEntry"]
