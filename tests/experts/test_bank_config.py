"""What a bank's folder says of itself, to us and to processes that have not imported peft_svf."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import peft_svf
from peft_svf import ExpertBank, Transformer2Config, Transformer2ForCausalLM
from peft_svf.experts import ExpertBankError, ExpertEntry
from peft_svf.playground import BANK_FOLDER


@pytest.fixture
def bank(tiny_llama, character_tokenizer, add_experts) -> ExpertBank:
    model = add_experts(tiny_llama(vocab_size=100), names=("math", "code", "routing"))
    experts = {"math": ExpertEntry("arithmetic", "sums"), "code": ExpertEntry("programs")}
    return ExpertBank(model, character_tokenizer, experts, classifier="routing", dispatcher_options={"margin": 0.5})


@pytest.fixture
def folder(bank: ExpertBank, tmp_path: Path) -> Path:
    return bank.save_pretrained(tmp_path / "bank", include_base=True)


def test_the_folder_names_pipeline_and_classes_for_readers_without_peft_svf(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "transformer2"
    assert config["architectures"] == ["Transformer2ForCausalLM"]
    assert config["custom_pipelines"] == {
        "transformer2-generation": {
            "impl": "transformer2.Transformer2Pipeline",
            "pt": ["AutoModelForCausalLM"],
            "type": "text",
        }
    }
    named = [*config["auto_map"].values(), "transformer2.Transformer2Pipeline"]
    for reference in named:  # exactly file.Class at the root, and the class is one that we keep at the top
        file, name = reference.split(".")
        body = ast.parse((folder / f"{file}.py").read_text()).body[1:]
        assert [type(statement) for statement in body] == [ast.ImportFrom]  # nothing is defined or registered
        assert body[0].module == "peft_svf" and name in [alias.name for alias in body[0].names]
        assert name in peft_svf.__all__


def test_classifier_and_dispatcher_options_come_back(bank, folder):
    loaded = ExpertBank.from_pretrained(folder)
    assert loaded.classifier == "routing"
    assert list(loaded.experts) == ["math", "code"]
    assert set(loaded.model.peft_config) == {"math", "code", "routing"}
    assert loaded.dispatcher_options == {"margin": 0.5}


def test_a_bank_saved_before_these_keys_existed_still_loads():
    assert "auto_map" not in json.loads((BANK_FOLDER / "config.json").read_text())
    bank = ExpertBank.from_pretrained(BANK_FOLDER)
    assert list(bank.experts) == ["math", "code", "reasoning"]
    assert bank.classifier is None and bank.processor is None and bank.dispatcher_options is None


def test_without_its_base_the_folder_keeps_the_tokenizer_of_the_bank(folder, tmp_path):
    bank = ExpertBank.from_pretrained(folder)
    bank.tokenizer.chat_template = "changed"
    without = bank.save_pretrained(tmp_path / "without")
    assert ExpertBank.from_pretrained(without).tokenizer.chat_template == "changed"
    assert AutoTokenizer.from_pretrained(without).chat_template == "changed"
    assert AutoTokenizer.from_pretrained(folder / "base").chat_template != "changed"


def test_the_revision_of_a_base_on_the_hub_is_kept(bank, tmp_path):
    bank.base_model.config._name_or_path = "user/base"
    bank.base_revision = "0123abc"
    config = json.loads((bank.save_pretrained(tmp_path / "bank") / "config.json").read_text())
    assert (config["base_model_name_or_path"], config["base_revision"]) == ("user/base", "0123abc")
    config = json.loads((bank.save_pretrained(tmp_path / "whole", include_base=True) / "config.json").read_text())
    assert (config["base_model_name_or_path"], config["base_revision"]) == ("base", None)


def test_the_config_tells_the_task_without_asking_for_trust(folder):
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is Transformer2Config
    assert list(config.custom_pipelines) == ["transformer2-generation"]
    assert "transformer2-generation" not in config.custom_pipelines


def test_what_is_said_about_the_bank_is_not_said_about_its_base(folder, monkeypatch):
    seen = {}

    def watch(*args, **kwargs):
        seen.update(kwargs)
        return load_base(*args, **kwargs)

    load_base = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr("peft_svf.experts.bank_loading.AutoModelForCausalLM.from_pretrained", watch)
    about = {"trust_remote_code": True, "code_revision": "1", "_commit_hash": "2", "_from_auto": True, "revision": "3"}
    Transformer2ForCausalLM.from_pretrained(folder, dtype="float64", adapter_kwargs={}, _from_pipeline="x", **about)
    assert seen == {"dtype": "float64"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classifier": "math"}, "'math' is the classifier and an expert"),
        ({"classifier": "../routing"}, "cannot name an expert"),
        ({"classifier": 3}, "classifier must be a string"),
        ({"classifier": "absent"}, "incomplete: absent/adapter_config.json is missing"),
        ({"dispatcher": "prompt"}, "dispatcher must be an object"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures must be one of"),
    ],
)
def test_a_damaged_config_gets_an_error_that_names_the_fault(folder, changes, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ExpertBankError, match=message):
        ExpertBank.from_pretrained(folder)
