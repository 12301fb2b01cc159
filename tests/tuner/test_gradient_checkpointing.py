"""Gradient checkpointing, both kinds: the layers run twice, and the gradients of the offsets stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, Trainer, TrainingArguments

from peft_svf import SVFConfig
from peft_svf.tuner import SVFLayer


IDS = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(0))
Build = Callable[..., LlamaForCausalLM]
CONFIGS = {"offset": {}, "some components": {"rank": 3}, "paper": {"parametrization": "sigmoid"}}


def through_peft(base: LlamaForCausalLM, config: SVFConfig, use_reentrant: bool | None) -> nn.Module:
    model = get_peft_model(base, config)
    if use_reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        if use_reentrant:  # its function needs an input that requires a gradient
            model.enable_input_require_grads()
    return model


def before_peft(base: LlamaForCausalLM, config: SVFConfig, use_reentrant: bool | None) -> nn.Module:
    if use_reentrant is not None:
        base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        if use_reentrant:
            base.enable_input_require_grads()
    return get_peft_model(base, config)


def through_transformers(base: LlamaForCausalLM, config: SVFConfig, use_reentrant: bool | None) -> nn.Module:
    base.add_adapter(config)
    if use_reentrant is not None:
        base.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return base


def randomize(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def gradients_and_runs(model: nn.Module) -> tuple[list[torch.Tensor], int]:
    """The gradients of all trained parameters, and how often the layers ran for them."""
    runs = []
    for layer in model.modules():
        if isinstance(layer, SVFLayer):
            layer.register_forward_hook(lambda *args: runs.append(1))
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 14 and all(name.endswith("svf_offset.default.weight") for name in trained)
    return list(trained.values()), len(runs)


def assert_same(model: nn.Module, reference: nn.Module) -> None:
    expected, runs_without = gradients_and_runs(reference)
    found, runs = gradients_and_runs(model)
    assert runs_without == 14 and runs >= 26  # twice; the newer kind stops inside the last layer of each block
    for gradient, expected_gradient in zip(found, expected, strict=True):
        assert expected_gradient.abs().max() > 0 and torch.equal(gradient, expected_gradient)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("way", [through_peft, before_peft, through_transformers])
def test_gradients_are_equal(tiny_llama: Build, way: Callable, use_reentrant: bool) -> None:
    model, reference = (randomize(way(tiny_llama(), SVFConfig(), kind)) for kind in (use_reentrant, None))
    assert_same(model, reference)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("settings", CONFIGS.values(), ids=CONFIGS)
def test_gradients_are_equal_in_every_parametrization(
    tiny_llama: Build, settings: dict[str, Any], use_reentrant: bool
) -> None:
    models = []
    for kind in (use_reentrant, None):
        torch.manual_seed(2)
        models.append(randomize(through_peft(tiny_llama(), SVFConfig(**settings), kind)))
    assert_same(*models)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_gradients_are_equal_on_a_base_prepared_for_kbit_training(
    tiny_llama: Build, tmp_path: Path, bits: int, use_reentrant: bool
) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)

    def build(checkpointing: bool) -> nn.Module:
        quantization = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
        base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, device_map="cpu")
        settings = {"use_reentrant": use_reentrant} if checkpointing else None
        base = prepare_model_for_kbit_training(base, checkpointing, settings)
        assert base.is_gradient_checkpointing == checkpointing
        return randomize(get_peft_model(base, SVFConfig()))

    assert_same(build(True), build(False))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_trainer_ends_with_the_same_offsets(tiny_llama: Build, tmp_path: Path, use_reentrant: bool) -> None:
    def train(checkpointing: bool) -> list[torch.Tensor]:
        model = get_peft_model(tiny_llama(), SVFConfig(task_type="CAUSAL_LM"))
        if checkpointing and use_reentrant:
            model.enable_input_require_grads()
        args = TrainingArguments(
            str(tmp_path),
            max_steps=2,
            learning_rate=0.05,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        )
        rows = Dataset.from_list([{"input_ids": row, "labels": row} for row in IDS.tolist() * 8])
        Trainer(model, args=args, train_dataset=rows).train()
        return [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]

    with_checkpointing, without = train(True), train(False)
    assert len(without) == 14 and all(offset.abs().max() > 0 for offset in without)
    assert all(torch.equal(a, b) for a, b in zip(with_checkpointing, without, strict=True))
