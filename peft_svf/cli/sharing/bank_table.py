"""What `peft-svf bank list` prints: the experts of a bank, from its files alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_svf.cli.sharing.bank import PLAYGROUND
from peft_svf.cli.terminal import one_line, table
from peft_svf.experts.adapter_files import read_adapter, read_facts
from peft_svf.experts.bank_config import BASE_FOLDER, BankConfig
from peft_svf.experts.bank_loading import bank_folder
from peft_svf.experts.expert import Expert
from peft_svf.playground import BANK_FOLDER


def find_bank(name: str, revision: str | None = None) -> Path:
    """The folder of a bank, downloaded if it is on the Hub; "playground" is the one that comes with the package."""
    if name == PLAYGROUND and not Path(name).exists():
        return Path(BANK_FOLDER)
    return bank_folder(name, revision, None)[0]


def bank_table(name: str, revision: str | None = None) -> str:
    """
    A line on the bank, and a table of its experts.

    Args:
        name (`str`): Folder or Hub id of the bank, or "playground".
        revision (`str`, *optional*): For a Hub id.

    Raises:
        ExpertError: There is no such bank, or a file of it is damaged.
    """
    folder = find_bank(name, revision)
    config = BankConfig.read(folder)
    rows = [["name", "label", "parameters", "base", "success", "description"]]
    for adapter in config.adapters:
        where = f"expert '{adapter}' of the bank {name}"
        settings, offsets, others = read_adapter(folder / adapter, where)
        entry = config.experts.get(adapter)
        rows.append(
            [
                adapter,
                one_line(entry.label, 30) if entry else "(classifier)",
                f"{sum(offset.numel() for offset in offsets.values()):,}",
                Expert(offsets, settings, {}, others, where).fingerprint_id or "unknown",
                one_line(result_text(read_facts(folder / adapter, where))),
                one_line(entry.description) if entry else "",
            ]
        )
    base = "its own" if config.base_model_name_or_path == BASE_FOLDER else one_line(config.base_model_name_or_path, 90)
    at = f" at {one_line(config.base_revision)}" if config.base_revision else ""
    count = f"{len(config.experts)} expert{'s' * (len(config.experts) != 1)}"
    title = f"{one_line(name, 90)}: {count}, base model: {base}{at}"
    return f"{title}\n{table(rows, right=(2,))}"


def result_text(facts: dict[str, Any]) -> str:
    """The first result that is recorded, "49.7 % -> 99.7 % (playground-math, n 300)"; "not recorded" without one."""
    from peft_svf.hub_cards import ExpertCardData

    try:
        results = ExpertCardData.from_metadata(facts).results
    except ValueError as error:
        return f"unusable: {error}"
    if not results:
        return "not recorded"
    first = results[0]
    before = "" if first.base is None else f"{100 * first.base:.1f} % -> "
    return f"{before}{100 * first.expert:.1f} % ({first.task}, n {first.n})"
