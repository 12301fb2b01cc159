"""Mixtures in every row against W' = U Σ diag(z') Vᵀ, built in float64 by `torch.linalg.svd` row by row."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from peft_svf import SVFConfig
from peft_svf.tuner import SVFLayer
from peft_svf.tuner.mixed_batch import MixedBatch


Build = Callable[..., LlamaForCausalLM]
Rows = list[Mapping[str, float]]
IDS = torch.randint(3, 97, (5, 6), generator=torch.Generator().manual_seed(0))
ADAPTERS: dict[str, dict[str, Any]] = {
    "full": {},
    "low": {"rank": 5, "rank_pattern": {"up_proj": 2}},
    "paper": {"parametrization": "sigmoid", "target_modules": ["q_proj", "down_proj"]},
    "second": {"layers_to_transform": [1]},
}
NAMES = tuple(ADAPTERS)
MIXTURES: Rows = [
    {"full": 0.3, "low": 0.7},
    {"paper": 1.4, "second": -0.6, "full": 0.2},
    {},
    {"low": 1.0},
    {"full": 0.25, "low": 0.25, "paper": 0.25, "second": 0.25},
]


@pytest.fixture(scope="module")
def prototypes() -> list[PeftModel]:
    return []


@pytest.fixture
def model(tiny_llama: Build, prototypes: list[PeftModel]) -> PeftModel:
    """In float64, so that nothing but the offsets (float32) is rounded; "paper" at another strength."""
    if not prototypes:
        prototypes.append(with_adapters(tiny_llama().double(), ADAPTERS))
    return copy.deepcopy(prototypes[0])


def with_adapters(base: nn.Module, adapters: Mapping[str, dict[str, Any]]) -> PeftModel:
    torch.manual_seed(1)
    (first, settings), *others = adapters.items()
    model = get_peft_model(base, SVFConfig(init_weights=False, **settings), first)
    for name, settings in others:
        model.add_adapter(name, SVFConfig(init_weights=False, **settings))
    for name, parameter in model.named_parameters():
        if ".svf_offset." in name:
            parameter.data.mul_(3)
    if "paper" in adapters:
        model.set_strength("paper", 0.8)
    return model.eval()


def scales(layer: SVFLayer, name: str, singular_values: torch.Tensor) -> torch.Tensor:
    """z of one adapter in float64, by the definitions: 1 where it adapts nothing."""
    z = torch.ones_like(singular_values)
    if name in layer.svf_offset:
        parameter = layer.svf_offset[name].weight.detach().double()
        leading = singular_values[: len(parameter)]
        if ADAPTERS.get(name, {}).get("parametrization") == "sigmoid":
            gate = 1 / (1 + torch.exp(-parameter))
            changed = gate * leading.sum() / (leading * gate).sum()
        else:
            changed = 1 + parameter
        z[: len(parameter)] = 1 + layer.svf_strength[name] * (changed - 1)
    return z


@torch.no_grad()
def dense_logits(
    plain: LlamaForCausalLM,
    model: PeftModel,
    ids: torch.Tensor,
    weights: Callable[[str], Mapping[str, float]],
    residual: bool,
) -> torch.Tensor:
    """Logits of the float64 model in which every matrix of `model` has its mixture, `weights(name of the matrix)`."""
    plain = plain.double()
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, SVFLayer):
            linear = plain.get_submodule(name)
            u, s, vh = torch.linalg.svd(linear.weight, full_matrices=False)
            alphas = weights(name)
            z = sum((alpha * scales(layer, k, s) for k, alpha in alphas.items()), torch.zeros_like(s))
            if residual:
                z = z + (1 - sum(alphas.values()))
            linear.weight.copy_(u * (s * z) @ vh)
    return plain(ids).logits


def matrix_of(rows: Rows, names: tuple[str, ...] = NAMES) -> torch.Tensor:
    return torch.tensor([[row.get(name, 0.0) for name in names] for row in rows])


@torch.no_grad()
def routed_logits(model: PeftModel, batch: MixedBatch, ids: torch.Tensor = IDS) -> torch.Tensor:
    with model.base_model.routed(batch):
        return model(ids).logits


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "the paper's formula"])
def test_any_mixture_in_every_row(model: PeftModel, tiny_llama: Build, residual: bool) -> None:
    mixed = routed_logits(model, MixedBatch(NAMES, matrix_of(MIXTURES), residual=residual))
    for row, mixture in enumerate(MIXTURES):
        alphas = {name: mixture.get(name, 0.0) for name in NAMES}
        expected = dense_logits(tiny_llama(), model, IDS[row : row + 1], lambda name, a=alphas: a, residual)
        torch.testing.assert_close(mixed[row : row + 1], expected, rtol=1e-5, atol=1e-5)
    assert (mixed[0] - mixed[4]).abs().max() > 0.1  # the mixtures matter


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "the paper's formula"])
def test_weights_for_each_group_and_the_longest_group_that_fits(
    model: PeftModel, tiny_llama: Build, residual: bool
) -> None:
    groups = ("model", "model.layers.1", "model.layers.1.mlp", "model.layers.1.mlp.up_proj", "model.layers.0.mlp.up")
    weights = torch.randn(5, len(groups), len(NAMES), generator=torch.Generator().manual_seed(2)) / 2
    weights[3] = weights[1]  # rows of the same mixture
    weights[2] = 0

    def group_of(name: str) -> int:
        parts = name.split(".")
        fits = [i for i, group in enumerate(groups) if parts[: len(group.split("."))] == group.split(".")]
        return max(fits, key=lambda i: groups[i].count("."))

    assert {group_of(name) for name in ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj")} == {0}
    mixed = routed_logits(model, MixedBatch(NAMES, weights, groups, residual=residual))
    for row in range(5):
        expected = dense_logits(
            tiny_llama(),
            model,
            IDS[row : row + 1],
            lambda name, row=row: dict(zip(NAMES, weights[row, group_of(name)].double().tolist(), strict=True)),
            residual,
        )
        torch.testing.assert_close(mixed[row : row + 1], expected, rtol=1e-5, atol=1e-5)


def test_a_matrix_without_a_group_is_named_before_anything_runs(model: PeftModel) -> None:
    batch = MixedBatch(NAMES, torch.zeros(5, 2, 4), ("model.layers.0", "model.layers.1.mlp"))
    with (
        pytest.raises(
            ValueError, match=r"no group has weights for .* 'model\.layers\.1\.self_attn\..*'model\.layers\.0'"
        ),
        model.base_model.routed(batch),
    ):
        pytest.fail("entered")
    assert not model.base_model.svf_batches.in_use


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("weights", [[0.3, 0.7], [2.0, -0.5], [0.0, 0.0], [0.5, 0.0]], ids=str)
def test_a_mixture_is_what_add_weighted_adapter_makes(model: PeftModel, weights: list[float], residual: bool) -> None:
    """Also in the matrices that only others adapt, which both leave as they are."""
    model.delete_adapter("full")  # the basis stays whole
    names = ["paper", "second"]
    model.add_weighted_adapter(names, weights, "mixed", residual=residual)
    model.set_adapter("mixed")
    with torch.no_grad():
        expected = model(IDS).logits
    model.set_adapter("low")
    batch = MixedBatch(names, torch.tensor([weights]), residual=residual, every_row=True)
    torch.testing.assert_close(routed_logits(model, batch), expected, rtol=1e-5, atol=1e-5)
    both = MixedBatch([*names, "low"], torch.tensor([[*weights, 0.0]] * 4 + [[0.0, 0.0, 1.0]]), residual=True)
    if residual:
        torch.testing.assert_close(routed_logits(model, both)[:4], expected[:4], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_one_adapter_for_all_rows_is_the_active_adapter_bit_for_bit(tiny_llama: Build) -> None:
    model = with_adapters(tiny_llama(), ADAPTERS)
    for name in NAMES:
        model.set_adapter(name)
        expected = model(IDS).logits
        model.set_adapter("full" if name != "full" else "low")
        for batch in (MixedBatch.of_names([name] * 5), MixedBatch([name], torch.ones(1, 1), every_row=True)):
            assert torch.equal(routed_logits(model, batch), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_zeros_are_the_base_model_bit_for_bit_beside_others(tiny_llama: Build, dtype: torch.dtype) -> None:
    model = with_adapters(tiny_llama().to(dtype), ADAPTERS)
    with model.disable_adapter():
        base = model(IDS).logits
    mixed = routed_logits(model, MixedBatch(NAMES, matrix_of(MIXTURES)))
    assert torch.equal(mixed[2], base[2]) and not torch.equal(mixed[3], base[3])


@torch.no_grad()
def test_merged_weights_agree(model: PeftModel) -> None:
    batch = MixedBatch(["full", "low"], torch.tensor([[0.3, 0.7]]), every_row=True)
    mixed = routed_logits(model, batch)
    model.add_weighted_adapter(["full", "low"], [0.3, 0.7], "mixed")
    model.merge_adapter(["mixed"])
    torch.testing.assert_close(model(IDS).logits, mixed, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        routed_logits(model, batch)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        routed_logits(model, MixedBatch.of_names(["__base__"] * 5))


def test_a_surplus_needs_all_singular_values(tiny_llama: Build) -> None:
    model = with_adapters(tiny_llama(), {"low": ADAPTERS["low"]})
    batch = MixedBatch(["low"], torch.full((5, 1), 0.5), residual=False)
    with pytest.raises(ValueError, match=r"do not sum to 1 .* only the leading 5 are adapted: use `residual=True`"):
        routed_logits(model, batch)
    assert routed_logits(model, MixedBatch(["low"], torch.full((5, 1), 0.5))).isfinite().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_are_numbers(value: float) -> None:
    with pytest.raises(ValueError, match="must be finite numbers"):
        MixedBatch(["full"], torch.tensor([[value]]))


@torch.no_grad()
def test_a_broken_adapter_spoils_only_the_rows_that_use_it(model: PeftModel) -> None:
    rows = MixedBatch(["full", "low"], torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.0, 0.0], [0.0, 1.0]]))
    with model.base_model.routed(rows):
        before = model(IDS).logits
        model.get_parameter(next(n for n, _ in model.named_parameters() if ".svf_offset.full." in n)).data[0] = (
            math.nan
        )
        after = model(IDS).logits
    assert after[[0, 2]].isnan().all()
    torch.testing.assert_close(after[[1, 3, 4]], before[[1, 3, 4]])


@torch.no_grad()
def test_adapters_that_change_within_a_route_are_seen(model: PeftModel) -> None:
    with model.base_model.routed(MixedBatch(["full"], torch.ones(1, 1), every_row=True)):
        before = model(IDS).logits
        generated = model.generate(IDS, max_new_tokens=4, min_new_tokens=4)
        model.set_strength("full", -2.0)
        assert (model(IDS).logits - before).abs().max() > 0.1
        assert not torch.equal(model.generate(IDS, max_new_tokens=4, min_new_tokens=4), generated)


def test_gradients_of_a_routed_forward_are_those_of_the_adapter(model: PeftModel) -> None:
    """In eval mode; twice, because nothing of the first graph may be left."""
    model.base_model.set_adapter(["full", "low"])
    weights = {n: p for n, p in model.named_parameters() if ".svf_offset.low" in n}
    batch = MixedBatch(["full", "low"], torch.tensor([[0.3, 0.7]] * 3 + [[0.0, 1.0]] * 2))
    with torch.no_grad(), model.base_model.routed(batch):
        model.base_model.model(IDS)  # a forward without gradients first
        for _ in range(2):
            with torch.enable_grad():
                loss = model.base_model.model(IDS).logits.square().mean()
                gradients = torch.autograd.grad(loss, list(weights.values()))
    parameter = next(iter(weights.values()))
    step = 1e-3
    losses = []
    for sign in (1, -1):
        parameter.data[0] += sign * step
        losses.append(routed_logits(model, batch).square().mean())
        parameter.data[0] -= sign * step
    torch.testing.assert_close(gradients[0][0].double(), (losses[0] - losses[1]) / (2 * step), rtol=1e-2, atol=1e-6)
