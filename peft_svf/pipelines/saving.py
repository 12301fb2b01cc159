"""A pipeline as a folder that `transformers.pipeline` loads: its bank, and how its dispatcher was set."""

from __future__ import annotations

import copy
import dataclasses
import logging
from pathlib import Path
from typing import Any

from peft_svf.dispatch import ClassifierDispatcher, Dispatcher, PromptDispatcher
from peft_svf.dispatch.decision import Decision
from peft_svf.dispatch.template import default_instruction
from peft_svf.experts.bank import ExpertBank, ExpertBankError
from peft_svf.experts.bank_saving import base_reference


_KINDS: dict[str, type[PromptDispatcher]] = {"prompt": PromptDispatcher, "classifier": ClassifierDispatcher}

logger = logging.getLogger(__name__)


def save_pipeline(
    bank: ExpertBank, dispatcher: Dispatcher, folder: str | Path, include_base: bool | None = None
) -> Path:
    """
    Write a bank with the options of a dispatcher (see [`ExpertBank.save_pretrained`]).

    Args:
        bank (`ExpertBank`): the bank.
        dispatcher (`Dispatcher`): a [`PromptDispatcher`] or [`ClassifierDispatcher`]; others are not saved, with a
            warning.
        folder (`str` or `Path`): where to write.
        include_base (`bool`, *optional*):
            Also write the base model. By default only if there is no checkpoint that the folder could refer to.
    """
    if include_base is None:
        include_base = not _has_checkpoint(bank, Path(folder).absolute())
    saved = copy.copy(bank)
    saved.dispatcher_options = dispatcher_options(dispatcher, bank)
    return saved.save_pretrained(folder, include_base)


def dispatcher_options(dispatcher: Dispatcher, bank: ExpertBank) -> dict[str, Any] | None:
    """What a dispatcher was created with, where it differs from the one that the bank gets by default."""
    kind = next((name for name, known in _KINDS.items() if type(dispatcher) is known), None)
    if kind is None or not isinstance(dispatcher, PromptDispatcher):
        logger.warning(
            "The %s is not saved with the pipeline: pass dispatcher=... when loading it.", type(dispatcher).__name__
        )
        return None
    default = "prompt" if bank.classifier is None else "classifier"
    options: dict[str, Any] = {} if kind == default else {"kind": kind}
    for field in dataclasses.fields(Decision):
        value = getattr(dispatcher.decision, field.name)
        if value != field.default:
            options[field.name] = value
    if dispatcher.calibrate:
        options["calibrate"] = True
    if dispatcher.instruction != (bank.instruction or default_instruction(list(bank.experts.values()))):
        options["instruction"] = dispatcher.instruction
    return options or None


def saved_dispatcher(bank: ExpertBank) -> Dispatcher | None:
    """
    The dispatcher of the pipeline that was saved as this bank; `None` if it was the default.

    Raises:
        ExpertBankError: options that mean nothing here.
    """
    if bank.dispatcher_options is None:
        return None
    options = dict(bank.dispatcher_options)
    kind = options.pop("kind", "prompt" if bank.classifier is None else "classifier")
    try:
        return _KINDS[kind](bank, **options)
    except (KeyError, TypeError, ValueError) as error:
        raise ExpertBankError(
            f"The bank was saved with a dispatcher that cannot be made here ({error}); pass dispatcher=..."
        ) from error


def _has_checkpoint(bank: ExpertBank, target: Path) -> bool:
    try:
        base_reference(bank, target)
    except ExpertBankError:
        return False
    return True
