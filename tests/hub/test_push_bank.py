"""push_bank: an id is all that a stranger needs; what is no longer in the bank disappears, what is not ours stays."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from transformers import AutoTokenizer, LlamaForCausalLM

from peft_svf import ExpertBank, ExpertEntry
from peft_svf.experts import ExpertError, HubError
from peft_svf.experts.bank_config import BankConfig
from peft_svf.hub import push_bank
from peft_svf.hub.bank_staging import base_of_bank, copy_bank
from peft_svf.hub.base_reference import BaseReference


IDS = torch.arange(3, 23).reshape(2, 10)
OF_EXPERT = ("README.md", "adapter_config.json", "adapter_model.safetensors", "expert.json", "levers.png")
AT_THE_ROOT = ["README.md", "bank.json", "chat_template.jinja", "config.json", "modeling_transformer2.py"]
AT_THE_ROOT += ["tokenizer.json", "tokenizer_config.json", "transformer2.py"]
PROTOTYPE: list[tuple[ExpertBank, Path]] = []


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_svf.plots.plot_levers", lambda expert, path, title=None: path.write_bytes(b"levers"))


@pytest.fixture
def folder(
    tiny_llama: Callable[..., LlamaForCausalLM],
    character_tokenizer: Any,
    add_experts: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
) -> Path:
    """A bank with its base model: the experts "math" and "code", and the classifier "router"."""
    if not PROTOTYPE:
        model = add_experts(tiny_llama(vocab_size=100), names=("math", "code", "router"))
        entries = {"math": ExpertEntry("arithmetic", "sums"), "code": ExpertEntry("programs")}
        bank = ExpertBank(model, character_tokenizer, entries, classifier="router")
        PROTOTYPE.append((bank, bank.save_pretrained(tmp_path_factory.mktemp("prototype") / "bank", True)))
    return shutil.copytree(PROTOTYPE[0][1], tmp_path / "machine" / "bank")


@pytest.fixture
def bank(folder: Path) -> ExpertBank:
    return copy.deepcopy(PROTOTYPE[0][0])


@pytest.fixture
def base(hub: Any, folder: Path) -> str:
    """The commit of "user/base"."""
    return hub.put("user/base", folder / "base")


@torch.no_grad()
def logits(bank: ExpertBank, name: str) -> torch.Tensor:
    return bank.model(IDS, adapter_names=[name] * 2).logits


def paths(*folders: str) -> list[str]:
    return sorted(AT_THE_ROOT + [f"{name}/{file}" for name in folders for file in OF_EXPERT])


def test_the_hubs_id_loads_the_bank(hub: Any, bank: ExpertBank, base: str) -> None:
    pushed = bank.push_to_hub("user/bank", base_model="user/base", tag="v1", tags=["sums"])
    assert hub.commits("user/bank")[0].sha == pushed.commit
    assert len(hub.commits("user/bank")) == 2
    assert sorted(hub.files("user/bank")) == paths("code", "math", "router")
    config = json.loads(hub.files("user/bank")["config.json"])
    assert (config["base_model_name_or_path"], config["base_revision"]) == ("user/base", base)
    assert (
        set(config["custom_pipelines"]) == {"transformer2-generation"} and "AutoModelForCausalLM" in config["auto_map"]
    )
    loaded = ExpertBank.from_pretrained("user/bank", revision="v1")
    assert (loaded.experts, loaded.classifier, loaded.base_revision) == (bank.experts, "router", base)
    for name in ("math", "code", "router"):
        assert torch.equal(logits(loaded, name), logits(bank, name))


def test_every_expert_has_a_card_and_the_base_by_id_and_commit(hub: Any, bank: ExpertBank, base: str) -> None:
    push_bank(bank, "user/bank", base_model="user/base", facts={"license": "mit", "description": "small skills"})
    files = hub.files("user/bank")
    for name in ("math", "code", "router"):
        config = json.loads(files[f"{name}/adapter_config.json"])
        said = ("base_model_name_or_path", "revision", "task_type", "inference_mode")
        assert [config[key] for key in said] == ["user/base", base, "CAUSAL_LM", True]
        assert ModelCard(files[f"{name}/README.md"].decode()).data.base_model == "user/base"
    assert json.loads(files["math/expert.json"]).items() >= {"label": "arithmetic", "description": "sums"}.items()
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("mit", "user/base")
    assert "user/bank" in card.text and "small skills" in card.text and "arithmetic" in card.text


def test_bank_and_folder_give_the_same_repository_without_a_trace_of_this_machine(
    hub: Any, bank: ExpertBank, folder: Path, base: str, tmp_path: Path
) -> None:
    (folder / "notes.txt").write_text("mine")
    facts = {"description": f"made in {tmp_path}/machine"}
    pushed = [push_bank(source, "user/bank", base_model="user/base", facts=facts) for source in (folder, bank)]
    assert [one.unchanged for one in pushed] == [False, True]
    assert sorted(hub.files("user/bank")) == paths("code", "math", "router")
    for path, content in hub.files("user/bank").items():
        assert not [place for place in (tmp_path, Path.home(), "/tmp/") if str(place).encode() in content], path


def test_a_removed_expert_disappears_and_files_of_the_owner_stay(hub: Any, bank: ExpertBank, base: str) -> None:
    push_bank(bank, "user/bank", base_model="user/base")
    mine = {"notes.md": b"mine", "code/notes.md": b"mine", "lora/adapter_config.json": b"{}"}
    hub.put("user/bank", mine)
    bank.remove("code")
    bank.remove("router")
    push_bank(bank, "user/bank", base_model="user/base")
    assert sorted(hub.files("user/bank")) == sorted([*paths("math"), *mine])
    assert len(hub.commits("user/bank")) == 4
    assert list(ExpertBank.from_pretrained("user/bank").experts) == ["math"]


def test_the_base_model_goes_along_and_disappears_again(hub: Any, bank: ExpertBank, folder: Path, base: str) -> None:
    first = push_bank(bank, "user/bank", include_base=True)
    assert push_bank(folder, "user/bank", include_base=True) == type(first)(**{**vars(first), "unchanged": True})
    files = hub.files("user/bank")
    assert {"base/model.safetensors", "base/tokenizer.json"} <= files.keys() and "tokenizer.json" not in files
    assert json.loads(files["config.json"])["base_model_name_or_path"] == "base"
    assert json.loads(files["math/adapter_config.json"])["revision"] is None
    loaded = ExpertBank.from_pretrained("user/bank")
    assert torch.equal(logits(loaded, "math"), logits(bank, "math"))
    with pytest.raises(HubError, match="give one of them"):
        push_bank(loaded, "user/bank", include_base=True, base_model="user/base")
    with pytest.raises(HubError, match=r"push the base model first.*include_base=True"):
        push_bank(loaded, "user/other")  # the folder of its base is in a cache, but no repository of a model
    push_bank(folder, "user/bank", base_model="user/base")
    assert sorted(hub.files("user/bank")) == paths("code", "math", "router")


@pytest.mark.parametrize("given", [{}, {"base_model": "/no/id"}, {"base_model": "user/gone"}])
def test_a_base_that_is_not_on_the_hub_is_refused_before_anything_is_created(
    hub: Any, folder: Path, given: dict[str, str]
) -> None:
    with pytest.raises(HubError, match=r"push the base model first.*--include-base"):
        push_bank(folder, "user/bank", **given)
    assert not hub.repositories and not hub.asked("POST|PUT")


def test_a_pulled_bank_is_pushed_elsewhere_without_saying_its_base(hub: Any, bank: ExpertBank, base: str) -> None:
    push_bank(bank, "user/bank", base_model="user/base")
    hub.put("user/base", {"later.txt": b"the main branch goes on"})
    push_bank(ExpertBank.from_pretrained("user/bank"), "lab/bank")
    assert json.loads(hub.files("lab/bank")["config.json"])["base_revision"] == base
    assert json.loads(hub.files("lab/bank")["math/adapter_config.json"])["revision"] == base


@pytest.mark.parametrize("damage", ["no folder", "no expert", "not finite"])
def test_a_damaged_bank_is_not_pushed(hub: Any, folder: Path, base: str, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    if damage == "not finite":
        path = folder / "code" / "adapter_model.safetensors"
        save_file({key: tensor / 0 for key, tensor in load_file(path).items()}, path)
    elif damage == "no expert":
        shutil.rmtree(folder / "code")
    message = {"no folder": "no bank folder", "no expert": "'code' is missing", "not finite": "'code'.* not finite"}
    with pytest.raises(ExpertError, match=message[damage]):
        push_bank(folder / "nothing" if damage == "no folder" else folder, "user/bank", base_model="user/base")
    assert set(hub.repositories) == {("model", "user/base")}


def test_a_bank_does_not_take_the_place_of_an_expert(hub: Any, folder: Path, base: str) -> None:
    hub.put("user/expert", {"adapter_config.json": b"{}"})
    with pytest.raises(HubError, match="user/expert holds an expert, and a bank would take its place"):
        push_bank(folder, "user/expert", base_model="user/base")


def test_the_tokenizer_of_the_bank_is_the_one_that_loads(hub: Any, folder: Path, base: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template = "{{ 'changed' }}"
    tokenizer.save_pretrained(folder)
    push_bank(folder, "user/bank", base_model="user/base")
    assert ExpertBank.from_pretrained("user/bank").tokenizer.chat_template == "{{ 'changed' }}"


def test_a_base_model_in_the_cache_of_the_hub_is_referred_to_by_its_id(folder: Path, tmp_path: Path) -> None:
    cached = tmp_path / "models--user--base" / "snapshots" / ("a" * 40)
    cached.mkdir(parents=True)
    config = dataclasses.replace(BankConfig.read(folder), base_model_name_or_path=str(cached))
    base, local = base_of_bank(folder, config, (None, None), False, HfApi())
    assert base == BaseReference("user/base", "a" * 40) and local == str(cached)


def test_code_and_pickles_in_the_folder_of_the_base_model_stay_where_they_are(folder: Path, tmp_path: Path) -> None:
    for name in ("modeling_own.py", "pytorch_model.bin"):
        (folder / "base" / name).write_text("evil")
    copy_bank(folder, tmp_path / "copy", keeps_base=True)
    copied = {path.name for path in (tmp_path / "copy" / "base").iterdir()}
    assert copied == {path.name for path in (folder / "base").iterdir()} - {"modeling_own.py", "pytorch_model.bin"}
