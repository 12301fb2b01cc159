"""A card says what is known, invents nothing, and is read back by huggingface_hub as it was meant."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import metadata_load, parse_eval_result_entries
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_svf import Expert, SVFConfig, hub_cards
from peft_svf.experts import ExpertEntry, algebra
from peft_svf.experts.algebra import mix
from peft_svf.experts.errors import ExpertError
from peft_svf.hub_cards import (
    Benchmark,
    ExpertCardData,
    ExpertResult,
    expert_card_data,
    render_expert_card,
    write_expert_card,
)
from peft_svf.hub_cards.expert_sections import OPERATIONS
from peft_svf.playground import BANK_FOLDER


GSM8K = Benchmark("openai/gsm8k", "test", "main", "740312add88f781978c0658806c59bc2815b9866", complete=True)
RESULT = ExpertResult(
    "gsm8k, test",
    1319,
    0.5014,
    (0.4744, 0.5283),
    0.5603,
    (0.5334, 0.5869),
    0.0589,
    (0.03, 0.087),
    False,
    GSM8K,
    "greedy",
)
FACTS = ExpertCardData(
    name="llama-math",
    label="math",
    repo_id="someone/llama-math",
    base_model="meta-llama/Llama-3.1-8B-Instruct",
    base_revision="0e9e39f249a16976918f6564b8830bc894c89659",
    trained_parameters=987654,
    task="gsm8k",
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
    description="Grade-school word problems.",
    method="policy gradient",
    baseline="group",
    kl_estimator="exact",
    train_prompts=3736,
    validation={"metric": "validation reward", "start": -0.25, "best": 0.75, "step": 430, "prompts": 256},
    precision="bfloat16",
    versions={"peft-svf": "0.1.0", "torch": "2.13.0"},
    learning_curve=({"step": 1, "reward": -0.5}, {"step": 2, "reward": 0.5, "eval_reward": 0.25}),
    datasets=("openai/gsm8k",),
    language=("en",),
    pipeline_tag="text-generation",
    fingerprint_id="fad96f5d3b87",
    parametrization="offset",
    adapted_modules="down_proj, up_proj in 2 layers (4 matrices)",
    file_bytes=3456789,
    origin={"operation": "mix", "formula": "z' = Σ αₖ zₖ"},
)
OFF_THE_CARD = {"name", "repo_id", "origin", "other", "datasets", "language", "pipeline_tag", "learning_curve"}
Read = Callable[[str], Any]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A copy of a trained expert, without its facts and card."""
    folder = tmp_path / "math"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_bytes((BANK_FOLDER / "math" / name).read_bytes())
    return folder


# -- metadata --------------------------------------------------------------------------------------------------------
def test_metadata_is_what_the_hub_expects(read_card: Read) -> None:
    assert read_card(render_expert_card(FACTS)).data == {
        "base_model": "meta-llama/Llama-3.1-8B-Instruct",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "llama3.1",
        "datasets": ["openai/gsm8k"],
        "language": ["en"],
        "tags": ["peft", "svf", "transformer2", "base_model:adapter:meta-llama/Llama-3.1-8B-Instruct"],
    }


@pytest.mark.parametrize(
    ("license", "expected"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("My Own, v2!", {"license": "other", "license_name": "my-own-v2"}),
        ("none", {"license": "other", "license_name": "none"}),
        ("!", {"license": "other"}),
        (" ", {}),
    ],
)
def test_a_license_that_the_hub_does_not_know_is_other(
    license: str, expected: dict[str, str], read_card: Read
) -> None:
    data = read_card(render_expert_card(replace(FACTS, license=license))).data
    assert {name: value for name, value in data.items() if name.startswith("license")} == expected


def test_a_benchmark_without_a_leaderboard_is_in_the_model_index(read_card: Read) -> None:
    arc = replace(RESULT, task="arc_easy, test", benchmark=Benchmark("allenai/ai2_arc", "test", "ARC-Easy"))
    card = read_card(render_expert_card(replace(FACTS, results=(arc, replace(arc, chosen_on=True), RESULT))))
    ((result,),) = [entry["results"] for entry in card.data["model-index"]]
    assert card.data["model-index"][0]["name"] == "llama-math" and "# llama-math" in card.text
    assert result["dataset"] == {
        "name": "allenai/ai2_arc",
        "type": "allenai/ai2_arc",
        "config": "ARC-Easy",
        "split": "test",
    }
    assert result["metrics"][0]["value"] == 56.03
    assert "n = 1319, not all rows of the split test" in result["metrics"][0]["name"]


@pytest.mark.parametrize("change", [{"benchmark": None}, {"chosen_on": True}])
def test_prompts_that_are_no_benchmark_claim_no_score_on_the_hub(
    change: dict[str, Any], tmp_path: Path, read_card: Read
) -> None:
    card = write_expert_card(tmp_path, replace(FACTS, results=(replace(RESULT, **change),)), pictures=False)
    assert "model-index" not in read_card(card.read_text()).data
    assert not tmp_path.joinpath(".eval_results").exists()


def test_a_leaderboard_gets_an_entry_that_huggingface_hub_reads(tmp_path: Path) -> None:
    card = write_expert_card(tmp_path, FACTS, pictures=False)
    assert "model-index" not in metadata_load(card)
    (entry,) = parse_eval_result_entries(yaml.safe_load((tmp_path / ".eval_results" / "gsm8k.yaml").read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 56.03)
    assert entry.dataset_revision == GSM8K.revision
    assert entry.notes == (
        "n = 1319, all rows of the split test; 95 % interval 53.3 to 58.7; base model 50.1; greedy; "
        "prompt and reward of peft-svf"
    )


# -- text ------------------------------------------------------------------------------------------------------------
def test_every_fact_is_on_the_card(read_card: Read) -> None:
    card = read_card(render_expert_card(FACTS))
    assert "not recorded" not in card.text
    assert card.headings[0] == "llama-math" and "\nGrade-school word problems.\n" in card.text
    commit = FACTS.base_revision
    link = f"https://huggingface.co/meta-llama/Llama-3.1-8B-Instruct/tree/{commit}"
    assert card.cell("Base model") == f"[`meta-llama/Llama-3.1-8B-Instruct`]({link})"
    for name, value in {
        "Routing label": "math",
        "Base revision": commit,
        "Base fingerprint": "fad96f5d3b87",
        "Adapted": "down_proj, up_proj in 2 layers (4 matrices)",
        "Parameters": "987654 (3456789 bytes)",
        "Method": "policy gradient",
        "Task": "gsm8k",
        "Reward": "+1 if the last number equals the answer, else -1",
        "Baseline": "group",
        "KL estimator": "exact",
        "KL coefficient": "0.125",
        "Training prompts": "3736",
        "Seeds": "11, 12",
        "Steps": "437",
        "Answers per step": "254",
        "Learning rate": "0.0023",
        "Checkpoint chosen by": "validation reward on 256 prompts: -0.25 before, 0.75 at step 430",
        "Parametrization": "offset",
        "Precision of the base model": "bfloat16",
        "Hardware": "one H200",
        "Training time": "1234 s",
        "Versions": "peft-svf 0.1.0, torch 2.13.0",
    }.items():
        assert card.cell(name) == value
    row = ["gsm8k, test", "1319", "50.1 % (47.4 to 52.8)", "56.0 % (53.3 to 58.7)", "+5.9 (+3.0 to +8.7)", "greedy"]
    assert row in card.rows
    assert "Of the expert: llama3.1." in card.text and "version = {0.1.0}" in card.text
    assert "adds no facts" in card.text and "arxiv.org/abs/2501.06252" in card.text


@pytest.mark.parametrize(
    "name",
    [field.name for field in fields(ExpertCardData) if field.name not in {*OFF_THE_CARD, "description", "file_bytes"}],
)
def test_missing_fact_is_not_recorded_rather_than_invented(name: str, read_card: Read) -> None:
    trained = replace(FACTS, origin={})
    empty = {"seeds": (), "results": (), "validation": {}, "versions": {}}.get(name)
    text = read_card(render_expert_card(replace(trained, **{name: empty}))).text
    assert text.count("not recorded") == 1
    for invented in ("None", "()", "{}"):
        assert invented not in text.replace("model.disable_adapter()", "")


def test_card_with_a_name_only_claims_nothing(read_card: Read) -> None:
    card = read_card(render_expert_card(ExpertCardData(name="x")))
    assert card.data.keys() == {"library_name", "pipeline_tag", "tags"}
    assert card.data["tags"] == ["peft", "svf", "transformer2"]
    assert card.text.count("not recorded") == 25
    assert "How well it works was not measured" in card.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gain": 0.01, "gain_interval": (-0.01, 0.03)}, "the interval of the gain includes 0"),
        ({"gain": 0.01, "gain_interval": (0.0, 0.03)}, "the interval of the gain includes 0"),
        ({"gain": -0.05, "gain_interval": (-0.08, -0.02)}, "the expert is worse than the base model"),
        ({"chosen_on": True}, "chosen by the very prompts that it is measured on"),
        ({"gain": None, "gain_interval": None}, "The interval of a gain is not recorded"),
        ({}, None),
    ],
)
def test_what_a_result_does_not_prove_is_said_in_words(
    change: dict[str, Any], words: str | None, read_card: Read
) -> None:
    text = read_card(render_expert_card(replace(FACTS, results=(replace(RESULT, **change),)))).text
    known = ("includes 0", "is worse than the base model", "very prompts", "interval of a gain")
    assert [phrase in text for phrase in known] == [words is not None and phrase in words for phrase in known]


def test_one_seed_and_a_quantized_base_are_limits(read_card: Read) -> None:
    assert "one seed" not in read_card(render_expert_card(FACTS)).text
    text = read_card(render_expert_card(replace(FACTS, seeds=(0,), precision="4-bit"))).text
    assert "one training run with one seed" in text and "trained on a base model in 4-bit" in text


def test_an_expert_that_was_not_trained_says_how_it_was_made(read_card: Read) -> None:
    math, code = (Expert.from_pretrained(BANK_FOLDER / name) for name in ("math", "code"))
    mixture = mix([math, code], [0.7, 0.3], metadata={"name": "both"})
    card = read_card(render_expert_card(expert_card_data(mixture)))
    assert "How it was made" in card.headings and "How it was trained" not in card.headings
    assert "A mixture of other experts, without training." in card.text
    (first,) = [row for row in card.rows if row[0] == "Playground expert: math"]
    assert first[2:4] == [math.fingerprint_id, "0.7"]
    origin = {
        "operation": "transfer",
        "statement": "Nothing was gained.",
        "sources": [{"name": "a", "repo_id": "u/a", "revision": "abc", "weight": {"layer 0": 0.25, "layer 1": 1.0}}],
        "settings": {"control": "shuffled"},
    }
    card = read_card(render_expert_card(ExpertCardData("x", origin=origin)))
    assert [
        "a",
        "[`u/a`](https://huggingface.co/u/a/tree/abc)",
        "not recorded",
        "0.25 to 1 in 2 groups of layers",
        "",
    ] in card.rows
    assert ["control", "shuffled"] in card.rows and "\nNothing was gained.\n" in card.text


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name not in ("adapt", "import")])
def test_the_card_has_a_sentence_for_what_algebra_and_transfer_do(operation: str) -> None:
    origin = {"operation": operation, "settings": {"control": None, "residual": True, "normalize": False, "seed": 3}}
    text = render_expert_card(ExpertCardData.from_metadata({"name": "made", "origin": origin}))
    assert OPERATIONS[operation] in text and "| seed | 3 |" in text
    assert not any(word in text for word in ("| control", "| residual", "| normalize"))


def test_every_operation_of_the_algebra_has_a_sentence() -> None:
    one = Expert.from_pretrained(BANK_FOLDER / "math")
    made = [algebra.mix([one], [1.0]), algebra.average([one, one]), algebra.difference(one, one)]
    made += [algebra.interpolate(one, one, 0.5), algebra.scale(one, 2.0), algebra.negate(one), algebra.reverse(one)]
    made += [algebra.top_components(one, 3), algebra.shuffle(one, 0), algebra.random_like(one, 0)]
    assert {expert.metadata["origin"]["operation"] for expert in made} <= set(OPERATIONS)


def test_local_base_model_is_named_but_never_becomes_metadata(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_card: Read
) -> None:
    tmp_path.joinpath("models", "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path / "models" / "llama"), "models/base", "/nowhere/at/all/llama", "base"):
        facts = replace(FACTS, base_model=path)
        text = render_expert_card(facts)
        assert "base_model" not in read_card(text).data
        assert "base_model:adapter" not in text and "huggingface.co/base" not in text
        assert "/" not in read_card(text).cell("Base model")
    assert "base_model" not in replace(FACTS, base_model="/nowhere/at/all/llama").to_metadata()


# -- facts -----------------------------------------------------------------------------------------------------------
def test_facts_survive_the_way_through_json() -> None:
    again = json.loads(json.dumps(replace(FACTS, other={"mine": [1, {"a": None}]}).to_metadata()))
    assert ExpertCardData.from_metadata(again) == replace(FACTS, other={"mine": [1, {"a": None}]})
    assert ExpertCardData.from_metadata({"label": None}, "fallback") == ExpertCardData("fallback")


def test_the_adapter_is_believed_rather_than_its_facts() -> None:
    expert = Expert.from_pretrained(BANK_FOLDER / "code")
    lies = {"name": "code", "fingerprint_id": "0" * 12, "trained_parameters": 5, "adapted_modules": "none"}
    facts = expert_card_data(replace(expert, metadata=lies))
    assert facts.fingerprint_id == expert.fingerprint_id
    assert facts.trained_parameters == sum(
        o.numel() for o in load_file(BANK_FOLDER / "code" / "adapter_model.safetensors").values()
    )
    assert facts.adapted_modules.endswith("v_proj in 4 layers (28 matrices)")
    assert facts.base_model != "base"  # that would be a repository on the Hub


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n": 0}, "n must be at least 1"),
        ({"base": 50.1}, "base must be a share"),
        ({"expert_interval": (0.6, 0.7)}, "within its interval"),
        ({"gain": 0.5}, "within its interval"),
    ],
)
def test_impossible_result_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RESULT, **change)


@pytest.mark.parametrize(("change", "message"), [({"name": " "}, "name"), ({"repo_id": "/a/b"}, "not a Hub id")])
def test_impossible_facts_are_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(FACTS, **change)


# -- files -----------------------------------------------------------------------------------------------------------
def test_a_card_is_made_of_the_folder_alone(adapter: Path, read_card: Read) -> None:
    adapter.joinpath("README.md").write_text("PEFT's stock card")
    adapter.joinpath("expert.json").write_text(json.dumps({"label": "math", "mine": 1}))
    path = write_expert_card(adapter, repo_id="user/math-expert", base_model="org/base", base_revision="v1")
    card = read_card(path.read_text())
    assert card.headings[0] == "math-expert"  # the staged folder of a push may be called anything
    assert card.data["base_model"] == "org/base" and card.cell("Base revision") == "v1"
    assert card.cell("Parameters") == f"3072 ({(adapter / 'adapter_model.safetensors').stat().st_size} bytes)"
    assert '"user/math-expert"' in card.code[0]
    facts = json.loads((adapter / "expert.json").read_text())
    assert facts["mine"] == 1 and facts["base_model"] == "org/base" and facts["repo_id"] == "user/math-expert"
    assert {file.name for file in adapter.iterdir()} == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "expert.json", "levers.png",
    }  # fmt: skip
    assert path.stat().st_mode & 0o777 == 0o644
    assert write_expert_card(adapter).read_text() == path.read_text()  # the same again, from what was written


def test_pictures_are_drawn_and_shown(adapter: Path, read_card: Read) -> None:
    card = read_card(write_expert_card(adapter, FACTS).read_text())
    assert {"levers.png", "learning_curve.png"} <= set(card.links)
    for name in ("levers.png", "learning_curve.png"):
        assert (adapter / name).read_bytes().startswith(b"\x89PNG")
    assert "missing" not in card.text


def test_a_missing_picture_says_why_and_how_to_make_it(
    adapter: Path, read_card: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    card = read_card(write_expert_card(adapter, replace(FACTS, learning_curve=())).read_text())
    assert "levers.png" not in card.links and not (adapter / "levers.png").exists()
    assert "matplotlib was not installed" in card.text and "peft-svf inspect someone/llama-math --plot" in card.text
    assert "the rewards by step are not recorded" in card.text


def test_logits_are_not_drawn_as_if_they_were_z(adapter: Path, read_card: Read) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "parametrization": "sigmoid"}))
    assert "holds logits" in read_card(write_expert_card(adapter).read_text()).text
    assert not (adapter / "levers.png").exists()
    write_expert_card(adapter, expert=Expert.from_pretrained(BANK_FOLDER / "math"))
    assert (adapter / "levers.png").exists()


def test_a_failed_write_leaves_everything_as_it_was(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_expert_card(adapter, FACTS, pictures=False)
    before = {file.name: file.read_bytes() for file in adapter.rglob("*") if file.is_file()}
    monkeypatch.setattr("peft_svf.hub_cards.expert_card.render_expert_card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_expert_card(adapter, replace(FACTS, label="other"))
    assert {file.name: file.read_bytes() for file in adapter.rglob("*") if file.is_file()} == before
    assert sorted(adapter.iterdir()) == sorted(
        adapter / name for name in (*before, ".eval_results") if "yaml" not in name
    )


def test_missing_folder_and_damaged_adapter_are_named(adapter: Path) -> None:
    with pytest.raises(FileNotFoundError, match="save it there first"):
        write_expert_card(adapter / "absent", FACTS)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor * torch.nan for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(ExpertError, match="not finite"):
        write_expert_card(adapter)
    assert not (adapter / "README.md").exists()


# -- code ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("base_model", ["org/base", None], ids=["AutoPeftModel", "PeftModel"])
def test_code_on_the_card_runs_the_expert(
    base_model: str | None, stories_path: str, tmp_path: Path, read_card: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code as it stands on the card; only what is not on the Hub is replaced by a folder."""
    expert = get_peft_model(AutoModelForCausalLM.from_pretrained(stories_path), SVFConfig(task_type="CAUSAL_LM"))
    trained = {name: torch.randn_like(value) for name, value in get_peft_model_state_dict(expert).items()}
    set_peft_model_state_dict(expert, trained)
    expert.save_pretrained(tmp_path)
    facts = ExpertCardData(name="stories", label="a story", description='says "once"')
    card = write_expert_card(tmp_path, facts, base_model=base_model, pictures=False)
    pinned, adapter, in_bank = (
        code.replace("path/to/this/folder", str(tmp_path))
        .replace('"org/base"', repr(stories_path))
        .replace('"path/to/the/base/model"', repr(stories_path))
        .replace('"Your prompt", "expert": "default"}', '"Once", "expert": "default"}, max_new_tokens=1')
        for code in read_card(card.read_text()).code
    )
    scope: dict[str, Any] = {}
    exec(pinned.replace("\npipe(", "\nanswers = pipe("), scope)
    assert scope["answers"][0]["expert"] == "default"
    assert adapter.startswith("import peft_svf") and ("AutoPeftModel" in adapter) == (base_model is not None)
    scope = {}
    exec(adapter, scope)
    loaded = get_peft_model_state_dict(scope["model"])
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], value) for name, value in trained.items())
    scope = {}
    exec(in_bank, scope)
    assert scope["bank"].experts == {"a-story": ExpertEntry("a story", 'says "once"')}
    assert scope["pipe"].bank is scope["bank"]


def test_importing_the_cards_stays_light() -> None:
    """What a card needs only sometimes, pictures above all, is imported when it is needed."""
    known = {*sys.stdlib_module_names, "huggingface_hub", "jinja2", "peft"}
    for path in Path(hub_cards.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                assert name.split(".")[0] in known or name.startswith(("peft_svf.experts", "peft_svf.hub_cards")), path


def test_a_score_that_is_taken_back_leaves_no_file_behind(tmp_path: Path) -> None:
    write_expert_card(tmp_path, ExpertCardData("math", results=(RESULT,)), pictures=False)
    assert (tmp_path / ".eval_results" / "gsm8k.yaml").is_file()
    (tmp_path / ".eval_results" / "own.yaml").write_text("kept")
    write_expert_card(tmp_path, ExpertCardData("math"), pictures=False)
    assert [path.name for path in (tmp_path / ".eval_results").iterdir()] == ["own.yaml"]
