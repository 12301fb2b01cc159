"""SVF through transformers alone: its Trainer, and the adapter methods that its models have of their own.

Every path has to give what a `PeftModel` with the same offsets gives. Loading in a fresh process: test_checkpoint.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

from peft_svf import SVFConfig
from peft_svf.tuner import SVFLayer


IDS = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(0))
ROWS = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(3, 97, (24, 8), generator=torch.Generator().manual_seed(1)).tolist()
]
Build = Callable[..., LlamaForCausalLM]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def offsets(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model."): layer.svf_offset[adapter].weight.detach().clone()
        for name, layer in model.named_modules()
        if isinstance(layer, SVFLayer)
    }


@pytest.fixture
def base_path(tiny_llama: Build, tmp_path: Path) -> str:
    tiny_llama().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def base(base_path: str) -> Callable[[], LlamaForCausalLM]:
    return lambda: AutoModelForCausalLM.from_pretrained(base_path)


@pytest.fixture
def experts(base: Callable[[], LlamaForCausalLM], add_experts: Callable, tmp_path: Path) -> tuple[PeftModel, Path]:
    """A `PeftModel` with the adapters "math" and "code", and the folder where each of them is saved."""
    model = add_experts(base(), std=0.3).eval()
    model.save_pretrained(tmp_path / "experts")
    return model, tmp_path / "experts"


def peft_logits(experts: tuple[PeftModel, Path], adapter: str | list[str] | None) -> torch.Tensor:
    """What the `PeftModel` computes under this adapter, or these together, or none."""
    model = experts[0]
    if adapter is None:
        with model.disable_adapter():
            return logits(model)
    model.base_model.set_adapter(adapter)
    return logits(model)


def train(model: nn.Module, folder: Path, **settings: Any) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.05,
            "logging_steps": 1,
            "save_steps": 2,
            "use_cpu": True,
            "seed": 0,
            "disable_tqdm": True,
            "report_to": "none",
            **settings,
        },
    )
    return Trainer(model, args=args, train_dataset=Dataset.from_list(ROWS), eval_dataset=Dataset.from_list(ROWS))


def test_resumed_training_ends_with_the_same_offsets(base: Callable[[], LlamaForCausalLM], tmp_path: Path) -> None:
    whole = train(get_peft_model(base(), SVFConfig(task_type="CAUSAL_LM")), tmp_path / "run")
    whole.train()
    resumed = train(get_peft_model(base(), SVFConfig(task_type="CAUSAL_LM")), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))

    halfway = offsets(PeftModel.from_pretrained(base(), tmp_path / "run" / "checkpoint-2"))
    expected, after = offsets(whole.model), offsets(resumed.model)
    assert len(expected) == 14 and all(not torch.equal(halfway[name], value) for name, value in expected.items())
    assert all(torch.equal(after[name], value) for name, value in expected.items())
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3, 4]


def test_checkpoints_of_the_trainer_hold_the_adapter_alone(
    base: Callable[[], LlamaForCausalLM], tmp_path: Path
) -> None:
    train(get_peft_model(base(), SVFConfig(task_type="CAUSAL_LM")), tmp_path).train()
    tensors = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert len(tensors) == 14 and all(name.endswith(".svf_offset.weight") for name in tensors)
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()


def test_the_best_checkpoint_comes_back_at_the_end(base: Callable[[], LlamaForCausalLM], tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    # The loss falls, so the checkpoint with the greatest loss is the first one.
    trainer = train(get_peft_model(base(), SVFConfig()), tmp_path, greater_is_better=True, **settings)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses == sorted(losses, reverse=True) and len(losses) == 4
    expected = offsets(PeftModel.from_pretrained(base(), tmp_path / "checkpoint-1"))
    assert all(torch.equal(value, expected[name]) for name, value in offsets(trainer.model).items())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[0], abs=1e-6)


def test_trainer_takes_a_model_whose_adapter_transformers_added(
    base: Callable[[], LlamaForCausalLM], tmp_path: Path
) -> None:
    model = base()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.add_adapter(SVFConfig())
    reference = get_peft_model(base(), SVFConfig())
    train(model, tmp_path / "native").train()
    train(reference, tmp_path / "peft").train()
    expected = offsets(reference)
    assert all(torch.equal(value, expected[name]) for name, value in offsets(model).items())
    after = {name.replace(".base_layer", ""): parameter for name, parameter in model.named_parameters()}
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_loaded_adapters_switch_disable_and_enable_as_in_peft(
    base: Callable[[], LlamaForCausalLM], experts: tuple[PeftModel, Path]
) -> None:
    model = base()
    for name in ("math", "code"):
        model.load_adapter(str(experts[1] / name), name)
    for name in ("math", "code", ["math", "code"]):
        model.set_adapter(name)
        assert model.active_adapters() == ([name] if isinstance(name, str) else name)
        assert torch.equal(logits(model), peft_logits(experts, name))
        model.disable_adapters()
        assert torch.equal(logits(model), peft_logits(experts, None))
        model.enable_adapters()
        assert torch.equal(logits(model), peft_logits(experts, name))


def test_added_adapter_filled_with_a_state_dict_is_the_expert(
    base: Callable[[], LlamaForCausalLM], experts: tuple[PeftModel, Path]
) -> None:
    expected = peft_logits(experts, "math")
    source = base()
    source.load_adapter(str(experts[1] / "math"), "math")
    state = source.get_adapter_state_dict("math")
    assert len(state) == 14 and all(name.endswith(".svf_offset.weight") for name in state)
    model = base()
    model.load_adapter(peft_config=SVFConfig(), adapter_state_dict=state, adapter_name="copy")
    model.set_adapter("copy")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_loaded_adapter_is_trainable_only_on_demand(
    base: Callable[[], LlamaForCausalLM], experts: tuple[PeftModel, Path], is_trainable: bool
) -> None:
    model = base()
    model.load_adapter(str(experts[1] / "math"), "math", is_trainable=is_trainable)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len([name for name in trainable if name.endswith(".svf_offset.math.weight")]) == (14 if is_trainable else 0)
    assert len(trainable) == (14 if is_trainable else 0)


def test_save_pretrained_writes_the_adapter_that_every_path_loads(
    base: Callable[[], LlamaForCausalLM], base_path: str, experts: tuple[PeftModel, Path], tmp_path: Path
) -> None:
    expected = peft_logits(experts, "code")
    model = base()
    model.load_adapter(str(experts[1] / "code"), "code")
    model.set_adapter("code")
    model.save_pretrained(tmp_path / "saved")
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names and "model.safetensors" not in names
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert config["peft_type"] == "SVF" and config["base_model_name_or_path"] == base_path
    assert len(config["base_fingerprint"]) == 14

    again = base()
    again.load_adapter(str(tmp_path / "saved"))
    for loaded in (
        PeftModel.from_pretrained(base(), tmp_path / "saved"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
        again,
    ):
        assert torch.equal(logits(loaded), expected)


def test_deleting_the_active_adapter_and_then_all(
    base: Callable[[], LlamaForCausalLM], experts: tuple[PeftModel, Path]
) -> None:
    model = base()
    for name in ("math", "code"):
        model.load_adapter(str(experts[1] / name), name)
    model.set_adapter("math")
    model.delete_adapter("math")
    assert not [name for name, _ in model.named_parameters() if ".math." in name]
    model.set_adapter("code")
    assert torch.equal(logits(model), peft_logits(experts, "code"))

    model.delete_adapter("code")
    assert not hasattr(model, "peft_config") and not [n for n, _ in model.named_parameters() if "svf_offset" in n]
    assert torch.equal(logits(model), peft_logits(experts, None))
    model.load_adapter(str(experts[1] / "math"), "math")
    model.set_adapter("math")
    assert torch.equal(logits(model), peft_logits(experts, "math"))


def test_generation_of_a_native_adapter_is_that_of_peft(
    base: Callable[[], LlamaForCausalLM], experts: tuple[PeftModel, Path]
) -> None:
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    model = base()
    model.load_adapter(str(experts[1] / "math"), "math")
    experts[0].set_adapter("math")
    expected = experts[0].generate(input_ids=IDS, **settings)
    assert torch.equal(model.generate(input_ids=IDS, **settings), expected)
    with experts[0].disable_adapter():
        assert not torch.equal(experts[0].generate(input_ids=IDS, **settings), expected)


def test_text_generation_pipeline_takes_the_folder_of_an_adapter(
    tiny_llama: Build, character_tokenizer: PreTrainedTokenizerFast, add_experts: Callable, tmp_path: Path
) -> None:
    tiny_llama(vocab_size=100).save_pretrained(tmp_path / "base")
    model = add_experts(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), names=("math",))
    model.save_pretrained(tmp_path / "experts")
    folder = str(tmp_path / "experts" / "math")
    generator = pipeline("text-generation", model=folder, tokenizer=character_tokenizer, device="cpu")
    text = generator("2 + 2", max_new_tokens=8, min_new_tokens=8, do_sample=False, return_full_text=False)
    ids = torch.tensor([character_tokenizer("2 + 2").input_ids])
    expected = model.generate(input_ids=ids, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    answer = character_tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert text[0]["generated_text"] == answer and answer
