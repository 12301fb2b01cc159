"""Experts come and go while a bank is in use; what fails changes nothing."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_svf import ExpertBank, SVFConfig, Transformer2Pipeline
from peft_svf.dispatch import ClassifierDispatcher
from peft_svf.experts import Expert, ExpertBankError, ExpertEntry, ExpertError


IDS = torch.arange(3, 23).reshape(2, 10)


SAVED: list[Path] = []  # one folder for all tests of this file; none changes it


@pytest.fixture
def folder(tiny_llama, character_tokenizer, add_experts, tmp_path_factory) -> Path:
    """A saved bank with the experts math, code and extra; `code` and `extra` are to be added to others."""
    if not SAVED:
        model = add_experts(tiny_llama(vocab_size=100, max_position_embeddings=512), names=("math", "code", "extra"))
        bank = ExpertBank(model, character_tokenizer)
        SAVED.append(bank.save_pretrained(tmp_path_factory.mktemp("live") / "bank", include_base=True))
    return SAVED[0]


PROTOTYPE: list[ExpertBank] = []  # the tests get copies of it


@pytest.fixture
def bank(tiny_llama, character_tokenizer, folder) -> ExpertBank:
    """The same base with only math."""
    if not PROTOTYPE:
        base = tiny_llama(vocab_size=100, max_position_embeddings=512)
        model = PeftModel.from_pretrained(base, folder / "math", adapter_name="math")
        PROTOTYPE.append(ExpertBank(model, character_tokenizer))
    return copy.deepcopy(PROTOTYPE[0])


@torch.no_grad()
def logits(bank: ExpertBank, route: Any) -> torch.Tensor:
    with bank.routed(route) as model:
        return model(IDS).logits


def state(bank: ExpertBank) -> dict[str, Any]:
    """All that an expert leaves behind: tensors with their flags, modules, entries, active adapters."""
    model = bank.model
    return {
        "tensors": {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        "modules": [name for name, _ in model.named_modules()],
        "experts": (bank.experts, bank.classifier),
        "adapters": sorted(model.peft_config) if isinstance(model, PeftModel) else vars(model).get("peft_config"),
        "active": getattr(model, "active_adapters", None) if isinstance(model, PeftModel) else None,
        "logits": logits(bank, "others"),
    }


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return all(torch.equal(left[k], right[k]) if k == "logits" else left[k] == right[k] for k in left)


def test_an_added_expert_answers_as_in_the_bank_it_came_from(bank, folder):
    whole = ExpertBank.from_pretrained(folder)
    before = logits(bank, "math")
    bank.add("code", folder / "code", label="programs", description="small functions")
    bank.add("second", str(folder / "extra"))
    assert bank.experts["code"] == ExpertEntry("programs", "small functions")
    assert bank.experts["second"] == ExpertEntry("second")
    assert torch.equal(logits(bank, "code"), logits(whole, "code"))
    assert torch.equal(logits(bank, "second"), logits(whole, "extra"))
    assert torch.equal(logits(bank, "math"), before)
    mixed = {"math": 0.5, "code": 0.5}
    assert torch.equal(logits(bank, mixed), logits(whole, mixed))
    assert not any(p.requires_grad for n, p in bank.model.named_parameters() if ".code." in n)
    assert bank.model.active_adapters == ["math"]


def test_an_adapter_in_the_model_becomes_an_expert_or_the_classifier(bank, folder):
    bank.model.load_adapter(folder / "code", adapter_name="code")
    bank.add("code", label="programs")
    assert bank.experts["code"].label == "programs"
    bank.add_classifier("extra", folder / "extra")
    assert bank.classifier == "extra"
    with pytest.raises(ExpertBankError, match="has a classifier, 'extra'; remove it first"):
        bank.add_classifier("other", folder / "extra")
    bank.remove("extra")
    assert bank.classifier is None and "extra" not in bank.model.peft_config


def test_pipeline_and_dispatcher_follow_the_bank(bank, folder):
    pipe = Transformer2Pipeline(bank, max_new_tokens=2)
    assert set(pipe("x")[0]["scores"]) == {"math", "others"}
    bank.add("code", folder / "code", label="programs")
    (record,) = pipe("x")
    assert set(record["scores"]) == {"math", "programs", "others"}
    assert pipe("x", expert="code")[0]["expert"] == "code"
    bank.remove("code")
    assert set(pipe("x")[0]["scores"]) == {"math", "others"}
    with pytest.raises(ValueError, match="Unknown expert 'code'"):
        pipe("x", expert="code")


def test_a_bank_without_experts_takes_its_first_and_a_pipeline_on_it_goes_on(tiny_llama, character_tokenizer, folder):
    whole = ExpertBank.from_pretrained(folder)
    bank = ExpertBank(tiny_llama(vocab_size=100, max_position_embeddings=512), character_tokenizer)
    pipe = Transformer2Pipeline(bank, max_new_tokens=4)
    others = pipe("x")[0]["generated_text"]
    bank.add("code", folder / "code")
    reference = Transformer2Pipeline(whole, max_new_tokens=4)
    beams = {"expert": "code", "num_beams": 2, "num_return_sequences": 2}
    assert pipe("x", **beams) == reference("x", **beams)
    assert pipe.model is bank.model
    assert pipe("x", expert="others")[0]["generated_text"] == others
    bank.remove("code")
    assert pipe("x")[0]["generated_text"] == others


def test_a_removed_expert_is_gone_and_the_others_are_as_before(folder, tmp_path):
    bank = ExpertBank.from_pretrained(folder)
    before = {name: logits(bank, name) for name in ("math", "extra", "others")}
    flags = {name: p.requires_grad for name, p in bank.model.named_parameters()}
    bank.model.set_adapter("code", inference_mode=True)
    bank.remove("code")
    assert list(bank.experts) == ["math", "extra"] and "code" not in bank.model.peft_config
    assert not any(".code." in name for name, _ in bank.model.named_parameters())
    assert {n: p.requires_grad for n, p in bank.model.named_parameters()}.items() <= flags.items()
    for name, expected in before.items():
        assert torch.equal(logits(bank, name), expected)
    saved = bank.save_pretrained(tmp_path / "saved", include_base=True)
    assert list(ExpertBank.from_pretrained(saved).experts) == ["math", "extra"]


def test_after_the_last_expert_the_base_model_is_left_and_another_may_come(bank, folder):
    before = logits(bank, "others")
    math = logits(bank, "math")
    bank.remove("math")
    assert bank.experts == {} and not isinstance(bank.model, PeftModel)
    assert torch.equal(logits(bank, "others"), before)
    bank.add("math", folder / "math")
    assert torch.equal(logits(bank, "math"), math)


def damage(path: Path, how: str) -> None:
    if how == "missing":
        (path / "adapter_model.safetensors").unlink()
    elif how == "broken":
        (path / "adapter_model.safetensors").write_bytes(b"x")
    elif how == "not finite":
        tensors = load_file(path / "adapter_model.safetensors")
        next(iter(tensors.values()))[0] = torch.nan
        save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    else:
        (path / "adapter_config.json").write_text("{")


@pytest.mark.parametrize("plain", [False, True], ids=["beside an expert", "as the first"])
@pytest.mark.parametrize("how", ["missing", "broken", "config", "not finite"])
def test_a_damaged_expert_is_refused_and_nothing_changes(
    bank, folder, tiny_llama, character_tokenizer, tmp_path, how, plain
):
    if plain:
        bank = ExpertBank(tiny_llama(vocab_size=100, max_position_embeddings=512), character_tokenizer)
    shutil.copytree(folder / "code", tmp_path / "code")
    damage(tmp_path / "code", how)
    before = state(bank)
    with pytest.raises(ExpertBankError, match=r"code"):
        bank.add("code", tmp_path / "code")
    assert same(state(bank), before)


def test_an_expert_of_another_base_or_kind_is_refused_and_nothing_changes(
    bank, folder, tiny_llama, add_experts, character_tokenizer, tmp_path
):
    other = add_experts(tiny_llama(seed=1, vocab_size=100, max_position_embeddings=512))
    other.save_pretrained(tmp_path / "other")
    lora = get_peft_model(tiny_llama(vocab_size=100), LoraConfig(r=2, target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    before = state(bank)
    for source, message in (
        (tmp_path / "other" / "math", "belongs to another base model"),
        (tmp_path / "lora", "of type LORA"),
        (tmp_path / "nowhere", "no such folder"),
        ("nowhere", "no such folder"),
    ):
        with pytest.raises(ExpertBankError, match=message):
            bank.add("new", source)
    assert same(state(bank), before)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("math", {}, "has 'math' already"),
        ("others", {}, "cannot name an expert"),
        ("a/b", {}, "cannot name an expert"),
        ("new", {"label": "math"}, "a label is unique"),
        ("new", {"label": " "}, "a label is unique"),
        ("lora", {}, "already: call add"),
        (7, {"label": "seven"}, "'7' cannot name an expert"),
        ("new", {"label": 7}, "both texts"),
        ("new", {"description": None}, "both texts"),
    ],
)
def test_names_and_labels_that_are_taken_are_refused_and_nothing_changes(bank, folder, name, options, message):
    bank.model.add_adapter("lora", SVFConfig())
    before = state(bank)
    with pytest.raises(ExpertBankError, match=message):
        bank.add(name, folder / "code", **options)
    assert same(state(bank), before)


def test_an_expert_in_a_bank_knows_where_its_base_is(folder, tmp_path):
    """In the bank's folder the base is called "base"; for who saves the expert elsewhere that means nothing."""
    ExpertBank.from_pretrained(folder).model.save_pretrained(tmp_path, selected_adapters=["math"])
    config = json.loads((tmp_path / "math" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "base")


@pytest.mark.parametrize("model", ["folder", None])
def test_a_bank_of_no_model_is_refused(model):
    with pytest.raises(ExpertBankError, match="from_pretrained loads a folder"):
        ExpertBank(model)


def test_what_is_not_there_cannot_be_named_or_removed(bank):
    with pytest.raises(ExpertBankError, match="'code' is no SVF adapter of the model"):
        bank.add("code")
    with pytest.raises(ExpertBankError, match="no 'code' to remove; it has 'math'"):
        bank.remove("code")


def test_merged_weights_are_no_base_to_add_to_or_remove_from(bank, folder):
    bank.model.merge_adapter(["math"])
    for change in (lambda: bank.add("code", folder / "code"), lambda: bank.remove("math")):
        with pytest.raises(ExpertBankError, match=r"math is merged .*unmerge_adapter\(\)"):
            change()
    bank.model.unmerge_adapter()
    bank.add("code", folder / "code")


def test_an_expert_of_other_layers_is_added_to_the_layers_it_knows(bank, tiny_llama, character_tokenizer, tmp_path):
    base = tiny_llama(vocab_size=100, max_position_embeddings=512)
    model = get_peft_model(base, SVFConfig(target_modules=["lm_head"], init_weights=False), adapter_name="head")
    model.save_pretrained(tmp_path)
    head = ExpertBank(model, character_tokenizer)
    bank.add("head", tmp_path / "head")
    assert torch.equal(logits(bank, "head"), logits(head, "head"))
    shutil.rmtree(tmp_path / "head")
    bank.remove("head")
    with pytest.raises(ValueError, match="Unknown expert 'head'"):
        logits(bank, "head")


def test_an_expert_of_the_bank_is_an_object_and_an_object_becomes_an_expert(bank, folder, tmp_path):
    facts = {"name": "Sums", "label": "arithmetic", "description": "sums", "results": [{"n": 3}]}
    expert = Expert.from_pretrained(folder / "code")
    expert = expert.with_offsets(expert.offsets, facts)
    bank.add("sums", expert)
    assert bank.experts["sums"] == ExpertEntry("arithmetic", "sums") and bank.facts["sums"] == facts
    bank.add("second", expert, label="other", description="own")
    assert bank.experts["second"] == ExpertEntry("other", "own")
    assert torch.equal(logits(bank, "sums"), logits(ExpertBank.from_pretrained(folder), "code"))
    given = bank.expert("second")
    assert given.metadata == {**facts, "label": "other", "description": "own"}
    assert all(torch.equal(given.offsets[name], offset) for name, offset in expert.offsets.items())
    assert bank.expert("math").metadata == {"name": "math", "label": "math"}
    with pytest.raises(ExpertBankError, match="no 'typo' to give; it has 'math', 'sums', 'second'"):
        bank.expert("typo")
    with pytest.raises(ExpertBankError, match="has the label 'arithmetic'; a label is unique"):
        bank.add("third", expert)


def test_facts_are_loaded_kept_and_saved(bank, folder, tmp_path):
    shutil.copytree(folder / "code", tmp_path / "code")
    facts = {"label": "programs", "description": "small functions", "steps": 40}
    (tmp_path / "code" / "expert.json").write_text(json.dumps(facts))
    bank.add("code", tmp_path / "code")
    assert bank.experts["code"] == ExpertEntry("programs", "small functions")
    bank.rename("code", "python")
    saved = bank.save_pretrained(tmp_path / "bank", include_base=True)
    assert json.loads((saved / "python" / "expert.json").read_text()) == facts
    assert not (saved / "math" / "expert.json").exists()
    loaded = ExpertBank.from_pretrained(saved)
    assert loaded.facts == {"math": {}, "python": facts} and loaded.experts == bank.experts
    loaded.remove("python")
    assert loaded.facts == {"math": {}}
    before = state(bank)
    (tmp_path / "code" / "expert.json").write_text("[")
    with pytest.raises(ExpertError, match=r"expert\.json is damaged"):
        bank.add("again", tmp_path / "code")
    assert same(state(bank), before)


@pytest.mark.parametrize("kind", ["offsets", "default", "logits", "in full", "basis"])
def test_a_renamed_expert_computes_what_it_did(tiny_llama, character_tokenizer, kind):
    settings: dict[str, Any] = {
        "logits": {"parametrization": "sigmoid"},
        "in full": {"modules_to_save": ["lm_head"]},
        "basis": {"save_basis": True},
    }.get(kind, {})
    name = "default" if kind == "default" else "math"
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(vocab_size=100), SVFConfig(init_weights=False, **settings), adapter_name=name)
    model.add_adapter("code", SVFConfig(init_weights=False, **settings))
    model.set_strength(name, 0.5)
    bank = ExpertBank(model, character_tokenizer)
    before = {each: logits(bank, each) for each in (name, "code", "others")}
    flags = sorted((key.replace(f".{name}.", ".new."), p.requires_grad) for key, p in model.named_parameters())
    bank.rename(name, "new", label="fresh")
    assert bank.experts == {"new": ExpertEntry("fresh"), "code": ExpertEntry("code")}
    assert list(model.peft_config) == ["new", "code"] and model.active_adapters == ["new"]
    for each, expected in before.items():
        assert torch.equal(logits(bank, "new" if each == name else each), expected)
    assert sorted((key, p.requires_grad) for key, p in model.named_parameters()) == flags
    bank.rename("new", name)  # and back
    assert torch.equal(logits(bank, name), before[name])


def test_dispatcher_and_pipeline_know_a_renamed_expert_from_the_next_call_on(bank, folder):
    bank.add("code", folder / "code")
    bank.add_classifier("judge", folder / "extra")
    pipe, classifying = Transformer2Pipeline(bank, max_new_tokens=2, dispatcher="prompt"), ClassifierDispatcher(bank)
    before, scores = pipe("x", expert="code"), classifying.route(["x"]).scores
    bank.rename("code", "python")
    assert pipe("x", expert="python")[0]["generated_text"] == before[0]["generated_text"]
    assert set(pipe("x")[0]["scores"]) == {"math", "code", "others"}  # the label stays
    with pytest.raises(ValueError, match="Unknown expert 'code'; this bank knows 'math', 'python', 'others'"):
        pipe("x", expert="code")
    bank.describe("python", label="programs", description="small functions")
    assert set(pipe("x")[0]["scores"]) == {"math", "programs", "others"}
    assert bank.experts["python"] == ExpertEntry("programs", "small functions")
    bank.rename("python", "python", label="code")
    bank.describe("python", description="")
    bank.rename("judge", "umpire")
    assert bank.classifier == "umpire" and classifying.route(["x"]).experts == ("math", "python")
    assert classifying.route(["x"]).scores == scores


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda bank: bank.rename("typo", "new"), "no 'typo' to rename; it has 'math', 'extra'"),
        (lambda bank: bank.rename("math", "extra"), "has 'extra' already"),
        (lambda bank: bank.rename("math", "spare"), "model has an adapter 'spare' already"),
        (lambda bank: bank.rename("math", "others"), "'others' cannot name an expert"),
        (lambda bank: bank.rename("math", "a.b"), "cannot name an expert"),
        (lambda bank: bank.rename("math", "q_proj"), "cannot be named 'q_proj'"),
        (lambda bank: bank.rename("math", "new", label=" "), "a label is unique"),
        (lambda bank: bank.rename("extra", "new", label="x"), "classifier, which has no label"),
        (lambda bank: bank.describe("extra", label="x"), "classifier, which has no label"),
        (lambda bank: bank.describe("typo", label="x"), "no 'typo' to describe"),
        (lambda bank: bank.describe("math", label="others"), "a label is unique"),
        (lambda bank: bank.describe("math", label=7), "both texts"),
    ],
)
def test_names_that_cannot_be_are_refused_and_the_bank_is_as_it_was(bank, folder, call, message):
    bank.add_classifier("extra", folder / "extra")
    bank.model.load_adapter(folder / "code", adapter_name="spare")
    before, facts = state(bank), bank.facts
    with pytest.raises(ExpertBankError, match=message):
        call(bank)
    assert same(state(bank), before) and bank.facts == facts


def test_a_merged_expert_is_not_renamed(bank):
    bank.model.merge_adapter(["math"])
    with pytest.raises(ExpertBankError, match=r"math is merged .*unmerge_adapter\(\)"):
        bank.rename("math", "new")


def test_a_bank_says_what_it_is(bank, folder, tiny_llama, character_tokenizer):
    bank.add("code", folder / "code", label="programs")
    bank.add_classifier("judge", folder / "extra")
    assert repr(bank) == "ExpertBank(2 experts on 'LlamaForCausalLM': math, code (programs), classifier judge)"
    assert len(bank) == 2 and "math" in bank and "judge" not in bank and "others" not in bank
    empty = ExpertBank(tiny_llama(vocab_size=100), character_tokenizer)
    assert repr(empty) == "ExpertBank(0 experts on 'LlamaForCausalLM': none)" and len(empty) == 0 and empty
