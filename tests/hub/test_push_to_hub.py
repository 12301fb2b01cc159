"""Plain `model.push_to_hub` on PeftModels: ours for SVF adapters, the original for all others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from peft_svf import ExpertBank, ExpertEntry
from peft_svf.experts import HubError
from peft_svf.hub import push_expert
from peft_svf.registration import register_push


IDS = torch.arange(3, 23).reshape(2, 10)


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_svf.plots.plot_levers", lambda expert, path, title=None: path.write_bytes(b"levers"))


@pytest.fixture
def model(
    hub: Any, tiny_llama: Callable[..., LlamaForCausalLM], add_experts: Callable[..., PeftModel], tmp_path: Path
) -> PeftModel:
    """The base model "user/base" with the adapters "math", which is active, and "code"."""
    tiny_llama(vocab_size=100).save_pretrained(tmp_path / "base")
    hub.put("user/base", tmp_path / "base")
    return add_experts(load_base())


def load_base() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained("user/base")


def test_it_makes_the_repository_of_push_expert(hub: Any, model: PeftModel) -> None:
    model.delete_adapter("code")
    info = model.push_to_hub("user/expert")
    assert info == f"{hub.url}/user/expert/commit/{info.oid}" == info.commit_url
    assert [commit.title for commit in hub.commits("user/expert")] == ["Upload model", "initial commit"]
    assert push_expert(model, "user/expert", adapter_name="math").unchanged
    assert "adapter_config.json" in hub.files("user/expert")
    assert ModelCard(hub.files("user/expert")["README.md"].decode()).data.library_name == "peft"


def test_the_active_adapter_is_at_the_root_and_the_others_in_folders(hub: Any, model: PeftModel) -> None:
    model.set_adapter("code")
    model.push_to_hub("user/experts")
    assert len(hub.commits("user/experts")) == 2
    for folder, name in (("", "code"), ("math", "math")):
        config = json.loads(hub.files("user/experts")[f"{folder}/adapter_config.json".lstrip("/")])
        assert config["base_model_name_or_path"] == "user/base" and len(config["revision"]) == 40
        loaded = PeftModel.from_pretrained(load_base(), "user/experts", subfolder=folder or None)
        model.set_adapter(name)
        with torch.no_grad():
            assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert f"{'math'}/README.md" in hub.files("user/experts")


def test_the_arguments_of_the_original_are_taken(hub: Any, model: PeftModel) -> None:
    model.push_to_hub(
        "user/expert",
        commit_message="mine",
        commit_description="and why",
        private=True,
        token="writer",
        revision="wide",
        max_shard_size="5GB",
        tags=["sums"],
    )
    commit = hub.commits("user/expert", "wide")[0]
    assert commit.title == "mine" and hub.repositories["model", "user/expert"].private
    card = ModelCard(hub.files("user/expert", "wide")["README.md"].decode())
    assert {"peft", "svf", "transformer2", "sums"} <= set(card.data.tags)
    proposed = model.push_to_hub("user/expert", create_pr=True)
    assert proposed.pr_url is not None and hub.files("user/expert") == {}
    with pytest.raises(HubError, match="does not accept the token"):
        model.push_to_hub("user/expert", token="wrong")
    with pytest.raises(TypeError, match="unexpected keyword argument 'branch'"):
        model.push_to_hub("user/expert", branch="main")


def test_the_model_of_a_bank_is_pushed_as_the_bank(hub: Any, model: PeftModel, character_tokenizer: Any) -> None:
    bank = ExpertBank(model, character_tokenizer, {"math": ExpertEntry("sums"), "code": ExpertEntry("code")})
    bank.push_to_hub("user/bank")
    AutoModelForCausalLM.from_pretrained("user/bank").push_to_hub("user/copy")
    assert {"config.json", "math/adapter_config.json"} <= hub.files("user/copy").keys()
    assert "adapter_config.json" not in hub.files("user/copy")
    assert len(hub.commits("user/copy")) == 2


def test_a_base_in_a_folder_is_refused(hub: Any, model: PeftModel, tmp_path: Path) -> None:
    local = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), save(model, tmp_path / "expert")
    )
    with pytest.raises(HubError, match=rf"local folder '{tmp_path}/base'.*push the base model first"):
        local.push_to_hub("user/expert")
    assert ("model", "user/expert") not in hub.repositories


def test_other_methods_keep_the_original(hub: Any, model: PeftModel) -> None:
    get_peft_model(load_base(), LoraConfig(task_type="CAUSAL_LM")).push_to_hub("user/lora")
    files = hub.files("user/lora")
    assert json.loads(files["adapter_config.json"])["peft_type"] == "LORA" and "expert.json" not in files


def test_registering_twice_wraps_once() -> None:
    before = PeftModel.push_to_hub
    register_push()
    assert PeftModel.push_to_hub is before
    assert not hasattr(before.__wrapped__, "pushes_svf") and before.__doc__ == before.__wrapped__.__doc__


def save(model: PeftModel, folder: Path) -> Path:
    """The adapter "math" as PEFT saves it, with the base model's folder in place of its id."""
    model.save_pretrained(folder, selected_adapters=["math"], save_embedding_layers=False)
    path = folder / "math" / "adapter_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(folder.parent / "base")})
    )
    return folder / "math"
