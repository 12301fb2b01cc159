"""The playground: a small real base model with its experts, and generated problems to train and test them on.

`pipeline("transformer2-generation")` loads the bank in this folder. Everything in it was made by `examples/tiny_lab`.
"""

from __future__ import annotations

from pathlib import Path

from peft_svf.playground.generate import generate_problems
from peft_svf.playground.problem import SPLITS, Problem


BANK_FOLDER = Path(__file__).parent / "bank"
"""Folder of the embedded bank: `base/` and one folder for each expert."""

__all__ = ["BANK_FOLDER", "SPLITS", "Problem", "generate_problems"]
