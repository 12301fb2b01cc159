"""The experts that `peft-svf inspect` looks into: from a folder, from a bank, or from the Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from peft_svf.cli.sharing.bank import PLAYGROUND
from peft_svf.dispatch.few_shot.examples import ADAPTATION_FILE
from peft_svf.experts.adapter_files import EXPERT_FILE, read_json
from peft_svf.experts.bank_config import BankConfig, is_bank
from peft_svf.experts.download import download, is_hub_id
from peft_svf.experts.errors import ExpertError
from peft_svf.experts.expert import Expert
from peft_svf.hub_cards import ExpertCardData, expert_card_data
from peft_svf.playground import BANK_FOLDER


LEARNING_CURVE = "learning_curve.csv"
LARGEST = 64 * 2**20  # bytes of a JSON file
_OF_EXPERT = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, EXPERT_FILE, ADAPTATION_FILE, LEARNING_CURVE)


@dataclass(frozen=True)
class Inspected:
    """
    An expert and where it lies.

    Args:
        name (`str`): What it is called here, unique among those that are inspected together.
        expert ([`~peft_svf.experts.Expert`]): The expert.
        folder (`Path`): Of its files.
        facts ([`~peft_svf.hub_cards.ExpertCardData`]): What is known of it.
        fault (`str`, *optional*): Why its `expert.json` cannot be used.
    """

    name: str
    expert: Expert
    folder: Path
    facts: ExpertCardData = field(repr=False)
    fault: str | None = None

    @property
    def file_bytes(self) -> int:
        """Size of the file with the offsets."""
        return (self.folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size

    def mixture(self) -> dict[str, Any] | None:
        """The weights that a few-shot search has found; `None` if the expert does not come from one."""
        path = self.folder / ADAPTATION_FILE
        weights = read_json(path, self.expert.source, LARGEST).get("weights") if path.is_file() else None
        return weights if isinstance(weights, dict) else None

    def learning_curve(self) -> Path | list[dict[str, Any]] | None:
        """What its training has logged: the file beside it, or the rows in its facts."""
        path = self.folder / LEARNING_CURVE
        rows = [dict(row) for row in self.facts.learning_curve if "step" in row]
        return path if path.is_file() else rows or None


def find_experts(source: str, subfolder: str | None, revision: str | None = None) -> list[Inspected]:
    """
    The expert in `source`, or all experts of a bank there.

    Args:
        source (`str`): A folder, an id on the Hub, or "playground", the bank that comes with the package.
        subfolder (`str`, *optional*): One expert of a bank.
        revision (`str`, *optional*): For an id on the Hub.

    Raises:
        ExpertError: There is no such expert, it is damaged, or it holds logits instead of offsets.
    """
    folder = Path(BANK_FOLDER) if source == PLAYGROUND and not Path(source).exists() else Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ExpertError(f"--revision is for ids on the Hub; {source} is a folder.")
        bank = _bank_in(folder)
    else:
        folder, bank = _downloaded(source, revision)
    if bank is not None:
        return [_read(folder / name, name, source, bank) for name in _chosen(bank, subfolder, source)]
    if subfolder is not None:
        raise ExpertError(f"--subfolder names an expert of a bank, and {source} is no bank.")
    return [_read(folder, Path(source).name or str(Path(source).resolve().name), source)]


def with_unique_names(experts: Sequence[Inspected]) -> list[Inspected]:
    """The same experts; those with a name that another one has are numbered."""
    names: dict[str, int] = {}
    unique = []
    for one in experts:
        names[one.name] = names.get(one.name, 0) + 1
        unique.append(one if names[one.name] == 1 else replace(one, name=f"{one.name}-{names[one.name]}"))
    return unique


def _read(folder: Path, name: str, source: str, bank: BankConfig | None = None) -> Inspected:
    where = f"the expert {source}" if bank is None else f"the expert '{name}' of {source}"
    expert = replace(Expert.from_pretrained(folder), source=where)
    fault = None
    try:
        facts = expert_card_data(expert, name)
    except ValueError as error:
        fault, facts = str(error), expert_card_data(replace(expert, metadata={}), name)
    if bank is not None and name in bank.experts:
        entry = bank.experts[name]  # what the dispatcher goes by
        facts = replace(facts, label=entry.label, description=entry.description or facts.description)
    return Inspected(re.sub(r"[^\w.-]", "_", name), expert, folder, facts, fault)


def _bank_in(folder: Path) -> BankConfig | None:
    return BankConfig.read(folder) if is_bank(folder, f"the bank {folder}") else None


def _chosen(bank: BankConfig, subfolder: str | None, source: str) -> list[str]:
    if subfolder is None:
        return bank.adapters
    if subfolder not in bank.adapters:
        raise ExpertError(f"The bank {source} has no expert '{subfolder}'; it has {', '.join(bank.adapters)}.")
    return [subfolder]


def _downloaded(source: str, revision: str | None) -> tuple[Path, BankConfig | None]:
    """The folder of an expert or a bank on the Hub, of one commit; a base model inside a bank stays there."""
    if not is_hub_id(source):
        raise ExpertError(f"There is no folder {source}, and it is no id on the Hub (user/name).")
    first = download(source, revision, None, ["config.json", CONFIG_NAME], "an expert or a bank")
    bank = _bank_in(first.folder)
    if bank is None:
        return download(source, first.commit, None, list(_OF_EXPERT), "an expert").folder, None
    patterns = ["config.json", *(f"{name}/{file}" for name in bank.adapters for file in _OF_EXPERT)]
    return download(source, first.commit, None, patterns, "a bank").folder, bank
