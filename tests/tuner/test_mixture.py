"""Mixtures of adapters against the algebra z' = Σ αₖ zₖ on dense float64 weights, and the strength of one adapter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from peft_svf import SVFConfig
from peft_svf.tuner import SVFLayer


IDS = torch.tensor([[5, 17, 42, 3, 60]])
Build = Callable[..., LlamaForCausalLM]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def layers(model: nn.Module) -> dict[str, SVFLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SVFLayer)}


@pytest.fixture
def model(tiny_llama: Build, add_experts: Callable[..., PeftModel]) -> PeftModel:
    return add_experts(tiny_llama(), names=("math", "code"), std=0.3).eval()


def z(layer: SVFLayer, name: str) -> torch.Tensor:
    return 1 + layer.svf_offset[name].weight.detach().double()


@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.3, 0.7], [2.0, -0.5], [10.0, 5.0]], ids=str)
@pytest.mark.parametrize(
    ("settings", "formula"),
    [
        ({"residual": False}, lambda a, za, zb: a[0] * za + a[1] * zb),
        ({}, lambda a, za, zb: a[0] * za + a[1] * zb + (1 - sum(a))),
        ({"normalize": True}, lambda a, za, zb: (a[0] * za + a[1] * zb) / sum(a)),
        ({"normalize": True, "residual": False}, lambda a, za, zb: (a[0] * za + a[1] * zb) / sum(a)),
    ],
    ids=["the paper's formula", "residual", "normalized", "normalized, not residual"],
)
def test_mixture_is_the_algebra_of_z(model: PeftModel, weights: list, settings: dict, formula: Callable) -> None:
    model.add_weighted_adapter(["math", "code"], weights, "both", **settings)
    for layer in layers(model).values():
        expected = formula(weights, z(layer, "math"), z(layer, "code"))
        torch.testing.assert_close(z(layer, "both"), expected, rtol=1e-5, atol=1e-5)


def test_a_mixture_is_the_weighted_sum_of_the_weight_changes(model: PeftModel) -> None:
    model.add_weighted_adapter(["math", "code"], [0.6, -0.2], "both")
    for layer in layers(model).values():
        expected = 0.6 * layer.get_delta_weight("math") - 0.2 * layer.get_delta_weight("code")
        torch.testing.assert_close(layer.get_delta_weight("both"), expected, rtol=1e-4, atol=1e-5)


def test_normalization_makes_2_1_equal_to_10_5(model: PeftModel) -> None:
    for name, weights in (("first", [2, 1]), ("second", [10, 5])):
        model.add_weighted_adapter(["math", "code"], weights, name, normalize=True)
    for layer in layers(model).values():
        torch.testing.assert_close(z(layer, "first"), z(layer, "second"), rtol=1e-6, atol=1e-6)


def test_mixing_changes_nothing_that_is_active(model: PeftModel) -> None:
    before, active = logits(model), model.active_adapter
    model.add_weighted_adapter(["math", "code"], [0.5, 0.5], "both")
    assert torch.equal(logits(model), before) and model.active_adapter == active
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".both." in n)


def test_a_mixture_is_saved_and_loads_like_any_adapter(model: PeftModel, tiny_llama: Build, tmp_path: object) -> None:
    model.add_weighted_adapter(["math", "code"], [0.5, 0.5], "both")
    model.set_adapter("both")
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "both")
    assert torch.equal(logits(loaded), logits(model))


def test_adapters_of_other_modules_ranks_and_parametrizations_mix(tiny_llama: Build) -> None:
    torch.manual_seed(1)
    model = get_peft_model(
        tiny_llama(), SVFConfig(init_weights=False, target_modules=["q_proj", "k_proj"], rank=5), "a"
    )
    model.add_adapter("b", SVFConfig.paper(init_weights=False, target_modules=r".*\.(k|down)_proj"))
    model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "both")
    names = {name.rpartition(".")[2] for name, layer in layers(model).items() if "both" in layer.svf_offset}
    assert names == {"q_proj", "k_proj", "down_proj"}
    for layer in layers(model).values():
        parts = [w * layer.get_delta_weight(n) for n, w in (("a", 0.5), ("b", 2.0)) if n in layer.svf_offset]
        torch.testing.assert_close(layer.get_delta_weight("both"), sum(parts), rtol=1e-4, atol=1e-5)


def test_without_residual_a_module_that_one_adapter_lacks_counts_as_z_1(tiny_llama: Build) -> None:
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), SVFConfig(init_weights=False, target_modules=["q_proj"], rank=5), "a")
    model.add_adapter("b", SVFConfig(init_weights=False, target_modules=["k_proj"]))
    model.add_weighted_adapter(["a", "b"], [0.5, 0.7], "both", residual=False)
    for layer in layers(model).values():
        alone = torch.ones(layer.components, dtype=torch.float64)
        z_a, z_b = alone.clone(), alone.clone()
        if "a" in layer.svf_offset:
            z_a[:5] = z(layer, "a")
        else:
            z_b = z(layer, "b")
        torch.testing.assert_close(z(layer, "both"), 0.5 * z_a + 0.7 * z_b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("adapters", "weights", "name", "settings", "message"),
    [
        (["math", "typo"], [1, 1], "new", {}, r"cannot mix \['typo'\]: loaded are math, code"),
        ([], [], "new", {}, "cannot mix no adapters at all"),
        (["math"], [1, 1], "new", {}, r"one finite number for each of \['math'\], got \[1, 1\]"),
        (["math"], [float("nan")], "new", {}, "one finite number"),
        (["math"], [1], "code", {}, "already an adapter named 'code'"),
        (["math", "code"], [1, -1], "new", {"normalize": True}, "sum to 0 and cannot be normalized"),
        (["math"], [1], "a.b", {}, "cannot be named"),
    ],
)
def test_bad_mixtures_are_refused_and_nothing_is_added(
    model: PeftModel, adapters: list, weights: list, name: str, settings: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(adapters, weights, name, **settings)
    assert list(model.peft_config) == ["math", "code"]
    assert all(list(layer.svf_offset) == ["math", "code"] for layer in layers(model).values())


def test_adapters_that_hold_whole_modules_do_not_mix(tiny_llama: Build) -> None:
    model = get_peft_model(tiny_llama(), SVFConfig(modules_to_save=["lm_head"]), "a")
    with pytest.raises(ValueError, match=r"cannot mix \['a'\]: they also hold whole modules"):
        model.add_weighted_adapter(["a"], [0.5], "half")


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, -2.0])
def test_strength_scales_the_offsets_in_forward_merge_and_mixed_batches(model: PeftModel, strength: float) -> None:
    model.add_weighted_adapter(["math"], [strength], "expected")
    model.set_adapter("expected")
    expected = logits(model)
    model.set_adapter("math")
    model.set_strength("math", strength)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(IDS, adapter_names=["math"]).logits, expected, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)


def test_strength_is_no_part_of_the_saved_adapter(model: PeftModel, tiny_llama: Build, tmp_path: object) -> None:
    before = logits(model)
    model.set_strength("math", 0.25)
    model.save_pretrained(tmp_path, selected_adapters=["math"])
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "math")), before)
    model.set_strength("math", 1.0)
    assert torch.equal(logits(model), before)


def test_bad_strengths_are_refused(model: PeftModel) -> None:
    with pytest.raises(ValueError, match="no adapter named 'typo'; loaded are math, code"):
        model.set_strength("typo", 0.5)
    with pytest.raises(ValueError, match="must be a finite number, got nan"):
        model.set_strength("math", float("nan"))
    model.merge_adapter(["math"])
    with pytest.raises(ValueError, match="'math' is merged; call `unmerge_adapter` first"):
        model.set_strength("math", 0.5)


def test_a_deleted_adapter_takes_its_strength_along(model: PeftModel) -> None:
    model.set_strength("code", 0.5)
    model.delete_adapter("code")
    model.add_adapter("code", SVFConfig())
    assert all(layer.svf_strength == {"math": 1.0, "code": 1.0} for layer in layers(model).values())
