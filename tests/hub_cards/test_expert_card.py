"""A card says what is known, invents nothing, and is read back by huggingface_hub as it was meant."""

from __future__ import annotations

import ast
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM

from peft_svf import SVFConfig
from peft_svf.hub_cards import ExpertCardData, ExpertResult, expert_card, render_expert_card, write_expert_card


RESULT = ExpertResult("gsm8k, test", 1319, 0.5014, (0.4744, 0.5283), 0.5603, (0.5334, 0.5869))
FACTS = ExpertCardData(
    name="llama-math",
    label="math",
    repo_id="someone/llama-math",
    base_model="meta-llama/Llama-3.1-8B-Instruct",
    base_revision="0e9e39f249a16976918f6564b8830bc894c89659",
    trained_parameters=987654,
    task="gsm8k, train",
    reward="+1 if the last number equals the answer, else -1",
    kl_coefficient=0.125,
    seeds=(11, 12),
    steps=437,
    learning_rate=0.0023,
    batch_size=254,
    hardware="one H200",
    training_seconds=1234.4,
    results=(RESULT,),
    license="llama3.1",
)


def body(text: str) -> str:
    return str(ModelCard(text).text)


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_metadata_is_what_the_hub_expects() -> None:
    assert ModelCard(render_expert_card(FACTS)).data.to_dict() == {
        "base_model": "meta-llama/Llama-3.1-8B-Instruct",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "llama3.1",
        "tags": ["peft", "svf", "transformer2", "base_model:adapter:meta-llama/Llama-3.1-8B-Instruct"],
    }


def test_every_fact_is_on_the_card() -> None:
    text = body(render_expert_card(FACTS))
    assert "not recorded" not in text
    for fact in (
        "llama-math",
        "| math |",
        "Llama-3.1-8B-Instruct",
        "0e9e39f249a1",
        "987654",
        "gsm8k, train",
        "last number",
    ):
        assert fact in text
    for fact in ("0.125", "11, 12", "437", "0.0023", "254", "one H200", "1234 s", "llama3.1", "2501.06252"):
        assert fact in text
    assert "| gsm8k, test | 1319 | 50.1 % (47.4 to 52.8) | 56.0 % (53.3 to 58.7) |" in text


@pytest.mark.parametrize(
    "name", [field.name for field in fields(ExpertCardData) if field.name not in ("name", "repo_id")]
)
def test_missing_fact_is_not_recorded_rather_than_invented(name: str) -> None:
    empty = () if name in ("seeds", "results") else None
    text = render_expert_card(replace(FACTS, **{name: empty}))
    assert body(text).count("not recorded") == 1
    assert "None" not in text
    assert "| () |" not in text


def test_card_with_a_name_only_claims_nothing() -> None:
    card = ModelCard(render_expert_card(ExpertCardData(name="x")))
    assert card.data.to_dict().keys() == {"library_name", "pipeline_tag", "tags"}
    assert card.data.tags == ["peft", "svf", "transformer2"]
    assert card.text.count("not recorded") == 15


def test_local_base_model_is_named_but_never_becomes_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.joinpath("models", "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path / "models" / "base"), "models/base", "/nowhere/at/all/base"):
        text = render_expert_card(replace(FACTS, base_model=path))
        assert "base_model" not in ModelCard(text).data.to_dict()
        assert "base_model:adapter" not in text
        assert path not in text
        assert "`base`, a local folder" in text


@pytest.mark.parametrize("base_model", ["org/base", "gpt2", "/nowhere/base", None])
def test_code_to_run_it_is_python_and_begins_with_the_import(base_model: str | None) -> None:
    (code,) = code_blocks(render_expert_card(replace(FACTS, base_model=base_model)))
    assert code.startswith("import peft_svf")
    assert len(ast.parse(code).body) == 3
    assert '"someone/llama-math"' in code


def test_facts_cannot_break_the_table_or_the_metadata() -> None:
    hostile = replace(FACTS, task="a | b\n\n---\nlicense: mit\n# Title {{ 7 * 7 }}", hardware="x\n| y |")
    card = ModelCard(render_expert_card(hostile))
    assert card.data.license == "llama3.1"
    assert "| Task | a \\| b --- license: mit # Title {{ 7 * 7 }} |" in card.text
    assert "\n# Title" not in card.text


def test_writing_replaces_the_card_and_leaves_nothing_else(tmp_path: Path) -> None:
    tmp_path.joinpath("README.md").write_text("PEFT's stock card")
    path = write_expert_card(tmp_path, FACTS)
    assert path == tmp_path / "README.md"
    assert ModelCard.load(path).content == render_expert_card(FACTS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["README.md"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_failed_write_leaves_the_old_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.joinpath("README.md").write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(expert_card.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_expert_card(tmp_path, FACTS)
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == {"README.md": "old"}


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="save the expert there first"):
        write_expert_card(tmp_path / "absent", FACTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"base": 50.1}, "base must be a share"),
        ({"expert_interval": (0.6, 0.7)}, "within its interval"),
    ],
)
def test_impossible_result_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RESULT, **change)


@pytest.mark.parametrize(("change", "message"), [({"name": " "}, "name"), ({"repo_id": "/a/b"}, "not a Hub id")])
def test_impossible_facts_are_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(FACTS, **change)


@pytest.mark.parametrize("base_model", ["org/base", None], ids=["AutoPeftModel", "PeftModel"])
def test_code_on_the_card_loads_the_expert(base_model: str | None, stories_path: str, tmp_path: Path) -> None:
    expert = get_peft_model(AutoModelForCausalLM.from_pretrained(stories_path), SVFConfig(task_type="CAUSAL_LM"))
    trained = {name: torch.randn_like(value) for name, value in get_peft_model_state_dict(expert).items()}
    set_peft_model_state_dict(expert, trained)
    expert.save_pretrained(tmp_path)
    card = write_expert_card(tmp_path, ExpertCardData(name="stories", base_model=base_model))
    (code,) = code_blocks(card.read_text())
    scope = {"base_model": AutoModelForCausalLM.from_pretrained(stories_path)}
    exec(code.replace("path/to/this/folder", str(tmp_path)), scope)
    loaded = get_peft_model_state_dict(scope["model"])
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], value) for name, value in trained.items())
