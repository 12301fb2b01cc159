"""BankCardData: what is known of a bank, from its folder or live, and what `bank.json` keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from peft_svf.experts.adapter_files import read_json
from peft_svf.experts.bank import ExpertBank
from peft_svf.experts.bank_config import BASE_FOLDER, VISION_LANGUAGE, BankConfig, ExpertEntry
from peft_svf.experts.expert import Expert
from peft_svf.hub_cards.adapter import read_expert, with_adapter
from peft_svf.hub_cards.expert_facts import ExpertCardData, is_repo_id


BANK_FILE = "bank.json"  # beside config.json: what is known of the bank as a whole
LARGEST = 2**24  # bytes of it


@dataclass(frozen=True)
class Confusion:
    """
    Which labels a dispatcher gave to prompts whose label is known.

    Args:
        true (`tuple[str, ...]`), chosen (`tuple[str, ...]`): The labels of rows and columns.
        counts (`tuple[tuple[int, ...], ...]`): Prompts by true and chosen label.
        accuracy (`float`, *optional*), interval (`tuple[float, float]`, *optional*):
            Share of prompts that got their own label, and its 95 % interval.
        dispatcher (`str`, *optional*): Which dispatcher, in words.
    """

    true: tuple[str, ...]
    chosen: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    accuracy: float | None = None
    interval: tuple[float, float] | None = None
    dispatcher: str | None = None

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.true) or any(len(row) != len(self.chosen) for row in self.counts):
            raise ValueError("the confusion matrix needs a row for each true and a column for each chosen label")
        if not all(isinstance(count, int) and count >= 0 for row in self.counts for count in row):
            raise ValueError("the confusion matrix holds numbers of prompts: whole and at least 0")

    @classmethod
    def from_json(cls, content: Any) -> Confusion:
        """As `peft-svf route --output` writes it, or `bank.json`; a `ValueError` if it cannot be used."""
        try:
            found, interval = content.get("confusion", content), content.get("interval")
            return cls(
                tuple(map(str, found["true"])),
                tuple(map(str, found["chosen"])),
                tuple(tuple(row) for row in found["counts"]),
                None if content.get("accuracy") is None else float(content["accuracy"]),
                None if interval is None else (float(interval[0]), float(interval[1])),
                None if content.get("dispatcher") is None else str(content["dispatcher"]),
            )
        except (AttributeError, KeyError, TypeError, IndexError) as error:
            raise ValueError(
                "a confusion matrix is what `peft-svf route --output` writes: an object with `confusion`, which has "
                "`true`, `chosen` and `counts`"
            ) from error


@dataclass(frozen=True)
class BankCardData:
    """
    The facts of a bank.

    Args:
        name (`str`): Title of the card.
        experts (`Mapping[str, ExpertEntry]`): Label and description by name.
        facts (`Mapping[str, ExpertCardData]`, *optional*): What is known of each expert, by name.
        repo_id (`str`, *optional*): Where the bank is published.
        base_model, base_revision (`str`, *optional*): Hub id and commit; `"base"` is the folder in the bank.
        instruction (`str`, *optional*), classifier (`str`, *optional*): What its dispatchers use.
        is_vision (`bool`, *optional*, defaults to `False`): Whether the base model sees images.
        confusion ([`Confusion`], *optional*): How well its dispatcher does.
        description, license (`str`, *optional*): Of the bank.
        other (`Mapping`, *optional*): Facts in `bank.json` that no card shows; they are kept.
    """

    name: str
    experts: Mapping[str, ExpertEntry]
    facts: Mapping[str, ExpertCardData] = field(default_factory=dict)
    repo_id: str | None = None
    base_model: str | None = None
    base_revision: str | None = None
    instruction: str | None = None
    classifier: str | None = None
    is_vision: bool = False
    confusion: Confusion | None = None
    description: str | None = None
    license: str | None = None
    other: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise ValueError("a bank's card needs the bank's name")
        if self.repo_id is not None and not is_repo_id(self.repo_id):
            raise ValueError(
                f"repo_id {self.repo_id!r:.80} is not a Hub id such as 'user/bank': leave it out or correct it"
            )

    @property
    def fingerprint_id(self) -> str | None:
        """Of the base model, if the experts adapt the same of its matrices."""
        found = {facts.fingerprint_id for facts in self.facts.values()}
        return found.pop() if len(found) == 1 else None

    def with_metadata(self, metadata: Mapping[str, Any]) -> BankCardData:
        """These facts with those of a `bank.json`; a `ValueError` names one that cannot be used."""
        texts = {name: metadata.get(name) for name in ("name", "repo_id", "description", "license")}
        for name, value in texts.items():
            if not isinstance(value, str | None):
                raise ValueError(f"the bank's fact {name!r} must be a text, not {value!r:.80}")
        confusion = metadata.get("confusion")
        known = {*texts, "confusion"}
        return replace(
            self,
            **{name: value for name, value in texts.items() if value},
            confusion=self.confusion if confusion is None else Confusion.from_json(confusion),
            other={**self.other, **{name: value for name, value in metadata.items() if name not in known}},
        )

    def to_metadata(self) -> dict[str, Any]:
        """What `bank.json` holds: the facts that the other files of the bank do not."""
        found = {name: getattr(self, name) for name in ("name", "repo_id", "description", "license")}
        if self.confusion is not None:
            found["confusion"] = {k: v for k, v in asdict(self.confusion).items() if v is not None}
        return {**self.other, **{name: value for name, value in found.items() if value is not None}}


def bank_card_data(bank: ExpertBank, confusion: Any = None, name: str = "bank") -> BankCardData:
    """
    The facts of a bank in memory.

    Args:
        bank ([`~peft_svf.experts.ExpertBank`]): The bank.
        confusion ([`Confusion`] or `Mapping`, *optional*): How its dispatcher did, from `peft-svf route`.
        name (`str`, *optional*, defaults to `"bank"`): Title of the card.

    Raises:
        ValueError: A fact of an expert, or the confusion matrix, cannot be used.
    """
    known: Mapping[str, Mapping[str, Any]] = getattr(bank, "facts", {})
    facts = {}
    for expert, entry in bank.experts.items():
        data = ExpertCardData.from_metadata(known.get(expert, {}), expert)
        facts[expert] = with_adapter(_with_entry(data, entry), Expert.from_model(bank.model, expert))
    return BankCardData(
        name,
        bank.experts,
        facts,
        base_model=str(bank.base_model.config._name_or_path) or None,
        base_revision=bank.base_revision,
        instruction=bank.instruction,
        classifier=bank.classifier,
        is_vision=bank.processor is not None,
        confusion=_confusion(confusion),
    )


def read_bank(folder: Path) -> BankCardData:
    """
    The facts of a saved bank: its `config.json`, `bank.json` and, of each expert, the adapter and `expert.json`.

    Raises:
        ExpertBankError: The folder is no bank.
        ExpertError: A file is damaged.
        ValueError: A fact cannot be used; it is named.
    """
    config = BankConfig.read(folder)
    facts = {}
    for name, entry in config.experts.items():
        expert = read_expert(folder / name)
        data = ExpertCardData.from_metadata({} if expert is None else expert.metadata, name)
        facts[name] = _with_entry(data if expert is None else with_adapter(data, expert), entry)
    included = config.base_model_name_or_path == BASE_FOLDER
    bank = BankCardData(
        folder.absolute().name,
        config.experts,
        facts,
        base_model=BASE_FOLDER if included else config.base_model_name_or_path,
        base_revision=config.base_revision,
        instruction=config.instruction,
        classifier=config.classifier,
        is_vision=config.architecture == VISION_LANGUAGE,
    )
    path = folder / BANK_FILE
    return bank.with_metadata(read_json(path, str(folder), LARGEST)) if path.is_file() else bank


def _with_entry(facts: ExpertCardData, entry: ExpertEntry) -> ExpertCardData:
    """What the bank calls the expert goes before what its own card says."""
    return replace(facts, label=entry.label, description=entry.description or facts.description)


def _confusion(confusion: Any) -> Confusion | None:
    return confusion if confusion is None or isinstance(confusion, Confusion) else Confusion.from_json(confusion)
