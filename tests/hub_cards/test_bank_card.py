"""The card of a bank lists its experts with what was measured, says how prompts find them, and how to add one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_svf import ExpertBank
from peft_svf.experts import ExpertBankError
from peft_svf.hub_cards import BankCardData, Confusion, bank_card_data, render_bank_card, write_bank_card
from peft_svf.playground import BANK_FOLDER


Read = Callable[[str], Any]
ROUTE = {  # as `peft-svf route --output` writes it
    "model": "playground",
    "dispatcher": "instruction",
    "accuracy": 0.9,
    "interval": [0.7, 0.97],
    "confusion": {"true": ["math", "code"], "chosen": ["math", "code", "others"], "counts": [[10, 0, 0], [1, 8, 1]]},
}


@pytest.fixture(scope="module")
def bank_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded bank, with cards."""
    folder = tmp_path_factory.mktemp("banks") / "mine"
    shutil.copytree(BANK_FOLDER, folder)
    facts = {"name": "My | bank", "license": "apache-2.0", "description": "For sums.", "mine": [1]}
    with pytest.MonkeyPatch.context() as patch:  # the experts' pictures are other tests' business, and take seconds
        patch.setattr("peft_svf.plots.plot_levers", lambda _, path, *__: path.write_bytes(b"a picture"))
        write_bank_card(folder, facts, repo_id="user/bank", confusion=ROUTE)
    return folder


@pytest.fixture(scope="module")
def card(bank_folder: Path, read_card: Read) -> Any:
    return read_card((bank_folder / "README.md").read_text())


def test_metadata_names_the_library_whose_code_works(card: Any) -> None:
    """There is no adapter at the root of a bank, so PEFT's code, which the Hub would show, could not load it."""
    assert card.data == {
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["peft", "svf", "transformer2"],
    }


def test_every_expert_is_listed_with_its_measured_success(card: Any, bank_folder: Path) -> None:
    for name in ("math", "code", "reasoning"):
        (result,) = json.loads((BANK_FOLDER / name / "expert.json").read_text())["results"]
        (row,) = [row for row in card.rows if row[0] == f"[{name}]({name}/README.md)"]
        low, high = (f"{100 * end:.1f}" for end in result["expert_interval"])
        assert row[1] == name and row[3] == f"playground-{name}, held-out prompts" and row[4] == "500"
        assert row[5].startswith(f"{100 * result['base']:.1f} % (")
        assert row[6] == f"{100 * result['expert']:.1f} % ({low} to {high})"
        assert (bank_folder / name / "README.md").is_file()
    assert card.headings[0] == "My \\| bank" and "\nFor sums.\n" in card.text
    assert "Classify: math, code, reasoning or others?" in card.text
    assert card.cell("Base model") == "in the folder `base` of the bank"


def test_the_confusion_matrix_is_a_table_and_a_picture(card: Any, bank_folder: Path) -> None:
    assert ["math", "**10**", "0", "0"] in card.rows and ["code", "1", "**8**", "1"] in card.rows
    assert "90.0 % (70.0 to 97.0) of 20 prompts" in card.text
    assert (bank_folder / "confusion_matrix.png").is_file() and "confusion_matrix.png" in card.links


def test_what_only_the_card_knows_is_kept_for_the_next_one(
    bank_folder: Path, card: Any, tmp_path: Path, read_card: Read
) -> None:
    again = tmp_path / "again"
    shutil.copytree(bank_folder, again)
    text = write_bank_card(again, repo_id="other/bank", pictures=False).read_text()
    assert read_card(text).rows == card.rows and read_card(text).headings == card.headings
    assert "other/bank" in text and "user/bank" not in text
    assert json.loads((again / "bank.json").read_text())["mine"] == [1]


def test_code_on_the_card_runs_the_bank_and_adds_an_expert(
    card: Any, bank_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, add = card.code
    assert 'model="user/bank", trust_remote_code=True' in run
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr("transformers.pipeline", lambda *words, **options: calls.append((words, options)) or print)
    exec(run, {})
    assert calls == [(("transformer2-generation",), {"model": "user/bank", "trust_remote_code": True})]
    scope: dict[str, Any] = {}
    expert = str(bank_folder / "math")
    exec(
        add.replace('"user/bank"', repr(str(bank_folder)), 1)
        .replace('"user/history-expert"', repr(expert))
        .replace('"my-bank"', repr(str(tmp_path / "my-bank"))),
        scope,
    )
    assert list(ExpertBank.from_pretrained(tmp_path / "my-bank").experts) == ["math", "code", "reasoning", "history"]


def test_an_expert_in_a_bank_is_loaded_from_the_bank(bank_folder: Path, read_card: Read) -> None:
    here = repr(str(bank_folder))
    pinned, adapter, in_bank = (
        code.replace('"user/bank"', here) for code in read_card((bank_folder / "math" / "README.md").read_text()).code
    )
    scope: dict[str, Any] = {}
    exec(pinned.replace('pipe({"text": "Your prompt"', 'answers = pipe({"text": "1 + 1?"'), scope)
    assert scope["answers"][0]["expert"] == "math"
    exec(adapter, scope)
    assert scope["model"].peft_config["default"].base_model_name_or_path == "base"
    exec(in_bank, scope)
    assert "math" in scope["bank"].experts


def test_a_live_bank_has_the_facts_of_its_folder(bank_folder: Path) -> None:
    live = bank_card_data(ExpertBank.from_pretrained(bank_folder), ROUTE, "live")
    assert live.confusion == Confusion.from_json(ROUTE) and list(live.experts) == ["math", "code", "reasoning"]
    assert live.facts["math"].results[0].n == 500
    assert live.facts["math"].fingerprint_id == live.fingerprint_id != None  # noqa: E711
    assert "| [math](math/README.md) |" in render_bank_card(live)


def test_a_published_base_model_is_metadata_of_bank_and_experts(
    bank_folder: Path, tmp_path: Path, read_card: Read
) -> None:
    shutil.copytree(bank_folder, tmp_path / "bank")
    path = write_bank_card(tmp_path / "bank", base_model="org/base", base_revision="abc", pictures=False)
    for text in (path.read_text(), (tmp_path / "bank" / "code" / "README.md").read_text()):
        assert read_card(text).data["base_model"] == "org/base"
        assert "base_model:adapter:org/base" in read_card(text).data["tags"]
    assert "org/base/tree/abc" in path.read_text() and "its weights are in this bank" in path.read_text()


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"name": 3}, "name"),
        ({"repo_id": "no id"}, "Hub id"),
        ({"confusion": {"true": ["a"], "chosen": ["a"], "counts": [[1], [2]]}}, "row for each"),
        ({"confusion": {"true": ["a"], "chosen": ["a"], "counts": [[-1]]}}, "at least 0"),
        ({"confusion": [1]}, "route --output"),
        ({"confusion": {"true": ["a"]}}, "route --output"),
    ],
)
def test_a_bad_fact_is_named_and_no_card_changes(facts: dict[str, Any], message: str, bank_folder: Path) -> None:
    before = {path: path.read_bytes() for path in bank_folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        write_bank_card(bank_folder, facts)
    assert {path: path.read_bytes() for path in bank_folder.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_no_bank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExpertBankError, match=r"config\.json"):
        write_bank_card(tmp_path)
    with pytest.raises(FileNotFoundError):
        write_bank_card(tmp_path / "absent")
    with pytest.raises(ValueError, match="name"):
        BankCardData(" ", {})
