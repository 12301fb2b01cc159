"""Edits of a bank's folder that need no base model: experts are files, and their fingerprints tell the base."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from peft_svf.experts.adapter_files import read_adapter, read_config, read_facts
from peft_svf.experts.bank_changes import entry_of, renamed_entries
from peft_svf.experts.bank_config import (
    LANGUAGE,
    VISION_LANGUAGE,
    BankConfig,
    ExpertBankError,
    ExpertEntry,
    check_entries,
)
from peft_svf.experts.bank_loading import expert_folder
from peft_svf.experts.expert import write_facts
from peft_svf.experts.files import make_readable, replaced_folder
from peft_svf.experts.same_base import check_same_base


Finish: TypeAlias = "Callable[[Path, Path], object]"  # with the new folder and the place that it is going to take


@dataclass(frozen=True)
class NewExpert:
    """
    An expert that a bank's folder is to get.

    Args:
        source (`str` or `Path`): Folder or Hub id of an SVF adapter.
        label (`str`, *optional*): The word that a dispatcher scores; defaults to what its facts say, else its name.
        description (`str`, *optional*): Which prompts it is for, one line; defaults to what its facts say.
        revision, token (`str`, *optional*): For a Hub id.
    """

    source: str | Path
    label: str | None = None
    description: str = ""
    revision: str | None = None
    token: str | None = field(default=None, repr=False)


def create_bank_folder(
    folder: str | Path,
    base_model: str | Path,
    experts: Mapping[str, NewExpert],
    *,
    base_revision: str | None = None,
    classifier: tuple[str, NewExpert] | None = None,
    instruction: str | None = None,
    finish: Finish | None = None,
) -> Path:
    """
    Write the folder of a bank, as `ExpertBank.save_pretrained` does, from the folders of its experts.

    Args:
        folder (`str` or `Path`): Where to; not there yet, or empty.
        base_model (`str` or `Path`): Folder or Hub id; only its configuration and tokenizer are read.
        experts (`Mapping[str, NewExpert]`): By name, at least one.
        base_revision (`str`, *optional*): Of a base model on the Hub.
        classifier (`tuple[str, NewExpert]`, *optional*): Name and place of the adapter that classifies prompts.
        instruction (`str`, *optional*): Of the prompt dispatcher.
        finish (`Callable[[Path, Path], object]`, *optional*):
            Called with the folder before it takes its place, and with that place; to write a card, for instance.

    Raises:
        ExpertError: An expert is missing, damaged, or of another base model than the others; a name or label cannot
            be; there is no such base model. Nothing was written.
    """
    target = Path(folder).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ExpertBankError(f"{target} exists; choose a new folder, or change the bank that is there.")
    base = str(Path(base_model).absolute()) if Path(base_model).is_dir() else str(base_model)
    revision = None if Path(base).is_dir() else base_revision
    architecture, processing = _read_base(base, revision)
    found = {name: _find(name, new) for name, new in experts.items()}
    entries = {name: entry_of(name, new.label, new.description, found[name][1]) for name, new in experts.items()}
    if not entries:
        raise ExpertBankError("A bank needs at least one expert.")
    if classifier is not None:
        found[classifier[0]] = _find(*classifier)
    judge = None if classifier is None else classifier[0]
    check_entries(entries, judge)
    check_same_base((f"expert '{name}'", read_config(place, name)) for name, (place, _) in found.items())
    config = BankConfig(base, entries, revision, instruction, judge, architecture=architecture)
    with replaced_folder(target) as staging:
        for name, (place, facts) in found.items():
            _copy_expert(place, facts, staging / name, base)
        processing.save_pretrained(staging)
        _complete(staging, target, config, finish)
    return target


def add_to_bank_folder(folder: str | Path, name: str, new: NewExpert, finish: Finish | None = None) -> None:
    """
    Add an expert to a bank's folder; arguments and errors as of [`create_bank_folder`].

    Raises:
        ExpertError: See there; or the bank has an expert of this name.
    """
    target, config = _read(folder)
    if name in config.adapters:
        raise ExpertBankError(f"The bank has '{name}' already; remove it first, or choose another name.")
    check_entries({name: ExpertEntry(name if new.label is None else new.label, new.description)}, config.classifier)
    place, facts = _find(name, new)
    entries = {**config.experts, name: entry_of(name, new.label, new.description, facts)}
    check_entries(entries, config.classifier)
    others = [(f"expert '{known}'", read_config(target / known, known)) for known in config.adapters]
    check_same_base([*others, (f"expert '{name}'", read_config(place, name))])
    with _edited(target, replace(config, experts=entries), finish) as staging:
        _copy_expert(place, facts, staging / name, config.base_model_name_or_path)


def remove_from_bank_folder(folder: str | Path, name: str, finish: Finish | None = None) -> None:
    """Remove an expert, or the classifier, from a bank's folder; `ExpertBankError` if it is unknown or the last."""
    target, config = _read(folder)
    _check_known(config, name, "remove")
    experts = {expert: entry for expert, entry in config.experts.items() if expert != name}
    if not experts:
        raise ExpertBankError(f"'{name}' is the only expert of the bank; a bank in a folder has at least one.")
    classifier = None if name == config.classifier else config.classifier
    with _edited(target, replace(config, experts=experts, classifier=classifier), finish) as staging:
        shutil.rmtree(staging / name)


def rename_in_bank_folder(
    folder: str | Path, name: str, new_name: str, label: str | None = None, finish: Finish | None = None
) -> None:
    """Rename an expert, which keeps its label unless it gets another, or the classifier; see [`ExpertBank.rename`]."""
    target, config = _read(folder)
    _check_known(config, name, "rename")
    if new_name in config.adapters and new_name != name:
        raise ExpertBankError(f"The bank has '{new_name}' already; remove it first, or choose another name.")
    if name == config.classifier and label is not None:
        raise ExpertBankError(f"'{name}' is the classifier, which has no label.")
    entries = renamed_entries(config.experts, name, new_name, label)
    classifier = new_name if name == config.classifier else config.classifier
    check_entries(entries, classifier)
    with _edited(target, replace(config, experts=entries, classifier=classifier), finish) as staging:
        (staging / name).rename(staging / new_name)


def describe_in_bank_folder(
    folder: str | Path,
    name: str,
    label: str | None = None,
    description: str | None = None,
    finish: Finish | None = None,
) -> None:
    """Give an expert of a bank's folder another label or description; what is not given stays."""
    target, config = _read(folder)
    if name not in config.experts:
        _check_known(config, name, "describe")
        raise ExpertBankError(f"'{name}' is the classifier, which has no label.")
    given = {key: value for key, value in (("label", label), ("description", description)) if value is not None}
    entries = {**config.experts, name: replace(config.experts[name], **given)}
    check_entries(entries, config.classifier)
    with _edited(target, replace(config, experts=entries), finish):
        pass


def _read(folder: str | Path) -> tuple[Path, BankConfig]:
    target = Path(folder).absolute()
    if not target.is_dir():
        raise ExpertBankError(f"There is no bank folder {folder}; one on the Hub is pulled first (peft-svf pull).")
    return target, BankConfig.read(target)


def _check_known(config: BankConfig, name: str, action: str) -> None:
    if name not in config.adapters:
        known = ", ".join(f"'{adapter}'" for adapter in config.adapters)
        raise ExpertBankError(f"The bank has no '{name}' to {action}; it has {known}.")


def _find(name: str, new: NewExpert) -> tuple[Path, dict[str, Any]]:
    """The folder of an expert, read and checked as a stranger's, and its facts."""
    where = f"the expert {new.source}"
    place = expert_folder(new.source, new.revision, new.token)
    read_adapter(place, where)
    return place, read_facts(place, where)


def _read_base(base: str, revision: str | None) -> tuple[str, Any]:
    """The architecture of a bank on a base model, and the model's tokenizer or processor."""
    hub = {} if Path(base).is_dir() else {"revision": revision}
    try:
        config = AutoConfig.from_pretrained(base, **hub)
        has_images = any(
            name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values() for name in config.architectures or []
        )
        processing = (AutoProcessor if has_images else AutoTokenizer).from_pretrained(base, **hub)
    except (OSError, ValueError, SafetensorError) as error:
        raise ExpertBankError(f"There is no base model {base!r}: {' '.join(str(error).split())}") from error
    return VISION_LANGUAGE if has_images else LANGUAGE, processing


def _copy_expert(place: Path, facts: dict[str, Any], folder: Path, base: str) -> None:
    folder.mkdir()
    shutil.copyfile(place / SAFETENSORS_WEIGHTS_NAME, folder / SAFETENSORS_WEIGHTS_NAME)
    config = json.loads((place / CONFIG_NAME).read_text("utf-8"))
    config["base_model_name_or_path"] = base
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    if facts:
        write_facts(folder, facts)


@contextmanager
def _edited(target: Path, config: BankConfig, finish: Finish | None) -> Iterator[Path]:
    """A copy of a bank that takes its place when the block ends, with another configuration."""
    with replaced_folder(target) as staging:
        shutil.copytree(target, staging, dirs_exist_ok=True, copy_function=_copy_or_link)
        yield staging
        _complete(staging, target, config, finish)


def _copy_or_link(source: str, copy: str) -> None:
    """Weights, which no edit changes, are not copied: a base model may be large."""
    if source.endswith(".safetensors"):
        try:
            os.link(os.path.realpath(source), copy)
            return
        except OSError:  # another file system, or one without links
            pass
    shutil.copy2(source, copy)


def _complete(staging: Path, target: Path, config: BankConfig, finish: Finish | None) -> None:
    config.write(staging)
    make_readable(staging)
    if finish is not None:
        finish(staging, target)
