"""Loading what the commands route over: a bank, or a base model with experts, from folders or the Hub."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from peft_svf.cli.models import check_adapter
from peft_svf.experts import BASE_LABEL, ExpertBank
from peft_svf.experts.adapter_files import read_facts
from peft_svf.experts.bank_changes import entry_of
from peft_svf.experts.bank_config import MODEL_TYPE
from peft_svf.experts.bank_loading import expert_folder
from peft_svf.playground import BANK_FOLDER


CLASSIFIER = "classifier"
CARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


def check_bank_arguments(arguments: argparse.Namespace) -> dict[str, str]:
    """
    The experts that `--adapter` adds, by name, once model and adapters are known to be there.

    Raises:
        ValueError: If model or adapter is not there, or a name cannot be or is there twice. Nothing was loaded.
    """
    adapters = _named_adapters(arguments.adapter)
    classifier = getattr(arguments, "classifier", None)
    for adapter in [*adapters.values(), *([] if classifier is None else [classifier])]:
        check_adapter(adapter)
    if arguments.model is not None:
        _kind(arguments)
    return adapters


def load_bank(arguments: argparse.Namespace, state: PartialState) -> ExpertBank:
    """
    The bank of `--model` (the playground's without it), or a bank of a base model, with the experts of `--adapter` on
    it; on the processor or the accelerator of this process.

    Raises:
        ValueError: See [`check_bank_arguments`].
        ExpertError: If the bank or an expert cannot be loaded.
    """
    adapters = check_bank_arguments(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT's and transformers' own
    logging.disable_progress_bar()  # of loading weights
    options: dict[str, Any] = {"dtype": arguments.dtype}
    if arguments.device_map is not None:
        options["device_map"] = arguments.device_map
    source: str | Path = BANK_FOLDER if arguments.model is None else arguments.model
    if arguments.model is None or _kind(arguments) == MODEL_TYPE:
        bank = ExpertBank.from_pretrained(source, revision=arguments.revision, **options)
    else:
        origin = {"revision": arguments.revision}
        model = AutoModelForCausalLM.from_pretrained(arguments.model, **origin, **options)
        bank = ExpertBank(model, AutoTokenizer.from_pretrained(arguments.model, **origin))
    classifier = getattr(arguments, "classifier", None)
    if adapters or classifier is not None:
        _add_adapters(bank, adapters, classifier)
    if arguments.device_map is None:
        bank.model.to(state.device)
    return bank


def _kind(arguments: argparse.Namespace) -> str:
    """The model type of `--model`; raises a `ValueError` if there is no such model."""
    try:
        return str(AutoConfig.from_pretrained(arguments.model, revision=arguments.revision).model_type)
    except (OSError, ValueError) as error:
        is_expert = "Unrecognized model" in str(error)  # a repository or folder, but not of a model
        remedy = "; an expert is given by --adapter, and its base model by --model" if is_expert else ""
        raise ValueError(
            f"there is no bank or base model {arguments.model!r}: it is no folder with a checkpoint here, and did not "
            f"come from the Hub ({' '.join(str(error).split())}){remedy}"
        ) from error


def _named_adapters(words: Sequence[str]) -> dict[str, str]:
    """`["folder", "name=folder"]` as name to folder or id; the name is the folder's if none is given."""
    adapters: dict[str, str] = {}
    for word in words:
        name, separator, place = word.partition("=")
        if not separator or Path(word).is_dir():
            name, place = Path(word).absolute().name, word
        if not CARD_NAME.fullmatch(name):
            raise ValueError(f"--adapter {word}: {name!r} cannot name an expert; give it a name: NAME={place}")
        if name in adapters:
            raise ValueError(f"--adapter names two experts {name!r}: give them different names, NAME={place}")
        adapters[name] = place
    return adapters


def _add_adapters(bank: ExpertBank, adapters: dict[str, str], classifier: str | None) -> None:
    """Add experts with the labels and descriptions that their facts say; the classifier takes the place of another."""
    if taken := [name for name in adapters if name in (*bank.experts, bank.classifier)]:
        raise ValueError(f"the bank has an expert {taken[0]!r} already: add yours as another, --adapter NAME=FOLDER")
    for name, place in adapters.items():
        folder = expert_folder(place, None, None)
        said = entry_of(name, None, "", read_facts(folder, f"the expert {place}"))
        bank.add(name, folder, label=name if said.label in (BASE_LABEL, *bank.labels) else said.label)
    if adapters:
        bank.instruction = None  # one that is stored does not name the new labels
    if classifier is not None:
        if bank.classifier is not None:
            bank.remove(bank.classifier)
        bank.add_classifier(CLASSIFIER, classifier)
