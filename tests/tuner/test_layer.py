"""The SVF layer against the two-sided formula in float64, and its merging."""

from __future__ import annotations

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_svf import SVFConfig
from peft_svf.tuner import Linear


SHAPES = [(6, 6), (9, 5), (5, 9), (1, 7), (7, 1)]  # (out, in): square, tall, wide
KINDS = ["linear", "linear without bias", "Conv1D"]


def base_layer(kind: str, out_features: int, in_features: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    if kind == "Conv1D":
        layer: nn.Module = Conv1D(out_features, in_features)
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    else:
        layer = nn.Linear(in_features, out_features, bias=kind == "linear")
    return layer.to(dtype)


def svf_layer(base: nn.Module, adapters: tuple[str, ...] = ("a",), init_weights: bool = False) -> Linear:
    torch.manual_seed(1)
    model = nn.Sequential(base)
    for name in adapters:
        config = SVFConfig(target_modules=["0"], init_weights=init_weights)
        inject_adapter_in_model(config, model, name)
    layer = model[0].eval()
    assert isinstance(layer, Linear)
    layer.set_adapter(adapters[0])
    return layer


def matrix(base: nn.Module) -> torch.Tensor:
    """The weight in (out, in) layout."""
    return (base.weight.T if isinstance(base, Conv1D) else base.weight).detach().clone()


def offset_of(layer: Linear, adapter: str = "a") -> torch.Tensor:
    return layer.svf_offset[adapter].weight


def two_sided(weight: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """W' = U Σ diag(z) Vᵀ."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return u @ torch.diag(s * (1 + offset.double())) @ vh


def inputs(in_features: int, *rows: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*rows, in_features, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_equals_the_two_sided_formula(shape: tuple[int, int], kind: str) -> None:
    base = base_layer(kind, *shape)
    weight, x = matrix(base), inputs(shape[1], 2, 3)
    expected = x @ two_sided(weight, offset := torch.linspace(-0.5, 0.7, min(shape))).T
    if base.bias is not None:
        expected = expected + base.bias
    layer = svf_layer(base)
    offset_of(layer).data = offset
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_new_adapter_is_the_base_layer_bit_for_bit(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    base = base_layer(kind, *shape, dtype=dtype)
    x = inputs(shape[1], 4, dtype=dtype)
    before = base(x)
    after = svf_layer(base, init_weights=True)(x)
    assert after.dtype == before.dtype and torch.equal(after, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)], ids=str)
def test_offsets_stay_float32_and_outputs_keep_their_dtype(shape: tuple[int, int], dtype: torch.dtype) -> None:
    layer = svf_layer(base_layer("linear", *shape, dtype=dtype))
    assert offset_of(layer).dtype == torch.float32
    assert layer.svf_basis.dtype == dtype
    x = inputs(shape[1], 64, dtype=dtype)
    expected = x.double() @ two_sided(matrix(layer.base_layer), offset_of(layer)).T + layer.base_layer.bias.double()
    actual = layer(x)
    assert actual.dtype == dtype
    resolution = torch.finfo(dtype).eps
    assert (actual.double() - expected).norm() / expected.norm() < 4 * resolution


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)], ids=str)
def test_autocast_keeps_the_output_dtype_of_the_base_layer(shape: tuple[int, int]) -> None:
    base = base_layer("linear", *shape, dtype=torch.float32)
    x = inputs(shape[1], 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = base(x)
        after = svf_layer(base, init_weights=True)(x)
    assert after.dtype == before.dtype == torch.bfloat16 and torch.equal(after, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(9, 5), (5, 9)], ids=str)
def test_gradient_of_the_offsets_is_that_of_the_dense_weight(shape: tuple[int, int], kind: str) -> None:
    base = base_layer(kind, *shape)
    x, target = inputs(shape[1], 4), inputs(shape[0], 4)
    u, s, vh = torch.linalg.svd(matrix(base), full_matrices=False)
    bias = 0 if base.bias is None else base.bias.detach()
    layer = svf_layer(base)

    dense = offset_of(layer).detach().double().requires_grad_()
    ((x @ (u @ torch.diag(s * (1 + dense)) @ vh).T + bias - target) ** 2).sum().backward()
    ((layer(x) - target) ** 2).sum().backward()

    torch.testing.assert_close(offset_of(layer).grad.double(), dense.grad, rtol=1e-5, atol=1e-5)
    assert [name for name, p in layer.named_parameters() if p.grad is not None] == ["svf_offset.a.weight"]


def test_gradient_reaches_the_input_through_an_adapted_layer() -> None:
    layer = svf_layer(base_layer("linear", 5, 9))
    x = inputs(9, 2).requires_grad_()
    layer(x).sum().backward()
    expected = two_sided(matrix(layer.base_layer), offset_of(layer)).sum(0).expand(2, 9)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_delta_weight_is_in_the_layout_of_the_base_weight(shape: tuple[int, int], kind: str) -> None:
    base = base_layer(kind, *shape)
    weight = matrix(base)
    layer = svf_layer(base)
    delta = layer.get_delta_weight("a")
    assert delta.shape == base.weight.shape
    delta = delta.T if kind == "Conv1D" else delta
    torch.testing.assert_close(delta, two_sided(weight, offset_of(layer)) - weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(12, 8), (8, 12)], ids=str)
def test_merge_is_the_formula_and_unmerge_is_bit_exact(shape: tuple[int, int], kind: str, dtype: torch.dtype) -> None:
    layer = svf_layer(base_layer(kind, *shape, dtype=dtype))
    before = matrix(layer.base_layer)
    expected = two_sided(before, offset_of(layer))

    layer.merge()
    merged = matrix(layer.base_layer)
    assert merged.dtype == dtype and layer.base_layer.weight.is_contiguous()
    assert (merged.double() - expected).norm() / expected.norm() < 4 * torch.finfo(dtype).eps
    x = inputs(shape[1], 3, dtype=dtype)
    assert torch.equal(layer(x), layer.base_layer(x))

    layer.unmerge()
    assert torch.equal(matrix(layer.base_layer), before)
    assert layer.svf_unmerged_weight is None and not layer.merged


def test_several_adapters_are_the_sum_of_their_offsets_in_forward_and_merge() -> None:
    layer = svf_layer(base_layer("linear", 6, 8), adapters=("a", "b"))
    weight = matrix(layer.base_layer)
    expected = two_sided(weight, offset_of(layer, "a") + offset_of(layer, "b"))
    x = inputs(8, 3)
    layer.set_adapter(["a", "b"])
    torch.testing.assert_close(layer(x), x @ expected.T + layer.base_layer.bias, rtol=1e-6, atol=1e-6)

    layer.merge(adapter_names=["a"])
    with pytest.warns(UserWarning, match="Already following adapters were merged"):
        layer.merge(adapter_names=["b"])
    torch.testing.assert_close(matrix(layer.base_layer), expected, rtol=1e-6, atol=1e-6)
    # The change of one adapter refers to the weight before merging.
    alone = two_sided(weight, offset_of(layer, "b")) - weight
    torch.testing.assert_close(layer.get_delta_weight("b"), alone, rtol=1e-6, atol=1e-6)
    layer.unmerge()
    assert torch.equal(matrix(layer.base_layer), weight)


def test_all_adapters_of_a_layer_share_one_basis() -> None:
    layer = svf_layer(base_layer("linear", 6, 8), adapters=("a",))
    pointer = layer.svf_basis.data_ptr()
    layer.update_layer("b", SVFConfig())
    assert layer.svf_basis.data_ptr() == pointer
    assert [name for name, _ in layer.named_buffers()] == ["svf_basis", "svf_singular_values"]
    assert not [key for key in layer.state_dict() if "svf" in key and "svf_offset" not in key]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e9])
def test_safe_merge_refuses_broken_weights_and_changes_nothing(value: float) -> None:
    layer = svf_layer(base_layer("linear", 6, 8, dtype=torch.float16))
    before = matrix(layer.base_layer)
    offset_of(layer).data[2] = value  # 1e9 overflows float16
    with pytest.raises(ValueError, match=r"^NaNs detected in the merged weights"):
        layer.merge(safe_merge=True)
    assert torch.equal(matrix(layer.base_layer), before) and not layer.merged


def test_merged_layer_moves_and_unmerges_with_its_model() -> None:
    layer = svf_layer(base_layer("linear", 6, 8, dtype=torch.float32))
    layer.merge()
    layer.double()
    layer.unmerge()
    assert layer.base_layer.weight.dtype == torch.float64


def test_disabled_layer_unmerges_and_is_the_base_layer() -> None:
    layer = svf_layer(base_layer("linear", 6, 8))
    x = inputs(8, 3)
    before = layer.base_layer(x)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), before)
    assert not layer.merged
