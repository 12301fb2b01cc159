"""The dispatcher that a command's arguments ask for."""

from __future__ import annotations

import argparse

from peft_svf.dispatch import ClassifierDispatcher, Dispatcher, PromptDispatcher
from peft_svf.experts import ExpertBank


def dispatcher_kind(bank: ExpertBank, arguments: argparse.Namespace) -> str:
    """
    `"prompt"` or `"classifier"`.

    Raises:
        ValueError: If the classification expert is asked for and there is none.
    """
    if arguments.dispatcher == "prompt" or bank.classifier is None:
        if arguments.dispatcher == "classifier":
            raise ValueError(
                "the bank has no classification expert: pass one with --classifier, or use --dispatcher prompt"
            )
        return "prompt"
    return "classifier"


def build_dispatcher(bank: ExpertBank, arguments: argparse.Namespace) -> Dispatcher:
    """The dispatcher of `--dispatcher`, with `--margin` and `--calibrate`."""
    options = {"margin": arguments.margin, "calibrate": arguments.calibrate}
    if dispatcher_kind(bank, arguments) == "classifier":
        return ClassifierDispatcher(bank, **options)
    return PromptDispatcher(bank, **options)
