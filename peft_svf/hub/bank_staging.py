"""A bank in a folder exactly as it shall be on the Hub: layout B, experts with their cards, the bank's card."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi

from peft_svf.experts.adapter_files import PICKLED, read_facts, read_json
from peft_svf.experts.bank_config import BASE_FOLDER, BankConfig, ExpertBankError
from peft_svf.experts.errors import HubError
from peft_svf.experts.expert import write_facts
from peft_svf.hub.base_reference import BaseReference, find_base
from peft_svf.hub.destination import Destination
from peft_svf.hub.facts import as_mapping, published_facts, without_local_paths
from peft_svf.hub.kept_facts import kept_facts, kept_facts_of_bank
from peft_svf.hub.layout import OF_CARD, OF_EXPERT, PROCESSING
from peft_svf.hub.remote import Remote
from peft_svf.hub.staging import check_expert, copy_files, refer_to
from peft_svf.hub_cards.bank_facts import BANK_FILE, LARGEST


if TYPE_CHECKING:
    from peft_svf.experts.bank import ExpertBank

_NEVER_LOADED = shutil.ignore_patterns("*.py", *(f"*{ending}" for ending in PICKLED))  # of a base model in a bank


def base_of_bank(
    source: ExpertBank | Path,
    config: BankConfig | None,
    given: tuple[str | None, str | None],
    include_base: bool,
    api: HfApi,
) -> tuple[BaseReference, str | None]:
    """
    The base model that a bank on the Hub refers to, and where this machine has it.

    Args:
        source (`ExpertBank` or `Path`): The bank, live or in a folder.
        config (`BankConfig`, *optional*): That of the folder.
        given (`tuple[str | None, str | None]`): Hub id and revision from the user.
        include_base (`bool`): Whether the base model goes along.
        api (`HfApi`): For the commit of a base model on the Hub.

    Raises:
        HubError: The base model is not on the Hub and does not go along.
    """
    if config is None:
        live: Any = source
        loaded = live.base_model.config
        name = str(loaded._name_or_path) or None
        candidates = [(name, getattr(loaded, "_commit_hash", None) or live.base_revision)]
    else:
        name = config.base_model_name_or_path
        if name == BASE_FOLDER:
            name = str(Path(str(source)) / BASE_FOLDER)
        candidates = [(name, config.base_revision)]
    if include_base:
        if given[0] is not None:
            raise HubError(
                "include_base=True puts the base model into the bank, and base_model= refers to one on the "
                "Hub: give one of them."
            )
        return BaseReference(BASE_FOLDER), name
    remedy = (
        "push the base model first (its push_to_hub) and give its id, base_model='user/base' (--base-model), or put "
        "it into the bank with include_base=True (--include-base)."
    )
    return find_base(given, candidates, "the bank", remedy, api), name


def stage_bank(source: ExpertBank | Path, folder: Path, base: BaseReference) -> None:
    """Write what `ExpertBank.save_pretrained` writes into `folder`, referring to `base`; no cards yet."""
    if not isinstance(source, Path):
        _stage_live(source, folder, base)
    elif base.model == BASE_FOLDER and not (source / BASE_FOLDER).is_dir():
        from peft_svf.experts.bank import ExpertBank  # only now is the base model needed

        _stage_live(ExpertBank.from_pretrained(source), folder, base)
    else:
        copy_bank(source, folder, keeps_base=base.model == BASE_FOLDER)
    config = BankConfig.read(folder)
    replace(config, base_model_name_or_path=base.model, base_revision=base.revision).write(folder)


def finish_bank(
    folder: Path, base: BaseReference, given: Any, destination: Destination, before: Remote, local_base: str | None
) -> None:
    """
    Complete the staged experts and the bank itself with facts and cards, and read everything back.

    Args:
        folder (`Path`): Written by [`stage_bank`]; changed in place.
        base ([`BaseReference`]): The base model.
        given (`Mapping[str, Any]` or `BankCardData`, *optional*): What is known of the bank as a whole.
        destination ([`~peft_svf.hub.destination.Destination`]): Where it will be.
        before ([`~peft_svf.hub.remote.Remote`]): What is there now.
        local_base (`str`, *optional*): Where this machine has the base model.
    """
    from peft_svf.hub_cards import write_bank_card, write_expert_card  # not before they are needed: they can draw

    config = BankConfig.read(folder)
    for name in config.adapters:
        what, entry = _what(name), config.experts.get(name)
        defaults = {"label": entry.label, "description": entry.description} if entry else {}
        defaults = {key: value for key, value in defaults.items() if value}
        recorded = read_facts(folder / name, what)
        kept = kept_facts(before, destination, folder / name, name, {*recorded, *defaults})
        facts = published_facts(recorded, None, name, None, base, {**kept, **defaults})
        refer_to(folder / name, base, what, local_base)
        write_facts(folder / name, facts)
        check_expert(folder / name, what)
    if config.classifier is not None:
        write_expert_card(folder / config.classifier, bank=destination.repo_id)
    known = {**_recorded(folder), **as_mapping(given)}
    kept = kept_facts_of_bank(before, destination, folder, config.adapters, known)
    said: dict[str, Any] = {"name": destination.repo_id.split("/")[1], **kept, **known}
    write_bank_card(folder, {**without_local_paths(said), "repo_id": destination.repo_id})
    BankConfig.read(folder)


def _recorded(folder: Path) -> dict[str, Any]:
    path = folder / BANK_FILE
    return read_json(path, "the bank", LARGEST) if path.is_file() else {}


def _what(name: str) -> str:
    return f"expert '{name}' of the bank"


def _stage_live(bank: ExpertBank, folder: Path, base: BaseReference) -> None:
    from peft_svf.experts.bank_saving import save_bank

    saved = save_bank(bank, folder, include_base=base.model == BASE_FOLDER, reference=base.model)
    assert saved == folder


def copy_bank(source: Path, folder: Path, keeps_base: bool) -> None:
    """Copy a bank's own files, without code and without whatever else lies in its folder."""
    config = BankConfig.read(source)
    folder.mkdir(parents=True, exist_ok=True)
    copy_files(source, folder, ("config.json", BANK_FILE, *OF_CARD))
    for name in config.adapters:
        if not (source / name).is_dir():
            raise ExpertBankError(f"The bank {source} is incomplete: its expert '{name}' is missing; save it again.")
        copy_files(source / name, folder / name, OF_EXPERT)
    has_own = any((source / file).is_file() for file in PROCESSING)
    if keeps_base:
        shutil.copytree(source / BASE_FOLDER, folder / BASE_FOLDER, ignore=_NEVER_LOADED)
    if has_own or not keeps_base:  # the tokenizer that the bank was saved with
        copy_files(source if has_own else source / BASE_FOLDER, folder, PROCESSING)
