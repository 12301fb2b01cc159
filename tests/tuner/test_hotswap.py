"""A loaded expert replaced in place by another: nothing is compiled again, and nothing wrong gets in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from peft_svf import SVFConfig
from peft_svf.tuner import SVFLayer, hotswap_adapter


IDS = torch.tensor([[5, 17, 42, 3, 60], [9, 8, 7, 6, 5]])
UP_PROJ = "base_model.model.model.layers.1.mlp.up_proj.svf_offset.weight"
Build = Callable[..., LlamaForCausalLM]
Save = Callable[..., str]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def layers_of(model: nn.Module) -> dict[str, SVFLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, SVFLayer)}


def offsets(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    return {n: layer.svf_offset[adapter].weight.detach().clone() for n, layer in layers_of(model).items()}


def change_file(path: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(f"{path}/adapter_model.safetensors")
    change(tensors)
    save_file(tensors, f"{path}/adapter_model.safetensors")


def change_config(path: str, **values: object) -> None:
    file = Path(path) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def save(tiny_llama: Build, tmp_path: Path) -> Save:
    """Saves an expert with random offsets and returns its folder: `save(name, seed, base=..., **config)`."""

    def save(name: str, seed: int, base: nn.Module | None = None, **config: object) -> str:
        torch.manual_seed(seed)
        model = get_peft_model(tiny_llama() if base is None else base, SVFConfig(init_weights=False, **config))
        for part_name, parameter in model.named_parameters():
            if "modules_to_save" in part_name or "trainable_tokens" in part_name:
                parameter.data.normal_()
        model.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def math(tiny_llama: Build, save: Save) -> PeftModel:
    """A model with the expert that is about to be replaced."""
    return PeftModel.from_pretrained(tiny_llama(), save("math", 1)).eval()


@pytest.fixture
def raises_unchanged(math: PeftModel) -> Callable[..., None]:
    """Asserts that replacing the expert `math` raises a ValueError and changes nothing."""

    def raises(path: str, match: str) -> None:
        before, expected = offsets(math), logits(math)
        with pytest.raises(ValueError, match=match):
            hotswap_adapter(math, path)
        after = offsets(math)
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert torch.equal(logits(math), expected)

    return raises


def test_the_model_is_the_new_expert_in_the_same_tensors(tiny_llama: Build, math: PeftModel, save: Save) -> None:
    path = save("code", 2)
    parameters = {name: (parameter.data_ptr(), parameter) for name, parameter in math.named_parameters()}
    before = logits(math)
    hotswap_adapter(math, path)
    expected = logits(PeftModel.from_pretrained(tiny_llama(), path))
    assert (expected - before).abs().max() > 0.1
    assert torch.equal(logits(math), expected)
    for name, parameter in math.named_parameters():
        assert (parameter.data_ptr(), id(parameter)) == (parameters[name][0], id(parameters[name][1]))


@pytest.mark.parametrize("inside", [False, True], ids=["compiled PeftModel", "compiled base model"])
def test_a_compiled_model_is_not_compiled_again(tiny_llama: Build, math: PeftModel, save: Save, inside: bool) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    path, model = save("code", 2), math
    if inside:
        model.base_model.model = torch.compile(model.base_model.model, backend=count)
    else:
        model = torch.compile(model, backend=count)
    before = logits(model)
    compiled = len(graphs)
    assert compiled >= 1
    hotswap_adapter(model, path)
    after = logits(model)
    assert len(graphs) == compiled
    assert (after - before).abs().max() > 0.1
    assert torch.allclose(after, logits(PeftModel.from_pretrained(tiny_llama(), path)), atol=1e-5)


def test_layers_that_the_new_expert_lacks_are_those_of_the_base_model(
    tiny_llama: Build, math: PeftModel, save: Save
) -> None:
    path = save("half", 2, layers_to_transform=[1])
    hotswap_adapter(math, path)
    first = [values for name, values in offsets(math).items() if ".layers.0." in name]
    assert len(first) == 7 and not any(values.any() for values in first)
    expected = logits(PeftModel.from_pretrained(tiny_llama(), path))
    assert torch.allclose(logits(math), expected, atol=1e-5)


def test_the_parametrization_of_the_paper(tiny_llama: Build, save: Save) -> None:
    paths = [
        save("math", 1, parametrization="sigmoid"),
        save("code", 2, parametrization="sigmoid", target_modules=["up_proj", "k_proj"]),
    ]
    model = PeftModel.from_pretrained(tiny_llama(), paths[0])
    hotswap_adapter(model, paths[1])
    assert torch.allclose(logits(model), logits(PeftModel.from_pretrained(tiny_llama(), paths[1])), atol=1e-5)


def test_only_the_named_adapter_changes(tiny_llama: Build, math: PeftModel, save: Save) -> None:
    path, third = save("code", 2), save("third", 3)
    math.load_adapter(path, "code")
    before = offsets(math, "default")
    hotswap_adapter(math, third, "code")
    assert all(torch.equal(values, before[name]) for name, values in offsets(math, "default").items())
    assert math.active_adapters == ["default"]
    math.set_adapter("code")
    assert torch.equal(logits(math), logits(PeftModel.from_pretrained(tiny_llama(), third)))


def test_training_goes_on_in_the_same_parameters(tiny_llama: Build, save: Save) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), save("math", 1), is_trainable=True).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    hotswap_adapter(model, save("code", 2))
    assert model.training and all(
        layer.svf_offset["default"].weight.requires_grad for layer in layers_of(model).values()
    )
    before = offsets(model)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert all(not torch.equal(values, before[name]) for name, values in offsets(model).items())


def test_what_is_saved_afterwards_is_the_new_expert(
    tiny_llama: Build, math: PeftModel, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # PEFT looks for the base's configuration
    path = save("half", 2, layers_to_transform=[1])
    change_config(path, base_model_name_or_path="hub/base", revision="abc")
    hotswap_adapter(math, path)
    math.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("hub/base", "abc")
    assert len(config["base_fingerprint"]) == len(load_file(tmp_path / "saved" / "adapter_model.safetensors")) == 14
    expected = logits(PeftModel.from_pretrained(tiny_llama(), path))
    assert torch.allclose(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "saved")), expected, atol=1e-5)


def test_experts_that_bring_their_basis(tiny_llama: Build, math: PeftModel, save: Save) -> None:
    path = save("code", 2, save_basis=True)
    hotswap_adapter(math, path)
    expected = logits(PeftModel.from_pretrained(tiny_llama(), path))
    assert torch.allclose(logits(math), expected, atol=1e-5)
    other_way = PeftModel.from_pretrained(tiny_llama(), path)
    hotswap_adapter(other_way, save("third", 3))
    assert torch.allclose(
        logits(other_way), logits(PeftModel.from_pretrained(tiny_llama(), save("third", 3))), atol=1e-5
    )


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=97, **sizes, num_key_value_heads=2, num_local_experts=2, initializer_range=0.2)
    return MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("new", [("gate_up_proj", "down_proj"), ("gate_up_proj",), ("down_proj",)], ids="+".join)
@pytest.mark.parametrize("old", [("gate_up_proj", "down_proj"), ("gate_up_proj",), ("down_proj",)], ids="+".join)
def test_fused_expert_parameters(save: Save, old: tuple[str, ...], new: tuple[str, ...]) -> None:
    """Offsets of different parameters of one module have the same key and the same shape here."""
    settings = {"target_modules": ["q_proj"], "exclude_modules": ["lm_head"]}
    paths = [
        save(name, seed, mixtral(), target_parameters=[f"mlp.experts.{each}" for each in parameters], **settings)
        for name, seed, parameters in (("math", 1, old), ("code", 2, new))
    ]
    model, expected = (PeftModel.from_pretrained(mixtral(), path) for path in paths)
    before = logits(model)
    assert (before - logits(expected)).abs().max() > 1e-2
    try:
        hotswap_adapter(model, paths[1])
    except ValueError as error:
        assert old != new and any(words in str(error) for words in ("other fused parameters", "also holds"))
        assert torch.equal(logits(model), before)
    else:
        assert torch.equal(logits(model), logits(expected))
        assert set(new) <= set(old)


def test_adapters_injected_by_transformers(tiny_llama: Build, save: Save) -> None:
    path, model = save("code", 2), tiny_llama()
    model.load_adapter(save("math", 1), "math")
    model.set_adapter("math")
    hotswap_adapter(model, path, "math")
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(tiny_llama(), path)))


def classifier() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=97, **sizes, initializer_range=0.2, pad_token_id=0, num_labels=3)
    return LlamaForSequenceClassification(config).eval()


def test_modules_to_save_are_replaced_too(save: Save) -> None:
    paths = [save(name, seed, classifier(), task_type="SEQ_CLS") for name, seed in (("math", 1), ("code", 2))]
    model = PeftModel.from_pretrained(classifier(), paths[0])
    head = model.base_model.model.score.modules_to_save["default"].weight
    before = head.data_ptr()
    hotswap_adapter(model, paths[1])
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(classifier(), paths[1])))
    assert head.data_ptr() == before


def test_trained_tokens_are_replaced_too(tiny_llama: Build, save: Save) -> None:
    paths = [save(name, seed, trainable_token_indices=[5, 17]) for name, seed in (("math", 1), ("code", 2))]
    model = PeftModel.from_pretrained(tiny_llama(), paths[0])
    hotswap_adapter(model, paths[1])
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(tiny_llama(), paths[1])))
    with pytest.raises(ValueError, match="trainable_token_indices"):
        hotswap_adapter(model, save("third", 3, trainable_token_indices=[5, 18]))


def test_what_is_trained_in_full_must_be_in_both(save: Save) -> None:
    with_head = save("with", 1, classifier(), task_type="SEQ_CLS")
    without = save("without", 2, classifier(), exclude_modules=["score"])
    model = PeftModel.from_pretrained(classifier(), with_head)
    with pytest.raises(ValueError, match=r"'default' also trains 'score.weight'.*new name"):
        hotswap_adapter(model, without)
    model = PeftModel.from_pretrained(classifier(), without)
    with pytest.raises(ValueError, match=r"also holds 'score.weight'.*new name"):
        hotswap_adapter(model, with_head)


@pytest.mark.parametrize("merged", ["default", "other"])
def test_a_merged_adapter_is_not_replaced(math: PeftModel, save: Save, merged: str) -> None:
    path = save("code", 2)
    math.load_adapter(path, "other")
    math.merge_adapter([merged])
    if merged == "other":
        hotswap_adapter(math, path)
        return
    before = offsets(math)
    with pytest.raises(ValueError, match=r"'default' is merged.*unmerge_adapter"):
        hotswap_adapter(math, path)
    assert all(torch.equal(values, before[name]) for name, values in offsets(math).items())


def test_another_base_model(tiny_llama: Build, raises_unchanged: Callable[..., None], save: Save) -> None:
    raises_unchanged(save("foreign", 2, tiny_llama(seed=5)), "belongs to another base model")
    raises_unchanged(save("deeper", 2, tiny_llama(num_hidden_layers=3)), "is not a linear layer of this model")
    raises_unchanged(save("wider", 2, tiny_llama(intermediate_size=64)), "is 32×48 here and was 32×64 in training")


def test_a_base_model_that_differs_by_rounding_is_warned_of(tiny_llama: Build, math: PeftModel, save: Save) -> None:
    path = save("rounded", 2, tiny_llama().bfloat16().float())
    with pytest.warns(UserWarning, match="slightly different weights"):
        hotswap_adapter(math, path)


def test_no_base_weight_is_read(math: PeftModel, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save("code", 2)

    def read(weight: torch.Tensor) -> list[float]:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("peft_svf.tuner.base_check.weight_sketch", read)
    hotswap_adapter(math, path)


def test_an_expert_of_unknown_origin_is_warned_of(math: PeftModel, save: Save) -> None:
    path = save("code", 2)
    change_config(path, base_fingerprint=None)
    with pytest.warns(UserWarning, match="no fingerprint"):
        hotswap_adapter(math, path)


def test_another_rank(raises_unchanged: Callable[..., None], save: Save) -> None:
    raises_unchanged(save("short", 2, rank=8), r"shape \(8,\) in the new expert and \(32,\) in the loaded one")


def test_another_parametrization(raises_unchanged: Callable[..., None], save: Save) -> None:
    raises_unchanged(save("paper", 2, parametrization="sigmoid"), "parametrization='sigmoid'.*new name")


def test_layers_that_the_loaded_expert_lacks_are_named(tiny_llama: Build, save: Save) -> None:
    model = PeftModel.from_pretrained(tiny_llama(), save("half", 1, target_modules=["q_proj", "up_proj"]))
    before = offsets(model)
    path = save("more", 2, target_modules=["q_proj", "o_proj"])
    with pytest.raises(
        ValueError, match=r"'model.layers.0.self_attn.o_proj', 'model.layers.1.self_attn.o_proj'.*new name"
    ):
        hotswap_adapter(model, path)
    assert all(torch.equal(values, before[name]) for name, values in offsets(model).items())
    model.load_adapter(path, "more")  # the remedy
    model.set_adapter("more")
    assert torch.equal(logits(model), logits(PeftModel.from_pretrained(tiny_llama(), path)))


def poison(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP_PROJ][3] = torch.nan


def infinite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP_PROJ][0] = torch.inf


def whole_numbers(tensors: dict[str, torch.Tensor]) -> None:
    tensors[UP_PROJ] = torch.zeros(32, dtype=torch.int64)


def lose(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[UP_PROJ]


def empty(tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (poison, "'model.layers.1.mlp.up_proj' holds NaN"),
        (infinite, "'model.layers.1.mlp.up_proj' holds NaN, infinite"),
        (whole_numbers, "'model.layers.1.mlp.up_proj' holds NaN, infinite values or no numbers"),
        (lose, "disagree about 'model.layers.1.mlp.up_proj': the file is damaged"),
        (empty, "holds no offsets"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_offsets(
    raises_unchanged: Callable[..., None], save: Save, change: Callable[..., None], words: str
) -> None:
    path = save("code", 2)
    change_file(path, change)
    raises_unchanged(path, words)


def test_damaged_files(math: PeftModel, raises_unchanged: Callable[..., None], save: Save, tmp_path: Path) -> None:
    path = Path(save("code", 2))
    weights = path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    raises_unchanged(str(path), "is damaged")
    weights.rename(path / "adapter_model.bin")  # a pickle is not read
    with pytest.raises(OSError, match=r"adapter_model\.safetensors"):
        hotswap_adapter(math, path)
    raises_unchanged(str(tmp_path / "nowhere"), "Can't find 'adapter_config.json'")


def test_other_adapters(tiny_llama: Build, raises_unchanged: Callable[..., None], save: Save, tmp_path: Path) -> None:
    lora = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    raises_unchanged(str(tmp_path / "lora"), "is an adapter of type LORA")
    for model in (lora, tiny_llama()):
        with pytest.raises(ValueError, match=r"no SVF adapter named 'default' to replace.*load_adapter"):
            hotswap_adapter(model, save("code", 2))


def test_an_unknown_name(math: PeftModel, save: Save) -> None:
    with pytest.raises(ValueError, match="no SVF adapter named 'code' to replace; loaded are default"):
        hotswap_adapter(math, save("code", 2), "code")


def test_a_subfolder(tiny_llama: Build, math: PeftModel, save: Save, tmp_path: Path) -> None:
    save("nested/code", 2)
    hotswap_adapter(math, tmp_path / "nested", subfolder="code")
    expected = PeftModel.from_pretrained(tiny_llama(), tmp_path / "nested", subfolder="code")
    assert torch.equal(logits(math), logits(expected))


def test_a_revision_from_the_cache_of_the_hub(
    tiny_llama: Build, math: PeftModel, save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for commit, revision, seed in (("a" * 40, "main", 2), ("b" * 40, "v2", 3)):
        repository = tmp_path / "cache" / "models--user--code"
        shutil.copytree(save(f"code{seed}", seed), repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    hotswap_adapter(math, "user/code", cache_dir=tmp_path / "cache")
    assert torch.equal(logits(math), logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "code2")))
    hotswap_adapter(math, "user/code", revision="v2", cache_dir=tmp_path / "cache")
    assert torch.equal(logits(math), logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "code3")))


def test_loading_over_an_adapter_copies_in_place_as_well(tiny_llama: Build, math: PeftModel, save: Save) -> None:
    pointers = {name: layer.svf_offset["default"].weight.data_ptr() for name, layer in layers_of(math).items()}
    path = save("code", 2)
    math.load_adapter(path, "default")
    assert torch.equal(logits(math), logits(PeftModel.from_pretrained(tiny_llama(), path)))
    assert pointers == {n: layer.svf_offset["default"].weight.data_ptr() for n, layer in layers_of(math).items()}


def test_loading_over_an_adapter_does_not_check_what_hotswap_does(
    tiny_llama: Build, math: PeftModel, save: Save
) -> None:
    """Why there is a `hotswap_adapter`: PEFT never looks at the new expert's configuration, nor its base model."""
    with pytest.raises(ValueError, match="load it under another name"):
        math.load_adapter(save("short", 2, rank=8), "default")
    foreign = save("foreign", 2, tiny_llama(seed=5))
    math.load_adapter(foreign, "default")
    first = layers_of(math)["base_model.model.model.layers.0.mlp.up_proj"].svf_offset["default"].weight
    key = "base_model.model.model.layers.0.mlp.up_proj.svf_offset.weight"
    assert torch.equal(first, load_file(f"{foreign}/adapter_model.safetensors")[key])
    with pytest.warns(UserWarning, match="no offsets for 7 of the modules"):
        math.load_adapter(save("half", 3, layers_to_transform=[1]), "default")
    assert not first.any()
