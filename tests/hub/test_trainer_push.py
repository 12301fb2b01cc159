"""The trainer's uploads: the expert with its card, once, and nothing else of its folder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from peft_svf import Expert, SVFConfig
from peft_svf.hub import Pushed
from peft_svf.trainers import SVFPolicyGradientConfig, SVFPolicyGradientTrainer


FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "expert.json", "levers.png"}


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_svf.plots.plot_levers", lambda expert, path, title=None: path.write_bytes(b"levers"))


@pytest.fixture
def make(
    hub: Any, tiny_llama: Callable[..., LlamaForCausalLM], character_tokenizer: Any, tmp_path: Path
) -> Callable[..., SVFPolicyGradientTrainer]:
    """A trainer of two steps on the base model "user/base"; `folder=True` loads it from its folder instead."""
    tiny_llama(vocab_size=100, max_position_embeddings=128).save_pretrained(tmp_path / "base")
    hub.put("user/base", tmp_path / "base")

    def build(folder: bool = False, peft_config: Any = None, **options: Any) -> SVFPolicyGradientTrainer:
        settings = {
            "max_steps": 2, "save_strategy": "no", "per_device_train_batch_size": 2, "max_completion_length": 2,
            "gradient_accumulation_steps": 1, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
            "learning_curve": False, "hub_model_id": "user/tens", "learning_rate": 0.1, "max_grad_norm": 1.0,
        }  # fmt: skip
        rewards = itertools.count(0.0, 0.001)  # each better than the one before, in evaluations too
        rows = Dataset.from_list([{"prompt": f"{i} + 1?"} for i in range(6)])
        trainer = SVFPolicyGradientTrainer(
            model=AutoModelForCausalLM.from_pretrained(tmp_path / "base" if folder else "user/base"),
            reward_funcs=lambda completions, **_: [next(rewards) for _ in completions],
            args=SVFPolicyGradientConfig(str(tmp_path / "run"), **{**settings, **options}),
            train_dataset=rows,
            eval_dataset=rows.select([0, 1]),
            processing_class=character_tokenizer,
            peft_config=peft_config or SVFConfig(task_type="CAUSAL_LM", target_modules=["up_proj"]),
        )
        trainer.card_facts = {"task": "tens", "label": "tens", "license": "mit"}
        return trainer

    return build


def said(hub: Any, name: str = "user/tens", branch: str = "main") -> dict[str, Any]:
    return json.loads(hub.files(name, branch)["expert.json"])


def test_the_expert_is_pushed_and_nothing_else_of_its_folder(hub: Any, make: Any, tmp_path: Path) -> None:
    trainer = make()
    trainer.train()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    info = trainer.push_to_hub(commit_message="Trained", tags="sums")
    assert [commit.title for commit in hub.commits("user/tens")] == ["Trained", "initial commit"]
    assert info.oid == hub.commits("user/tens")[0].sha and info.commit_message == "Trained"
    assert set(hub.files("user/tens")) == FILES
    everything = b"".join(hub.files("user/tens").values())
    assert str(tmp_path).encode() not in everything
    config = json.loads(hub.files("user/tens")["adapter_config.json"])
    assert config["base_model_name_or_path"] == "user/base" and len(config["revision"]) == 40
    assert said(hub).items() >= {"name": "tens", "task": "tens", "steps": 2, "license": "mit"}.items()
    assert {"sums", "svf"} <= set(ModelCard(hub.files("user/tens")["README.md"].decode()).data.tags)
    live = Expert.from_model(trainer.model)
    pushed = Expert.from_pretrained("user/tens")
    assert all(torch.equal(pushed.offsets[name], offset) for name, offset in live.offsets.items())
    later = trainer.push_to_hub(blocking=False, revision="later", tags=["sums"]).result()
    assert later.oid == info.oid and "expert.json" in hub.files("user/tens", "later")  # with nothing new to say
    with pytest.raises(TypeError, match=r"takes no 'language': say it in `trainer\.card_facts`"):
        trainer.push_to_hub(language="en")


def test_saving_during_training_pushes_the_expert_of_each_checkpoint(hub: Any, make: Any, tmp_path: Path) -> None:
    trainer = make(push_to_hub=True, save_strategy="steps", save_steps=1, save_total_limit=1, hub_always_push=True)
    assert len(hub.commits("user/tens")) == 1  # the repository is made at once, as transformers does
    trainer.train()
    titles = [commit.title for commit in hub.commits("user/tens")]
    assert titles == ["Training in progress, step 2", "Training in progress, step 1", "initial commit"]
    assert set(hub.files("user/tens")) == FILES
    assert said(hub)["steps"] == 2
    trainer.save_model()  # of the same expert
    assert [commit.title for commit in hub.commits("user/tens")] == titles
    assert not (tmp_path / "run" / "_saving").exists()


def test_a_failed_upload_in_the_background_is_told_and_training_goes_on(
    hub: Any, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(push_to_hub=True, save_strategy="steps", save_steps=1)
    trainer.args.hub_token = "wrong"
    trainer.train()
    assert trainer.state.global_step == 2 and len(hub.commits("user/tens")) == 1
    assert "upload in the background failed: Cannot push to user/tens: the Hub does not accept the" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"folder": True}, r"base model .*/base is a folder, which others do not have; push the base model first"),
        ({"hub_strategy": "checkpoint"}, r"whole checkpoints, .*use \"every_save\""),
        ({"hub_strategy": "all_checkpoints"}, r"whole checkpoints, .*use \"every_save\""),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_a_repository_is_made(
    hub: Any, make: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(push_to_hub=True, **options)
    assert ("model", "user/tens") not in hub.repositories


def test_facts_of_the_trainer_can_name_the_base_model(hub: Any, make: Any) -> None:
    trainer = make(folder=True)
    trainer.card_facts = {**trainer.card_facts, "base_model": "user/base"}
    trainer.push_to_hub()
    assert json.loads(hub.files("user/tens")["adapter_config.json"])["base_model_name_or_path"] == "user/base"


def test_the_live_model_knows_how_it_was_trained(hub: Any, make: Any) -> None:
    trainer = make()
    trainer.train()
    trainer.model.push_to_hub("user/live")
    assert said(hub, "user/live").items() >= {"task": "tens", "steps": 2, "label": "tens"}.items()


def test_a_sweep_pushes_nothing(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[str] = []
    trainer = make(
        push_to_hub=True, max_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        per_device_eval_batch_size=2,
    )  # fmt: skip

    def push(self: Any, folder: str, **_: Any) -> Pushed:
        pushed.append(folder)
        return Pushed("https://huggingface.co/user/tens", "0" * 40, "user/tens")

    monkeypatch.setattr(type(trainer), "push_saved_expert", push)
    assert trainer.sweep_kl([0.0]).winner == 0.0
    assert pushed == [] and trainer.args.push_to_hub
    trainer.save_model()
    assert pushed == [trainer.args.output_dir]


def test_other_adapters_keep_the_way_of_transformers(hub: Any, make: Any) -> None:
    trainer = make(peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules=["up_proj"]))
    trainer.push_to_hub()
    files = hub.files("user/tens")
    assert "training_args.bin" in files and "expert.json" not in files
