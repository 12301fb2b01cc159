"""The paper's parametrization against the released code's formula, and `rank`, each in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import LlamaForCausalLM

from peft_svf import SVFConfig
from peft_svf.tuner import Linear, SVFLayer


SHAPES = [(6, 6), (12, 5), (5, 12)]  # (out, in)
IDS = torch.tensor([[5, 17, 42, 3, 60]])
Build = Callable[..., LlamaForCausalLM]


def adapted(shape: tuple[int, int], config: SVFConfig, *more: SVFConfig) -> Linear:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0]).double())
    for name, settings in zip("abc", (config, *more), strict=False):
        inject_adapter_in_model(settings, model, name)
    return model[0]


def settings(**kwargs: object) -> SVFConfig:
    return SVFConfig(target_modules=["0"], init_weights=False, **kwargs)


def released_code(weight: torch.Tensor, logit: torch.Tensor) -> torch.Tensor:
    """W' of the paper's released code: U diag(σ·sigmoid(p)) Vᵀ, rescaled to keep the sum of its singular values."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    scaled = s * torch.sigmoid(logit.double())
    return u @ torch.diag(scaled) @ vh * (s.sum() / scaled.sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_papers_parametrization_equals_the_released_formula(shape: tuple[int, int]) -> None:
    layer = adapted(shape, settings(parametrization="sigmoid"))
    logit = layer.svf_offset["a"].weight
    logit.data.normal_(0.1, 1.0)
    weight = layer.base_layer.weight.detach().clone()
    expected = released_code(weight, logit)
    x = torch.randn(4, shape[1], dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ expected.T + layer.base_layer.bias, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.get_delta_weight("a"), expected - weight, rtol=1e-6, atol=1e-6)
    layer.merge()
    torch.testing.assert_close(layer.base_layer.weight, expected, rtol=1e-6, atol=1e-6)
    nuclear_norms = [torch.linalg.matrix_norm(w, ord="nuc") for w in (layer.base_layer.weight, weight)]
    torch.testing.assert_close(*nuclear_norms, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradient_of_the_logits_is_that_of_the_released_formula(shape: tuple[int, int]) -> None:
    layer = adapted(shape, settings(parametrization="sigmoid"))
    dense = layer.svf_offset["a"].weight.detach().double().requires_grad_()
    x = torch.randn(4, shape[1], dtype=torch.float64)
    (x @ released_code(layer.base_layer.weight.detach(), dense).T + layer.base_layer.bias).square().sum().backward()
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.svf_offset["a"].weight.grad.double(), dense.grad, rtol=1e-4, atol=1e-5)


def test_equal_logits_are_the_base_model() -> None:
    layer = adapted((8, 6), settings(parametrization="sigmoid"))
    layer.svf_offset["a"].weight.data.fill_(0.1)
    assert layer.offset("a").abs().max() < 1e-6


def test_paper_preset_draws_the_released_logits(tiny_llama: Build) -> None:
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), SVFConfig.paper(task_type="CAUSAL_LM"))
    logits = torch.cat([p.detach() for n, p in model.named_parameters() if "svf_offset" in n])
    error = 4 * 0.01 / len(logits) ** 0.5
    assert abs(logits.mean() - 0.1) < error and abs(logits.std() - 0.01) < error
    assert model.peft_config["default"].parametrization == "sigmoid"


def test_papers_expert_survives_saving(tiny_llama: Build, tmp_path: object) -> None:
    model = get_peft_model(tiny_llama(), SVFConfig.paper(init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("rank", [1, 3, 5, 99])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rank_moves_the_leading_singular_values_only(shape: tuple[int, int], rank: int) -> None:
    layer = adapted(shape, settings(rank=rank))
    offset = layer.svf_offset["a"].weight
    kept = min(rank, *shape)
    assert offset.shape == (kept,) and layer.svf_basis.shape == (min(shape), kept)
    u, s, vh = torch.linalg.svd(layer.base_layer.weight.detach(), full_matrices=False)
    expected = u @ torch.diag(torch.cat([s[:kept] * (1 + offset), s[kept:]])) @ vh
    x = torch.randn(3, shape[1], dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ expected.T + layer.base_layer.bias, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.get_delta_weight("a"), expected - layer.base_layer.weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("merged", [False, True])
def test_a_later_adapter_of_higher_rank_extends_the_basis(merged: bool) -> None:
    x = torch.randn(3, 6, dtype=torch.float64)
    layer = adapted((6, 6), settings(rank=2))
    before = layer(x)
    model = nn.Sequential(layer)
    if merged:
        layer.merge()
    inject_adapter_in_model(settings(rank=5), model, "b")
    assert layer.svf_basis.shape == (6, 5)
    if merged:
        layer.unmerge()
    layer.set_adapter("a")
    torch.testing.assert_close(layer(x), before)
    expected = layer.get_delta_weight("a") + layer.get_delta_weight("b")
    layer.set_adapter(["a", "b"])
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ expected.T, rtol=1e-6, atol=1e-6)


def test_a_later_adapter_of_lower_rank_uses_the_basis_that_is_there() -> None:
    layer = adapted((6, 6), settings(), settings(rank=2))
    assert layer.svf_basis.shape == (6, 6) and layer.svf_offset["b"].weight.shape == (2,)
    s = torch.linalg.svdvals(layer.base_layer.weight.detach())
    expected = (s[:2] * layer.svf_offset["b"].weight).norm()
    torch.testing.assert_close(torch.linalg.matrix_norm(layer.get_delta_weight("b")), expected, rtol=1e-6, atol=1e-6)


def test_rank_pattern_makes_exceptions_by_name_and_expression(tiny_llama: Build) -> None:
    config = SVFConfig(
        rank=4, rank_pattern={"q_proj": 7, r"layers\.1\.mlp\.(up|gate)_proj": 2, "layers.0.mlp.up_proj": 99}
    )
    model = get_peft_model(tiny_llama(), config)
    ranks = {name: len(m.svf_offset["default"].weight) for name, m in model.named_modules() if isinstance(m, SVFLayer)}
    found = {name.removeprefix("base_model.model.model.layers."): rank for name, rank in ranks.items() if rank != 4}
    assert found == {
        "0.self_attn.q_proj": 7,
        "1.self_attn.q_proj": 7,
        "1.mlp.up_proj": 2,
        "1.mlp.gate_proj": 2,
        "0.mlp.up_proj": 32,
    }


def test_a_pattern_that_matches_nothing_warns(tiny_llama: Build) -> None:
    with pytest.warns(RuntimeWarning, match=r"rank_pattern keys did not match.*typo_proj"):
        get_peft_model(tiny_llama(), SVFConfig(rank_pattern={"typo_proj": 3}))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_truncated_expert_survives_saving(tiny_llama: Build, tmp_path: object, low_cpu_mem_usage: bool) -> None:
    model = get_peft_model(tiny_llama(), SVFConfig(init_weights=False, rank=5, rank_pattern={"q_proj": 9})).eval()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_adapters_of_different_rank_in_one_mixed_batch(tiny_llama: Build) -> None:
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), SVFConfig(init_weights=False, rank=3), "a")
    model.add_adapter("b", SVFConfig(init_weights=False))
    model.eval()
    single = []
    for name in ("a", "b"):
        model.set_adapter(name)
        single.append(model(IDS).logits)
    mixed = model(IDS.repeat(2, 1), adapter_names=["a", "b"]).logits
    torch.testing.assert_close(mixed, torch.cat(single), rtol=1e-4, atol=1e-5)
