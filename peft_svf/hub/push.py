"""push_expert and push_bank: from an expert or a bank to one commit on the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.utils import logging

from peft_svf.experts.adapter_files import read_config, read_facts
from peft_svf.experts.bank_config import BankConfig
from peft_svf.experts.errors import ExpertError
from peft_svf.experts.expert import Expert
from peft_svf.experts.live_facts import facts_are_outdated
from peft_svf.hub.bank_staging import base_of_bank, finish_bank, stage_bank
from peft_svf.hub.base_reference import find_base
from peft_svf.hub.destination import Destination, Pushed
from peft_svf.hub.facts import as_mapping, published_facts
from peft_svf.hub.kept_facts import kept_facts, remote_before
from peft_svf.hub.layout import ADAPTER, BANK, EXPERT, OF_EXPERT
from peft_svf.hub.remote import Remote
from peft_svf.hub.staging import copy_files, finish_expert, seal
from peft_svf.hub.upload import upload


if TYPE_CHECKING:
    from peft_svf.experts.bank import ExpertBank

logger = logging.get_logger(__name__)
_REMEDY = "push the base model first (its push_to_hub), then give its id, base_model='user/base' (--base-model)."


def push_expert(
    source: Expert | str | Path | nn.Module,
    repo_id: str,
    *,
    adapter_name: str = "default",
    base_model: str | None = None,
    base_revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    tag: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    collection: str | None = None,
    tags: Sequence[str] = (),
    facts: Any = None,
) -> Pushed:
    """
    Put an expert on the Hub in one commit: the adapter, its facts (`expert.json`) and the card made of them.

    It can be loaded by PEFT (`PeftModel.from_pretrained(base, repo_id)`, after `import peft_svf`), as an
    [`~peft_svf.Expert`], and added to a bank. Pushing the same again commits nothing. Call it in one process only.

    The facts of a live model are those that it was loaded or trained with, as long as its values are the same. What
    the repository says already and this push does not stays, if it is the same expert; of another one, only name,
    label, description, license and languages ([`peft_svf.hub.kept_facts`]).

    Args:
        source ([`~peft_svf.Expert`], `str`, `Path` or `nn.Module`): The expert, its folder, or a model that has it.
        repo_id (`str`): `"user/name"`; without a user, yours. The repository is created if there is none.
        adapter_name (`str`, *optional*, defaults to `"default"`): Which adapter of a model.
        base_model (`str`, *optional*):
            Hub id of the base model. By default it is found: from how the base model was loaded, or what the expert
            says. Needed if the base model was loaded from a folder.
        base_revision (`str`, *optional*):
            Commit of the base model. By default the one that the expert records, or that this machine has in the
            Hub's cache; with `base_model`, the newest.
        private (`bool`, *optional*): Whether a new repository is private; one that exists stays as it is.
        token (`str`, *optional*): Hub token; by default the one of `hf auth login` or HF_TOKEN.
        branch (`str`, *optional*, defaults to `"main"`): Created if there is none.
        tag (`str`, *optional*): A name for the commit, like `"v1"`.
        commit_message, commit_description (`str`, *optional*): Of the commit.
        create_pr (`bool`, *optional*, defaults to `False`): Open a pull request instead.
        collection (`str`, *optional*): Title or slug of a collection, see [`add_to_collection`].
        tags (`Sequence[str]`, *optional*): Further tags of the card.
        facts (`Mapping` or [`~peft_svf.hub_cards.ExpertCardData`], *optional*):
            What the card says besides; a value of `None` takes back what the repository says.

    Returns:
        [`Pushed`]: The page, the commit, and whether there was anything new.

    Raises:
        HubError: The base model is not on the Hub, the Hub refused, or it cannot be reached. Nothing is half written.
        ExpertError: The expert is damaged.
    """
    destination = Destination(
        repo_id, private, token, branch, tag, commit_message, commit_description, create_pr, collection, tuple(tags)
    ).with_namespace()
    return push_experts({"": (source, adapter_name)}, destination, (base_model, base_revision), facts)


def push_experts(
    sources: Mapping[str, tuple[Expert | str | Path | nn.Module, str]],
    destination: Destination,
    given_base: tuple[str | None, str | None] = (None, None),
    facts: Any = None,
) -> Pushed:
    """
    Put several experts into one repository: the one called `""` at its root, others into folders of their names.

    Args:
        sources (`Mapping[str, tuple]`): By folder, what [`push_expert`] takes, with the name of the adapter.
        destination ([`Destination`]): Where.
        given_base (`tuple[str | None, str | None]`, *optional*): Hub id and revision of the base model.
        facts (*optional*): Of the expert at the root.
    """
    before: Remote | None = None
    with tempfile.TemporaryDirectory() as temporary:
        staging = Path(temporary) / "repository"
        places: set[str] = {temporary}
        for name, (source, adapter_name) in sources.items():
            expert = _read(source, adapter_name)
            what = _what(source, adapter_name)
            candidates = _candidates(source, expert)
            base = find_base(given_base, candidates, what, _REMEDY, destination.api)
            folder = staging / name
            recorded = _write(expert, folder, what)
            before = before or remote_before(destination)
            given = {} if name else as_mapping(facts)
            kept = kept_facts(before, destination, folder, name, {*recorded, *given})
            title, repo_id = (name, None) if name else (destination.repo_id.split("/")[1], destination.repo_id)
            told = published_facts(recorded, given, title, repo_id, base, kept)
            local = candidates[0][0]
            finish_expert(folder, base, told, what, local)
            places |= {*_absolute(local), *_absolute(expert)}
        seal(staging, destination.tags, sorted(places))
        return upload(staging, destination, EXPERT, before or remote_before(destination))


def push_bank(
    bank_or_folder: ExpertBank | str | Path,
    repo_id: str,
    *,
    include_base: bool = False,
    base_model: str | None = None,
    base_revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    tag: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    collection: str | None = None,
    tags: Sequence[str] = (),
    facts: Any = None,
) -> Pushed:
    """
    Put a bank on the Hub in one commit, so that its id is all that `pipeline` and `ExpertBank.from_pretrained` need.

    `pipeline("transformer2-generation", model=repo_id, trust_remote_code=True)` then works wherever peft-svf is
    installed, also where it is not imported. Experts that a former push left and this bank has no more are removed;
    files of your own stay. Call it in one process only.

    Args:
        bank_or_folder ([`~peft_svf.ExpertBank`], `str` or `Path`): The bank, or the folder it was saved in.
        include_base (`bool`, *optional*, defaults to `False`): Put the base model into the repository, too.
        facts (`Mapping` or [`~peft_svf.hub_cards.BankCardData`], *optional*):
            What the bank's card says of the bank as a whole: name, description, license, confusion.
        repo_id, base_model, base_revision, private, token, branch, tag, commit_message, commit_description, create_pr,
        collection, tags: As in [`push_expert`].

    Returns:
        [`Pushed`]: The page, the commit, and whether there was anything new.

    Raises:
        HubError: The base model is not on the Hub, the Hub refused, or it cannot be reached. Nothing is half written.
        ExpertError: The bank or one of its experts is damaged.
    """
    destination = Destination(
        repo_id, private, token, branch, tag, commit_message, commit_description, create_pr, collection, tuple(tags)
    ).with_namespace()
    source: ExpertBank | Path = bank_or_folder  # type: ignore[assignment]
    config = None
    if isinstance(bank_or_folder, str | Path):
        source = Path(bank_or_folder).absolute()
        if not source.is_dir():
            raise ExpertError(f"There is no bank folder {bank_or_folder}.")
        config = BankConfig.read(source)
    base, local = base_of_bank(source, config, (base_model, base_revision), include_base, destination.api)
    with tempfile.TemporaryDirectory() as temporary:
        staging = Path(temporary) / "repository"
        stage_bank(source, staging, base)
        before = remote_before(destination)
        finish_bank(staging, base, facts, destination, before, local)
        places = {temporary, *_absolute(local), *_absolute(source)}
        seal(staging, destination.tags, sorted(places))
        return upload(staging, destination, BANK, before)


def _read(source: Expert | str | Path | nn.Module, adapter_name: str) -> Expert | Path:
    """The expert to push, or its folder, which may hold logits that no `Expert` holds."""
    if isinstance(source, Expert):
        return source
    if isinstance(source, nn.Module):
        if facts_are_outdated(source, adapter_name):
            logger.warning(
                f"The adapter '{adapter_name}' has changed since its facts were recorded (task, results and so on), "
                "so its card does not repeat them; pass facts={...} with what is true of it now."
            )
        return Expert.from_model(source, adapter_name)
    folder = Path(source)
    if not (folder / ADAPTER).is_file():
        raise ExpertError(f"There is no expert in {source}: it has no {ADAPTER}; save one there with save_pretrained.")
    return folder


def _what(source: object, adapter_name: str) -> str:
    if isinstance(source, Expert):
        return source.source
    return f"the adapter '{adapter_name}'" if isinstance(source, nn.Module) else f"the expert {source}"


def _candidates(source: object, expert: Expert | Path) -> list[tuple[str | None, str | None]]:
    """Names and commits of the base model: as it is loaded, then as the expert records it."""
    config = expert.config if isinstance(expert, Expert) else read_config(expert, f"the expert {expert}")
    recorded = (config.base_model_name_or_path, config.revision)
    loaded = getattr(source, "config", None) if isinstance(source, nn.Module) else None
    if loaded is None:
        return [recorded]
    name = str(getattr(loaded, "_name_or_path", "") or "") or None
    commit = getattr(loaded, "_commit_hash", None) or (recorded[1] if name == recorded[0] else None)
    return [(name, commit), recorded]


def _write(expert: Expert | Path, folder: Path, what: str) -> Mapping[str, Any]:
    """Write the adapter; returns what is recorded of the expert."""
    if isinstance(expert, Path):
        copy_files(expert, folder, OF_EXPERT)
        return read_facts(folder, what)
    folder.mkdir(parents=True)
    written = expert.save_pretrained(folder)
    return read_facts(written, what)


def _absolute(place: object) -> list[str]:
    """The path of a folder of this machine, if it is one."""
    return [str(Path(place).absolute())] if isinstance(place, str | Path) and Path(place).is_dir() else []
