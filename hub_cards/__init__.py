"""Model cards for experts: the README.md that tells a stranger what an expert is and how to run it."""

from __future__ import annotations

from peft_svf.hub_cards.expert_card import ExpertCardData, ExpertResult, render_expert_card, write_expert_card


__all__ = ["ExpertCardData", "ExpertResult", "render_expert_card", "write_expert_card"]
