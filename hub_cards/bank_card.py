"""The card of a bank: its experts, how prompts find them, and how to add one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from peft_svf.experts.bank_config import BASE_FOLDER
from peft_svf.hub_cards.bank_facts import BANK_FILE, BankCardData, Confusion, read_bank
from peft_svf.hub_cards.card_files import CARD, card_files
from peft_svf.hub_cards.expert_card import write_expert_card
from peft_svf.hub_cards.expert_sections import base_model_text
from peft_svf.hub_cards.metadata import PIPELINE_TAGS, base_entries, hub_ids, is_hub_id, license_entries
from peft_svf.hub_cards.pictures import Picture, confusion_picture
from peft_svf.hub_cards.results import ExpertResult, percent
from peft_svf.hub_cards.templating import render_card
from peft_svf.hub_cards.text import NOT_RECORDED, inline, literal, paragraph


FOLDER = "path/to/this/folder"
TASKS = {False: "transformer2-generation", True: "transformer2-image-text-to-text"}


def write_bank_card(
    folder: str | Path,
    facts: BankCardData | Mapping[str, Any] | None = None,
    repo_id: str | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    *,
    confusion: Confusion | Mapping[str, Any] | None = None,
    pictures: bool = True,
) -> Path:
    """
    Write the card of a saved bank, and those of its experts in their folders.

    Args:
        folder (`str` or `Path`): A folder written by [`~peft_svf.experts.ExpertBank.save_pretrained`].
        facts ([`BankCardData`] or `Mapping`, *optional*):
            What is known of the bank as a whole (`name`, `description`, `license`, `confusion`). Defaults to the
            content of `bank.json` there, where it is kept. What the bank's files say is added, and wins.
        repo_id (`str`, *optional*): Where the bank is, or is going to be, on the Hub.
        base_model, base_revision (`str`, *optional*): Hub id and commit of the base model, if the bank names a folder.
        confusion ([`Confusion`] or `Mapping`, *optional*): How its dispatcher did, from `peft-svf route`.
        pictures (`bool`, *optional*, defaults to `True`): Draw them (needs matplotlib).

    Returns:
        `Path`: The card.

    Raises:
        FileNotFoundError: The folder does not exist.
        ExpertError: It is no bank, or a file in it is damaged.
        ValueError: A fact cannot be used; it is named.
    """
    folder = Path(folder)
    with card_files(folder) as staging:
        known = read_bank(folder)
        if facts is not None:
            known = known.with_metadata(facts.to_metadata() if isinstance(facts, BankCardData) else facts)
        changes: dict[str, Any] = {"repo_id": repo_id, "base_model": base_model, "base_revision": base_revision}
        if confusion is not None:
            changes["confusion"] = confusion if isinstance(confusion, Confusion) else Confusion.from_json(confusion)
        known = replace(known, **{name: value for name, value in changes.items() if value is not None})
        included = (folder / BASE_FOLDER).is_dir()
        drawn = [] if known.confusion is None else [confusion_picture(known.confusion, staging, pictures)]
        text = json.dumps(known.to_metadata(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (staging / BANK_FILE).write_text(text, "utf-8")
        (staging / CARD).write_text(render_bank_card(known, drawn, included), "utf-8", newline="\n")
        for name in known.experts:
            write_expert_card(
                folder / name,
                known.facts[name],
                base_model=base_model,
                base_revision=base_revision,
                pictures=pictures,
                bank=known.repo_id or "",
            )
    return folder / CARD


def render_bank_card(facts: BankCardData, pictures: Sequence[Picture] = (), included: bool = False) -> str:
    """
    Text of the card, metadata first; parsed back by `huggingface_hub` before it is returned.

    Args:
        facts ([`BankCardData`]): What is known about the bank.
        pictures (`Sequence[Picture]`, *optional*): Beside the card, or missing.
        included (`bool`, *optional*, defaults to `False`): Whether the base model is in the bank.
    """
    return render_card(
        "bank.md",
        bank_metadata(facts),
        facts.name,
        title=inline(facts.name),
        description=paragraph(facts.description) if facts.description else None,
        task=TASKS[facts.is_vision],
        model=literal(facts.repo_id or FOLDER),
        base=base_model_text(facts.base_model, facts.base_revision),
        included=included and facts.base_model != BASE_FOLDER,
        revision=inline(facts.base_revision),
        fingerprint=inline(facts.fingerprint_id),
        experts=[_expert_cells(facts, name) for name in facts.experts],
        instruction=paragraph(facts.instruction) if facts.instruction else None,
        classifier=inline(facts.classifier) if facts.classifier else None,
        confusion=None if facts.confusion is None else _confusion_cells(facts.confusion),
        pictures=pictures,
        license=inline(facts.license),
        peft_svf="",
    )


def bank_metadata(facts: BankCardData) -> ModelCardData:
    """
    The metadata of a bank's card.

    Its library is transformers, not peft: there is no adapter at the root of a bank, and the code that the Hub shows
    for transformers, with `trust_remote_code`, is the one that works.
    """
    datasets = [name for expert in facts.facts.values() for name in expert.datasets]
    languages = {code for expert in facts.facts.values() for code in expert.language}
    return ModelCardData(
        **base_entries(facts.base_model if is_hub_id(facts.base_model) else None),
        **license_entries(facts.license),
        library_name="transformers",
        pipeline_tag=PIPELINE_TAGS[facts.is_vision],
        datasets=hub_ids(list(dict.fromkeys(datasets))),
        language=sorted(code for code in languages if code.isalpha()) or None,
    )


def _expert_cells(facts: BankCardData, name: str) -> dict[str, str]:
    entry, known = facts.experts[name], facts.facts.get(name)
    result = _representative(known.results if known else ())
    return {
        "name": f"[{inline(name)}]({name}/{CARD})",
        "label": inline(entry.label),
        "description": inline(entry.description or (known.description if known else None)),
        "task": NOT_RECORDED if result is None else inline(result.task),
        "n": NOT_RECORDED if result is None else str(result.n),
        "base": NOT_RECORDED if result is None else percent(result.base, result.base_interval),
        "expert": NOT_RECORDED if result is None else percent(result.expert, result.expert_interval),
        "license": inline(known.license if known else None),
    }


def _representative(results: Sequence[ExpertResult]) -> ExpertResult | None:
    """The first result on prompts that the expert was not chosen by."""
    return next((result for result in results if not result.chosen_on), None)


def _confusion_cells(confusion: Confusion) -> dict[str, Any]:
    """The rows of the table; what is right stands out."""
    rows = []
    for label, counts in zip(confusion.true, confusion.counts, strict=True):
        shown = [
            f"**{count}**" if chosen == label else str(count)
            for chosen, count in zip(confusion.chosen, counts, strict=True)
        ]
        rows.append([inline(label), *shown])
    return {
        "columns": [inline(label) for label in confusion.chosen],
        "rows": rows,
        "accuracy": percent(confusion.accuracy, confusion.interval),
        "n": sum(map(sum, confusion.counts)),
        "dispatcher": inline(confusion.dispatcher),
    }
