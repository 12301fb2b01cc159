"""Model cards for experts and banks: the README.md that tells a stranger what it is and how to run it."""

from __future__ import annotations

from peft_svf.hub_cards.adapter import expert_card_data
from peft_svf.hub_cards.bank_card import render_bank_card, write_bank_card
from peft_svf.hub_cards.bank_facts import BankCardData, Confusion, bank_card_data
from peft_svf.hub_cards.expert_card import render_expert_card, write_expert_card
from peft_svf.hub_cards.expert_facts import ExpertCardData
from peft_svf.hub_cards.results import Benchmark, ExpertResult


__all__ = [
    "BankCardData",
    "Benchmark",
    "Confusion",
    "ExpertCardData",
    "ExpertResult",
    "bank_card_data",
    "expert_card_data",
    "render_bank_card",
    "render_expert_card",
    "write_bank_card",
    "write_expert_card",
]
