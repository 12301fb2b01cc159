"""Every way into a model and back to disk gives the same expert: equal offsets, logits equal bit for bit.

In a fresh process: test_checkpoint.py. Onto another base model: test_base_check.py. transformers' own adapter methods:
test_transformers.py.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification

from peft_svf import SVFConfig
from peft_svf.tuner import SVFLayer


IDS = torch.randint(3, 97, (2, 8), generator=torch.Generator().manual_seed(0))
Build = Callable[..., LlamaForCausalLM]
Graphs = list[torch.fx.GraphModule]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def offsets(model: nn.Module, adapter: str = "default") -> list[nn.Parameter]:
    return [layer.svf_offset[adapter].weight for layer in model.modules() if isinstance(layer, SVFLayer)]


def randomize(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "svf_offset" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model


@pytest.fixture
def expert(tiny_llama: Build, tmp_path: Path) -> tuple[torch.Tensor, Path]:
    """The logits of an expert, and its folder."""
    model = randomize(get_peft_model(tiny_llama(), SVFConfig(task_type="CAUSAL_LM")), seed=1)
    model.save_pretrained(tmp_path / "expert", save_embedding_layers=False)
    assert not torch.allclose(logits(model), logits(tiny_llama()), atol=0.1)
    return logits(model), tmp_path / "expert"


@pytest.fixture
def another(tiny_llama: Build, tmp_path: Path) -> tuple[torch.Tensor, Path]:
    """The same of another expert for the same base model."""
    model = randomize(get_peft_model(tiny_llama(), SVFConfig(task_type="CAUSAL_LM")), seed=2)
    model.save_pretrained(tmp_path / "another", save_embedding_layers=False)
    return logits(model), tmp_path / "another"


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", ["svf", "z", "svf_offset", "base_layer"])
def test_adapter_names_that_look_like_parts_of_keys(
    tiny_llama: Build, expert: tuple[torch.Tensor, Path], tmp_path: Path, name: str, low_cpu_mem_usage: bool
) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), expert[1], name, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model), expert[0])
    model.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "again" / name, name)
    assert torch.equal(logits(again), expert[0])
    again.delete_adapter(name)
    assert not [key for key in again.state_dict() if "svf_offset" in key]


def test_loading_in_low_memory_leaves_nothing_on_the_meta_device(
    tiny_llama: Build, expert: tuple[torch.Tensor, Path], another: tuple[torch.Tensor, Path]
) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), expert[1], low_cpu_mem_usage=True)
    model.load_adapter(another[1], "second", low_cpu_mem_usage=True)
    tensors = [*model.parameters(), *model.buffers()]
    assert tensors and not any(tensor.is_meta for tensor in tensors)
    assert torch.equal(logits(model), expert[0])
    model.set_adapter("second")
    assert torch.equal(logits(model), another[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_half_precision_base(tiny_llama: Build, tmp_path: Path, dtype: torch.dtype, low_cpu_mem_usage: bool) -> None:
    model = randomize(get_peft_model(tiny_llama().to(dtype), SVFConfig()), seed=1)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(tiny_llama().to(dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(model))
    assert {offset.dtype for offset in offsets(loaded)} == {torch.float32}


def test_saving_what_was_loaded_writes_the_same_expert(
    tiny_llama: Build, expert: tuple[torch.Tensor, Path], tmp_path: Path
) -> None:
    PeftModel.from_pretrained(tiny_llama(), expert[1]).save_pretrained(tmp_path / "again", save_embedding_layers=False)
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (expert[1], tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    first, second = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (expert[1], tmp_path / "again")
    )
    assert set(first.pop("target_modules")) == set(second.pop("target_modules")) and first == second


def test_an_expert_saved_while_merged_is_the_same_expert(
    tiny_llama: Build, expert: tuple[torch.Tensor, Path], tmp_path: Path
) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), expert[1])
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged", save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "merged")
    assert torch.equal(logits(loaded), expert[0])


def test_selected_adapters_and_subfolders(
    tiny_llama: Build, expert: tuple[torch.Tensor, Path], another: tuple[torch.Tensor, Path], tmp_path: Path
) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), expert[1], "first")
    model.load_adapter(another[1], "second")
    model.save_pretrained(tmp_path / "saved", selected_adapters=["second"], save_embedding_layers=False)
    assert not (tmp_path / "saved" / "first").exists()
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved", subfolder="second")
    assert torch.equal(logits(loaded), another[0])


def test_the_full_state_dict_fits_strictly(tiny_llama: Build, expert: tuple[torch.Tensor, Path]) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), expert[1])
    clone = get_peft_model(tiny_llama(seed=0), SVFConfig(task_type="CAUSAL_LM"))
    clone.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(clone), expert[0])


KINDS: dict[str, dict[str, Any]] = {
    "leading components": {"rank": 3, "rank_pattern": {"down_proj": 5}},
    "paper": {"parametrization": "sigmoid"},
    "with its basis": {"save_basis": True},
    "some layers": {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    "with a head": {"modules_to_save": ["lm_head"]},
    "with tokens": {"trainable_token_indices": [3, 4, 60]},
}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_every_kind_of_expert_in_every_way(tiny_llama: Build, tmp_path: Path, settings: dict[str, Any]) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, SVFConfig(task_type="CAUSAL_LM", init_weights=False, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    ids = torch.cat([IDS, torch.tensor([[3, 4], [60, 3]])], dim=1)
    model.save_pretrained(tmp_path / "expert", save_embedding_layers=False)

    native = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    native.load_adapter(str(tmp_path / "expert"))
    injected = inject_adapter_in_model(PeftConfig.from_pretrained(tmp_path / "expert"), tiny_llama())
    state = load_file(tmp_path / "expert" / "adapter_model.safetensors")
    set_peft_model_state_dict(injected, {key.removeprefix("base_model.model."): value for key, value in state.items()})
    ways = {
        "PeftModel": PeftModel.from_pretrained(tiny_llama(), tmp_path / "expert"),
        "low memory": PeftModel.from_pretrained(tiny_llama(), tmp_path / "expert", low_cpu_mem_usage=True),
        "auto class": AutoPeftModelForCausalLM.from_pretrained(tmp_path / "expert"),
        "injected": injected,
        "transformers": native,
        "transformers, from the folder": AutoModelForCausalLM.from_pretrained(tmp_path / "expert"),
    }
    with torch.no_grad():
        expected = model.eval()(ids).logits
        assert not torch.allclose(expected, tiny_llama()(ids).logits, atol=0.05)
        equal = {way: torch.equal(loaded.eval()(ids).logits, expected) for way, loaded in ways.items()}
    assert equal == dict.fromkeys(ways, True)


def test_an_adapter_added_after_one_with_a_saved_head_loads_alone(tiny_llama: Build, tmp_path: Path) -> None:
    """PEFT wraps the head for the first adapter; "all-linear" of the second must not adapt what is inside."""
    model = get_peft_model(tiny_llama(), SVFConfig(modules_to_save=["lm_head"]), "first")
    model.add_adapter("second", SVFConfig())
    model.set_adapter("second")
    randomize(model, seed=1)
    assert len([key for key in model.state_dict() if ".svf_offset.second." in key]) == 14
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "second")
    assert torch.equal(logits(loaded), logits(model))


# Injection without a PeftModel


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_injected_adapter_round_trip(
    tiny_llama: Build, expert: tuple[torch.Tensor, Path], low_cpu_mem_usage: bool
) -> None:
    source = inject_adapter_in_model(SVFConfig(), tiny_llama(), "math")
    untouched = logits(tiny_llama())
    assert torch.equal(logits(source), untouched)
    result = set_peft_model_state_dict(source, load_file(expert[1] / "adapter_model.safetensors"), "math")
    assert not result.unexpected_keys and torch.equal(logits(source), expert[0])

    state = get_peft_model_state_dict(source, adapter_name="math")
    assert len(state) == 14 and all(".math" not in key and key.endswith(".svf_offset.weight") for key in state)
    target = inject_adapter_in_model(SVFConfig(), tiny_llama(), "code", low_cpu_mem_usage=low_cpu_mem_usage)
    result = set_peft_model_state_dict(target, state, "code", low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.unexpected_keys and not any(offset.is_meta for offset in offsets(target, "code"))
    assert torch.equal(logits(target), expert[0])


def test_injection_finds_the_modules_in_a_state_dict(tiny_llama: Build) -> None:
    config = SVFConfig(target_modules=["q_proj", "down_proj"], layers_to_transform=[1])
    source = randomize(inject_adapter_in_model(config, tiny_llama()), seed=1)
    state = get_peft_model_state_dict(source)
    assert len(state) == 2
    target = inject_adapter_in_model(SVFConfig(target_modules=["q_proj"]), tiny_llama(), state_dict=state)
    set_peft_model_state_dict(target, state)
    assert torch.equal(logits(target), logits(source)) and len(offsets(target)) == 2


def test_injection_into_a_plain_torch_module() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Sequential(nn.Linear(9, 4), nn.Linear(4, 4)))

    config = SVFConfig(target_modules=["0", "2.0"], modules_to_save=["2.1"], init_weights=False)
    source = get_peft_model(build(), config)
    with torch.no_grad():
        source.base_model.model[2][1].modules_to_save["default"].weight.add_(1.0)
    state = get_peft_model_state_dict(source)
    assert sorted(key.removeprefix("base_model.model.") for key in state) == [
        "0.svf_offset.weight",
        "2.0.svf_offset.weight",
        "2.1.bias",
        "2.1.weight",
    ]
    target = get_peft_model(build(), config)
    set_peft_model_state_dict(target, state)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(target(x), source(x)) and not torch.allclose(target(x), build()(x))


@pytest.mark.parametrize(
    ("auto_class", "settings"),
    [
        (AutoPeftModelForSequenceClassification, {"task_type": "SEQ_CLS"}),
        (AutoPeftModel, {"modules_to_save": ["score"]}),  # finds the class of the base in the configuration
    ],
)
def test_auto_classes_bring_the_trained_head_along(
    tiny_llama: Build, tmp_path: Path, auto_class: type, settings: dict[str, Any]
) -> None:
    labels = {"num_labels": 3, "id2label": {0: "a", 1: "b", 2: "c"}}
    LlamaForSequenceClassification(tiny_llama(**labels).config).save_pretrained(tmp_path / "base")
    base = LlamaForSequenceClassification.from_pretrained(tmp_path / "base")
    model = randomize(get_peft_model(base, SVFConfig(**settings)), seed=1)
    head = model.base_model.model.score.modules_to_save["default"]
    with torch.no_grad():
        head.weight.normal_(generator=torch.Generator().manual_seed(2))
    model.save_pretrained(tmp_path / "expert")
    loaded = auto_class.from_pretrained(tmp_path / "expert")
    assert torch.equal(loaded.base_model.model.score.modules_to_save["default"].weight, head.weight)
    assert torch.equal(logits(loaded), logits(model)) and logits(loaded).shape == (2, 3)


# Loading over an adapter that is there


@pytest.mark.parametrize("name", ["default", "math"])
def test_loading_over_an_adapter_replaces_it_in_place(
    tiny_llama: Build, expert: tuple[torch.Tensor, Path], another: tuple[torch.Tensor, Path], name: str
) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), expert[1], name)
    pointers = [offset.data_ptr() for offset in offsets(model, name)]
    model.load_adapter(another[1], name)
    assert [offset.data_ptr() for offset in offsets(model, name)] == pointers
    assert torch.equal(logits(model), another[0])
    model.load_adapter(expert[1], name)
    assert torch.equal(logits(model), expert[0])


def test_loading_over_an_adapter_does_not_recompile(
    tiny_llama: Build, expert: tuple[torch.Tensor, Path], another: tuple[torch.Tensor, Path]
) -> None:
    torch.compiler.reset()
    graphs: Graphs = []

    def counting(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = PeftModel.from_pretrained(tiny_llama(), expert[1]).eval()
    compiled = torch.compile(model.get_base_model(), backend=counting)
    torch.testing.assert_close(logits(compiled), expert[0], rtol=1e-5, atol=1e-5)
    before = len(graphs)
    assert before == 1
    model.load_adapter(another[1], "default")
    torch.testing.assert_close(logits(compiled), another[0], rtol=1e-5, atol=1e-5)
    assert len(graphs) == before


@pytest.mark.parametrize(
    ("overrides", "settings"),
    [({"intermediate_size": 24}, {}), ({}, {"rank": 5})],
    ids=["smaller weights", "smaller rank"],
)
def test_an_expert_of_another_size_is_refused_over_an_adapter_before_anything_changes(
    tiny_llama: Build,
    expert: tuple[torch.Tensor, Path],
    tmp_path: Path,
    overrides: dict[str, int],
    settings: dict[str, int],
) -> None:
    other = get_peft_model(tiny_llama(**overrides), SVFConfig(init_weights=False, **settings))
    other.save_pretrained(tmp_path / "other", save_embedding_layers=False)
    model = PeftModel.from_pretrained(tiny_llama(), expert[1])
    with pytest.raises((RuntimeError, ValueError), match="offset"):
        model.load_adapter(tmp_path / "other", "default")
    assert torch.equal(logits(model), expert[0])


def test_an_expert_with_fewer_modules_over_an_adapter_leaves_the_base_in_the_others(
    tiny_llama: Build, expert: tuple[torch.Tensor, Path], tmp_path: Path
) -> None:
    """Not the offsets of the expert that was there before: that would be a mixture nobody asked for."""
    partial = randomize(get_peft_model(tiny_llama(), SVFConfig(target_modules=["q_proj", "up_proj"])), seed=3)
    partial.save_pretrained(tmp_path / "partial", save_embedding_layers=False)
    model = PeftModel.from_pretrained(tiny_llama(), expert[1])
    model.load_adapter(tmp_path / "partial", "default")
    assert torch.equal(logits(model), logits(partial))


# The configuration as JSON


EVERY_FIELD: dict[str, Any] = {
    "task_type": TaskType.CAUSAL_LM,
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"},
    "base_model_name_or_path": "someone/base",
    "revision": "abc",
    "inference_mode": True,
    "target_modules": {"q_proj", "down_proj"},
    "exclude_modules": {"layers.0.mlp.down_proj"},
    "modules_to_save": ["lm_head"],
    "layers_to_transform": [0, 2],
    "layers_pattern": "layers",
    "trainable_token_indices": {"embed_tokens": [3, 4]},
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "rank": 7,
    "rank_pattern": {r"layers\.0\..*": 3},
    "parametrization": "sigmoid",
    "init_weights": False,
    "basis_source": "someone/unquantized",
    "save_basis": True,
    "base_fingerprint": {"q_proj": [32.0, 16.0, 0.1234567890123, -4.5e-17]},
}


def test_config_survives_json_with_every_field_set(tmp_path: Path) -> None:
    fields = {field.name for field in dataclasses.fields(SVFConfig)} - {"peft_type", "peft_version"}
    assert EVERY_FIELD.keys() == fields, "give the new field a value here that is not its default"
    config, default = SVFConfig(**EVERY_FIELD), SVFConfig()
    assert not [name for name in fields if getattr(config, name) == getattr(default, name)]
    config.save_pretrained(tmp_path)
    for loaded in (PeftConfig.from_pretrained(tmp_path), SVFConfig.from_pretrained(tmp_path)):
        assert type(loaded) is SVFConfig
        assert {name: getattr(loaded, name) for name in fields} == EVERY_FIELD
        assert loaded == config


def test_config_of_a_later_version_loads_without_the_fields_it_does_not_know(tmp_path: Path) -> None:
    SVFConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        config = PeftConfig.from_pretrained(tmp_path)
    assert config.target_modules == {"q_proj"}
