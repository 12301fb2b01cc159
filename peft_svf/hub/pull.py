"""pull: an expert or a bank from one commit on the Hub, checked before anything is written where it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from peft_svf.experts.adapter_files import read_config
from peft_svf.experts.bank_config import BASE_FOLDER, BankConfig, check_replaceable, is_bank
from peft_svf.experts.download import Download, download
from peft_svf.experts.errors import ExpertError
from peft_svf.experts.expert import Expert
from peft_svf.experts.files import make_readable, replaced_folder
from peft_svf.hub.bank_staging import copy_bank
from peft_svf.hub.layout import ADAPTER, BANK, EXPERT, OF_BANK, OF_CARD, OF_EXPERT, PROCESSING, is_ours_of_expert
from peft_svf.hub.staging import check_expert, copy_files


_WEIGHTS = ("*.safetensors", "*.json")  # of a base model inside a bank; no pickles, no code


@dataclass(frozen=True)
class Pulled:
    """
    What was pulled, and where it lies now.

    Args:
        folder (`Path`): The folder asked for, or that of the commit in the Hub's cache.
        repo_id (`str`), commit (`str`): What it is.
        kind (`str`): `"an expert"` or `"a bank"`.
        base_model (`str`), base_revision (`str`, *optional*): The base model; `"base"` if a bank holds it.
        fingerprints (`dict[str, str]`):
            By expert ("" for a single one), twelve characters that stand for the base model's weights.
    """

    folder: Path
    repo_id: str
    commit: str
    kind: str
    base_model: str
    base_revision: str | None
    fingerprints: dict[str, str]

    @property
    def has_base(self) -> bool:
        """Whether the base model came along."""
        return self.kind == BANK and self.base_model == BASE_FOLDER


def pull(
    repo_id: str, folder: str | Path | None = None, *, revision: str | None = None, token: str | None = None
) -> Pulled:
    """
    Download an expert or a bank from one commit, and check it as loading does; no base model is needed for that.

    The offsets are safetensors, have shapes that their weights have, and are finite; each expert has a fingerprint of
    its base model, which loading compares. Only files that experts and banks consist of are taken, never code.

    Args:
        repo_id (`str`): `"user/name"`.
        folder (`str` or `Path`, *optional*):
            Where to put it: a new or empty folder, or one that holds an expert or bank, which is replaced. By default
            it stays in the Hub's cache.
        revision (`str`, *optional*, defaults to the main branch): Branch, tag or commit.
        token (`str`, *optional*): Hub token; by default the one of `hf auth login` or HF_TOKEN.

    Returns:
        [`Pulled`]: What it is, and where.

    Raises:
        HubError: There is no such repository or revision, or it cannot be downloaded.
        ExpertError: It is damaged or not acceptable, or the folder holds something else. Nothing is written there.
    """
    target = None if folder is None else Path(folder).absolute()
    first = download(repo_id, revision, token, ["config.json", ADAPTER], "an expert or a bank")
    kind = _kind_of(first)
    if target is not None:
        _check_target(target, kind)
    patterns = list(OF_EXPERT) if kind == EXPERT else _bank_patterns(BankConfig.read(first.folder, is_foreign=True))
    found = download(repo_id, first.commit, token, patterns, kind)
    pulled = _checked(found, kind)
    if target is None:
        return pulled
    with replaced_folder(target) as staging:
        if kind == EXPERT:
            copy_files(found.folder, staging, OF_EXPERT)
        else:
            copy_bank(found.folder, staging, keeps_base=(found.folder / BASE_FOLDER).is_dir())
            BankConfig.read(staging).write(staging)  # with code of our own in place of the repository's
        make_readable(staging)
    return replace(pulled, folder=target)


def _kind_of(found: Download) -> str:
    where = f"{found.repo_id} at {found.commit[:7]}"
    if is_bank(found.folder, where):
        return BANK
    if (found.folder / ADAPTER).is_file():
        return EXPERT
    raise ExpertError(
        f"{where} is neither an expert nor a bank: it has no {ADAPTER}, and no config.json of a bank. Check the name."
    )


def _bank_patterns(config: BankConfig) -> list[str]:
    patterns = [*OF_BANK, *OF_CARD]
    patterns += [f"{name}/{pattern}" for name in config.adapters for pattern in OF_EXPERT]
    if config.base_model_name_or_path == BASE_FOLDER:
        patterns += [f"{BASE_FOLDER}/{pattern}" for pattern in (*_WEIGHTS, *PROCESSING)]
    return [pattern for pattern in patterns if not pattern.endswith(".py")]


def _checked(found: Download, kind: str) -> Pulled:
    where = f"{found.repo_id} at {found.commit[:7]}"
    if kind == EXPERT:
        folders, base = {"": found.folder}, None
    else:
        bank = BankConfig.read(found.folder, is_foreign=True)
        folders, base = {name: found.folder / name for name in bank.adapters}, bank
        if bank.base_model_name_or_path == BASE_FOLDER and not (found.folder / BASE_FOLDER / "config.json").is_file():
            raise ExpertError(f"{where} is incomplete: its base model is missing; ask for it to be pushed again.")
    fingerprints = {}
    for name, folder in folders.items():
        what = f"expert '{name}' of {where}" if name else where
        check_expert(folder, what)
        config = read_config(folder, what)
        fingerprints[name] = Expert({}, config).fingerprint_id or ""
    model, revision = (
        (config.base_model_name_or_path, config.revision)
        if base is None
        else (base.base_model_name_or_path, base.base_revision)
    )
    return Pulled(found.folder, found.repo_id, found.commit, kind, model, revision, fingerprints)


def _check_target(target: Path, kind: str) -> None:
    """Refuse to replace a folder that holds anything but the same kind."""
    if kind == BANK:
        return check_replaceable(target)
    paths = [path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()]
    strange = [path for path in paths if not is_ours_of_expert(path)]
    if target.is_file() or strange:
        raise ExpertError(
            f"{target} holds {strange[0] if strange else 'a file'}, not only an expert; choose a new folder."
        )
