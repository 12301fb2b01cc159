"""The card of one expert: its facts, rendered into README.md with the metadata that the Hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump  # type: ignore[attr-defined]
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from peft_svf.experts.adapter_files import EXPERT_FILE, read_facts
from peft_svf.experts.expert import Expert, write_facts
from peft_svf.hub_cards.adapter import read_expert, with_adapter
from peft_svf.hub_cards.card_files import CARD, EVAL_RESULTS, card_files
from peft_svf.hub_cards.expert_facts import ExpertCardData
from peft_svf.hub_cards.expert_sections import expert_sections
from peft_svf.hub_cards.metadata import expert_metadata
from peft_svf.hub_cards.pictures import Picture, expert_pictures
from peft_svf.hub_cards.results import LEADERBOARDS, leaderboard_entries
from peft_svf.hub_cards.templating import render_card


def write_expert_card(
    folder: str | Path,
    facts: ExpertCardData | Mapping[str, Any] | None = None,
    repo_id: str | None = None,
    base_model: str | None = None,
    base_revision: str | None = None,
    *,
    pictures: bool = True,
    expert: Expert | None = None,
    bank: str | None = None,
) -> Path:
    """
    Write the card of an expert: `README.md`, `expert.json`, pictures and, for benchmarks that keep a leaderboard,
    `.eval_results/<task>.yaml`. Each file is replaced as a whole, `README.md` last.

    PEFT rewrites tags and base model of an existing card whenever it saves, so write the card last.

    Args:
        folder (`str` or `Path`): Existing folder, usually the one with `adapter_config.json`.
        facts ([`ExpertCardData`] or `Mapping`, *optional*):
            What is known about the expert. Defaults to the content of `expert.json` there. What the adapter itself
            says (base model, fingerprint, parameters) is added, and wins.
        repo_id (`str`, *optional*): Where the expert is, or is going to be, on the Hub.
        base_model, base_revision (`str`, *optional*): Hub id and commit of the base model, if the adapter names a
            folder.
        pictures (`bool`, *optional*, defaults to `True`): Draw the levers and the learning curve (needs matplotlib).
        expert ([`~peft_svf.experts.Expert`], *optional*):
            What to draw, if the adapter holds logits: [`~peft_svf.experts.Expert.from_model`] of its live model.
        bank (`str`, *optional*): Hub id of the bank that the folder is in; "" for a bank that is on no Hub.

    Returns:
        `Path`: The card.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: A fact cannot be used; it is named. Nothing was written.
        ExpertError: The adapter in the folder, or its `expert.json`, is damaged.
    """
    folder = Path(folder)
    with card_files(folder) as staging:
        found = read_expert(folder)
        known = _complete(folder, facts, found, repo_id)
        changes: dict[str, Any] = {"repo_id": repo_id, "base_model": base_model, "base_revision": base_revision}
        known = replace(known, **{name: value for name, value in changes.items() if value is not None})
        drawn = expert_pictures(known, expert or found, folder, staging, pictures)
        write_facts(staging, known.to_metadata())
        boards = leaderboard_entries(known.results)
        for task, entries in boards.items():
            (staging / EVAL_RESULTS).mkdir(exist_ok=True)
            text = yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
            (staging / EVAL_RESULTS / f"{task}.yaml").write_text(text, "utf-8")
        (staging / CARD).write_text(render_expert_card(known, drawn, bank, folder.name), "utf-8", newline="\n")
    for task in set(LEADERBOARDS.values()) - set(boards):  # a score of an earlier card
        (folder / EVAL_RESULTS / f"{task}.yaml").unlink(missing_ok=True)
    return folder / CARD


def render_expert_card(
    facts: ExpertCardData, pictures: Sequence[Picture] = (), bank: str | None = None, folder: str | None = None
) -> str:
    """
    Text of the card, metadata first; parsed back by `huggingface_hub` before it is returned.

    Args:
        facts ([`ExpertCardData`]): What is known about the expert.
        pictures (`Sequence[Picture]`, *optional*): Beside the card, or missing.
        bank, folder (`str`, *optional*): The bank that the expert is in, as of [`write_expert_card`], and where there.

    Raises:
        ValueError: The metadata do not survive parsing.
    """
    sections = expert_sections(facts, bank, folder)
    return render_card("expert.md", expert_metadata(facts), facts.name, pictures=pictures, **sections)


def _complete(
    folder: Path, facts: ExpertCardData | Mapping[str, Any] | None, expert: Expert | None, repo_id: str | None
) -> ExpertCardData:
    """The facts, with those that the files in the folder say."""
    if facts is None:
        facts = read_facts(folder, str(folder / EXPERT_FILE))
    if not isinstance(facts, ExpertCardData):
        name = (repo_id or "").rpartition("/")[2] or folder.absolute().name
        facts = ExpertCardData.from_metadata(facts, name)
    if expert is None:
        return facts
    size = (folder / SAFETENSORS_WEIGHTS_NAME).stat().st_size
    return replace(with_adapter(facts, expert), file_bytes=size)
