"""A saved expert, loaded in a fresh process in every way that users load adapters, gives equal logits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_svf import SVFConfig


PROMPT = "Once upon a time, Lily and Tom"

LOAD = """
import sys
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
import peft_svf

base_path, adapter_path, result_path = sys.argv[1:]
ids = AutoTokenizer.from_pretrained(base_path)({prompt!r}, return_tensors="pt").input_ids


def base():
    return AutoModelForCausalLM.from_pretrained(base_path)


def native(low_cpu_mem_usage=False):
    model = base()
    model.load_adapter(adapter_path, "math", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("math")
    return model


assert type(PeftConfig.from_pretrained(adapter_path)) is peft_svf.SVFConfig
models = {{
    "PeftModel": PeftModel.from_pretrained(base(), adapter_path),
    "PeftModel, adapter called svf": PeftModel.from_pretrained(base(), adapter_path, "svf"),
    "PeftModel, low_cpu_mem_usage": PeftModel.from_pretrained(base(), adapter_path, low_cpu_mem_usage=True),
    "PeftModel, trainable": PeftModel.from_pretrained(base(), adapter_path, is_trainable=True),
    "AutoPeftModelForCausalLM": AutoPeftModelForCausalLM.from_pretrained(adapter_path),
    "AutoModelForCausalLM on the adapter": AutoModelForCausalLM.from_pretrained(adapter_path),
    "load_adapter": native(),
    "load_adapter, low_cpu_mem_usage": native(low_cpu_mem_usage=True),
}}
results = {{}}
for name, model in models.items():
    with torch.no_grad():
        results[name] = model.eval()(ids).logits.contiguous()
results["generated"] = models["PeftModel"].generate(input_ids=ids, max_new_tokens=12, do_sample=False)
save_file(results, result_path)
"""

WAYS = [
    "PeftModel",
    "PeftModel, adapter called svf",
    "PeftModel, low_cpu_mem_usage",
    "PeftModel, trainable",
    "AutoPeftModelForCausalLM",
    "AutoModelForCausalLM on the adapter",
    "load_adapter",
    "load_adapter, low_cpu_mem_usage",
]


@pytest.fixture(scope="module")
def expert(stories_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PeftModel, Path]]:
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(stories_path), SVFConfig(init_weights=False)).eval()
    path = tmp_path_factory.mktemp("expert")
    model.save_pretrained(path)
    yield model, path


@pytest.fixture(scope="module")
def loaded(expert: tuple[PeftModel, Path], stories_path: str) -> dict[str, torch.Tensor]:
    result = expert[1].parent / "results.safetensors"
    command = [sys.executable, "-c", LOAD.format(prompt=PROMPT), stories_path, str(expert[1]), str(result)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    return load_file(result)


@pytest.fixture(scope="module")
def ids(stories_path: str) -> torch.Tensor:
    return AutoTokenizer.from_pretrained(stories_path)(PROMPT, return_tensors="pt").input_ids


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_logits_are_equal_in_a_fresh_process(
    expert: tuple[PeftModel, Path], loaded: dict[str, torch.Tensor], ids: torch.Tensor, way: str
) -> None:
    model = expert[0]
    with model.disable_adapter():
        base = model(ids).logits
    expected = model(ids).logits
    assert (expected - base).abs().max() > 0.1
    assert torch.equal(loaded[way], expected)


def test_generation_is_equal_in_a_fresh_process(
    expert: tuple[PeftModel, Path], loaded: dict[str, torch.Tensor], ids: torch.Tensor
) -> None:
    generated = expert[0].generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    assert torch.equal(loaded["generated"], generated)


def test_checkpoint_holds_only_float32_offsets(expert: tuple[PeftModel, Path], stories_path: str) -> None:
    tensors = load_file(expert[1] / "adapter_model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(stories_path)
    expected = {
        f"base_model.model.{name}.svf_offset.weight": torch.Size([min(module.weight.shape)])
        for name, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    assert {key: tensor.shape for key, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert not list(expert[1].glob("*.bin"))


def test_config_file_is_plain_json(expert: tuple[PeftModel, Path], stories_path: str) -> None:
    config = json.loads((expert[1] / "adapter_config.json").read_text())
    assert config["peft_type"] == "SVF" and config["base_model_name_or_path"] == stories_path


def test_an_adapter_of_a_model_with_several_is_saved_alone(stories_path: str, tmp_path: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(stories_path), SVFConfig(init_weights=False), "a")
    model.add_adapter("b", SVFConfig(init_weights=False))
    model.save_pretrained(tmp_path)
    for name in ("a", "b"):
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        layer = model.base_model.model.model.layers[0].mlp.up_proj
        key = "base_model.model.model.layers.0.mlp.up_proj.svf_offset.weight"
        assert torch.equal(tensors[key], layer.svf_offset[name].weight.detach())


def test_modules_of_the_base_that_are_called_like_svf_are_not_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.ModuleDict({"linear": nn.Linear(4, 4), "svf_linear": nn.Linear(4, 4), "my_svf_offset": nn.Linear(4, 4)})
    model = get_peft_model(base, SVFConfig(target_modules=["linear", "svf_linear"]))
    model.save_pretrained(tmp_path)
    names = {f"base_model.model.{name}.svf_offset.weight" for name in ("linear", "svf_linear")}
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == names
