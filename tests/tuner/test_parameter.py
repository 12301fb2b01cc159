"""SVF of fused experts (`target_parameters`) on random mixture-of-experts models, against dense float64 formulas."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.conversion import convert_to_lora
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from peft_svf import SVFConfig
from peft_svf.tuner import Linear, SVFLayer
from peft_svf.tuner.parameter import ParamWrapper


IDS = torch.tensor([[5, 17, 42, 3, 60], [9, 8, 7, 6, 5]])
EXPERTS = 4
COMMON = {
    "vocab_size": 97,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,  # large enough that layers matter to the logits
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# The stored matrices are (out, in) in Mixtral and Qwen3, (in, out) in the others; tall and wide ones occur in all.
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**COMMON, intermediate_size=24)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, moe_intermediate_size=8)),
    "gpt_oss": lambda: GptOssForCausalLM(GptOssConfig(**COMMON, intermediate_size=24)),
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(**COMMON, intermediate_size=24, intermediate_size_mlp=24, interleave_moe_layer_step=1)
    ),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def build(family: str = "mixtral", seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FAMILIES[family]().to(dtype).eval()
    if dtype == torch.float64 and family != "llama4":
        model.set_experts_implementation("batched_mm")  # the default, grouped_mm, has no float64
    return model


def owner(family: str = "mixtral") -> str:
    return "feed_forward.experts" if family == "llama4" else "mlp.experts"


def both(family: str = "mixtral", **settings: object) -> SVFConfig:
    """A configuration that adapts all fused experts of a model, and nothing else."""
    parameters = [f"{owner(family)}.{name}" for name in ("down_proj", "gate_up_proj")]
    return SVFConfig(**{"target_modules": None, "target_parameters": parameters, **settings})


def adapt(base: PreTrainedModel, config: SVFConfig, name: str = "default", seed: int = 1) -> PeftModel:
    torch.manual_seed(seed)
    return get_peft_model(base, config, name).eval()


def add(model: PeftModel, name: str, config: SVFConfig, seed: int = 2) -> None:
    torch.manual_seed(seed)
    model.add_adapter(name, config)
    model.eval()


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def wrappers(model: nn.Module) -> dict[str, ParamWrapper]:
    """The wrappers by the name of their parameter in the base model."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            module_name = name.replace("base_model.model.", "").replace(".base_layer", "")
            found[f"{module_name}.{module.parameter_name}"] = module
    return found


def two_sided(stack: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """W' = U Σ diag(1 + offset) Vᵀ of every matrix in float64; offsets beyond those given are 0."""
    changed = []
    for matrix, row in zip(stack.double(), offset.double(), strict=True):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        changed.append(u @ torch.diag(s * torch.nn.functional.pad(1 + row, (0, len(s) - len(row)), value=1.0)) @ vh)
    return torch.stack(changed)


def dense_copy(base: PreTrainedModel, offsets: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The base model with the changed weights written into it."""
    model = copy.deepcopy(base)
    for name, offset in offsets.items():
        parameter = model.get_parameter(name)
        parameter.data = two_sided(parameter.data, offset).to(parameter.dtype)
    return model


def offsets_of(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    return {name: layer.offset(adapter).detach() for name, layer in wrappers(model).items()}


# the formula


@each_family
def test_forward_equals_the_two_sided_formula_of_every_expert(family: str) -> None:
    base = build(family, dtype=torch.float64)
    before = copy.deepcopy(base)
    model = adapt(base, both(family, init_weights=False))
    offsets = offsets_of(model)
    assert {o.shape[0] for o in offsets.values()} == {EXPERTS} and len({o[0, 0] for o in offsets.values()}) == 4
    expected = logits(dense_copy(before, offsets))
    assert (expected - logits(before)).abs().max() > 1e-2
    torch.testing.assert_close(logits(model), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("experts_implementation", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_the_experts_sees_the_changed_weights(experts_implementation: str) -> None:
    base = build()
    base.set_experts_implementation(experts_implementation)
    before = copy.deepcopy(base)
    model = adapt(base, both(init_weights=False))
    torch.testing.assert_close(logits(model), logits(dense_copy(before, offsets_of(model))), rtol=1e-4, atol=1e-5)


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_new_adapter_is_the_base_model_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    base = build(family, dtype=dtype)
    before = logits(base)
    model = adapt(base, both(family))
    after = logits(model)
    assert after.dtype == before.dtype and torch.equal(after, before)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@each_family
def test_gradients_of_the_offsets_are_those_of_the_dense_weights(family: str) -> None:
    base = build(family, dtype=torch.float64)
    model = adapt(copy.deepcopy(base), both(family, init_weights=False)).train()
    dense = {name: offset.double().requires_grad_() for name, offset in offsets_of(model).items()}
    weights = {name: two_sided(base.get_parameter(name).data, offset) for name, offset in dense.items()}
    base.train()
    torch.func.functional_call(base, weights, kwargs={"input_ids": IDS, "labels": IDS}).loss.backward()
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, layer in wrappers(model).items():
        gradient = layer.svf_offset["default"].weight.grad
        assert gradient.norm() > 0
        torch.testing.assert_close(gradient.double(), dense[name].grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_changed_weight_is_as_exact_as_its_dtype(dtype: torch.dtype) -> None:
    model = adapt(build(dtype=dtype), both(init_weights=False))
    for layer in wrappers(model).values():
        offset = layer.offset("default")
        change = two_sided(layer.get_param(), offset) - layer.get_param().double()
        actual = layer._changed_parameter(offset).double() - layer.get_param().double()
        # Rounding W' to its dtype costs the most.
        assert (actual - change).norm() < torch.finfo(dtype).eps * layer.get_param().double().norm()


def test_a_matrix_counts_as_a_linear_layer_of_its_own() -> None:
    def linear() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 4)).double()

    x = torch.randn(3, 6, dtype=torch.float64)
    by_module = inject_adapter_in_model(SVFConfig(target_modules=["0", "1"], init_weights=False), linear())
    config = SVFConfig(target_modules=None, target_parameters=["0.weight", "1.weight"])
    by_parameter = inject_adapter_in_model(config, linear())
    for one, other in zip(by_module, by_parameter, strict=True):
        assert isinstance(one, Linear) and isinstance(other, ParamWrapper)
        assert other.svf_offset["default"].weight.shape == one.svf_offset["default"].weight.shape
        other.svf_offset["default"].weight.data.copy_(one.svf_offset["default"].weight.data)
    torch.testing.assert_close(by_parameter(x), by_module(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(by_parameter(x), linear()(x))


@pytest.mark.parametrize("parameter", ["mlp.gate.weight", "embed_tokens.weight"])
def test_routers_and_embeddings_can_be_adapted(parameter: str) -> None:
    base = build(dtype=torch.float64)
    config = SVFConfig(target_modules=None, target_parameters=[parameter], init_weights=False)
    model = adapt(copy.deepcopy(base), config)
    expected = copy.deepcopy(base)
    for name, layer in wrappers(model).items():
        weight = expected.get_parameter(name)
        weight.data = two_sided(weight.data[None], layer.offset("default").detach()[None])[0]
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(logits(expected), logits(base))


# options


def test_without_target_modules_only_the_parameters_are_adapted() -> None:
    model = adapt(build(), both())
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    prefix = "base_model.model.model.layers"
    assert shapes == {
        f"{prefix}.{layer}.mlp.experts.{wrapper}svf_offset.default.weight": (EXPERTS, 16)
        for layer in (0, 1)
        for wrapper in ("", "base_layer.")
    }
    assert model.get_model_status().num_adapter_layers == 4
    assert model.targeted_parameter_names and not model.targeted_module_names


def test_modules_and_parameters_together() -> None:
    base = build(dtype=torch.float64)
    before = copy.deepcopy(base)
    model = adapt(base, both(target_modules=["q_proj"], init_weights=False))
    layers = [module for module in model.modules() if isinstance(module, SVFLayer)]
    assert [type(layer) for layer in layers].count(Linear) == 2 and len(layers) == 6
    expected = dense_copy(before, offsets_of(model))
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, Linear):
            weight = expected.get_submodule(name).weight
            weight.data = two_sided(weight.data[None], module.offset("default").detach()[None])[0]
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-10, atol=1e-10)


def test_rank_adapts_the_leading_components_of_every_expert() -> None:
    base = build(dtype=torch.float64)
    before = copy.deepcopy(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rank_pattern")
        config = both(rank=3, rank_pattern={"experts.gate_up_proj": 5, "1.mlp.experts.down_proj": 99})
        model = adapt(base, SVFConfig(**{**config.to_dict(), "init_weights": False}))
    offsets = offsets_of(model)
    assert {name.removeprefix("model.layers."): tuple(o.shape) for name, o in offsets.items()} == {
        "0.mlp.experts.gate_up_proj": (EXPERTS, 5),
        "0.mlp.experts.down_proj": (EXPERTS, 3),
        "1.mlp.experts.gate_up_proj": (EXPERTS, 5),
        "1.mlp.experts.down_proj": (EXPERTS, 16),
    }
    assert wrappers(model)["model.layers.0.mlp.experts.gate_up_proj"].svf_basis.shape == (EXPERTS, 16, 5)
    torch.testing.assert_close(logits(model), logits(dense_copy(before, offsets)), rtol=1e-10, atol=1e-10)


def test_a_higher_rank_of_a_second_adapter_leaves_the_first_as_it_was() -> None:
    model = adapt(build(), both(rank=3, init_weights=False), "low")
    low = logits(model)
    add(model, "high", both(rank=9, init_weights=False))
    assert {layer.svf_basis.shape[-1] for layer in wrappers(model).values()} == {9}
    assert torch.equal(logits(model), low)
    model.base_model.set_adapter(["low", "high"])
    sums = {}
    for name, layer in wrappers(model).items():
        sums[name] = layer.offset("high") + nn.functional.pad(layer.offset("low"), (0, 6))
    torch.testing.assert_close(logits(model), logits(dense_copy(build(), sums)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rank", [None, 5])
def test_the_papers_parametrization_keeps_the_nuclear_norm_of_every_expert(rank: int | None) -> None:
    base = build(dtype=torch.float64)
    before = copy.deepcopy(base)
    model = adapt(base, both(parametrization="sigmoid", init_weights=False, rank=rank))
    for name, layer in wrappers(model).items():
        logit = layer.svf_offset["default"].weight.detach().double()
        assert logit.shape == (EXPERTS, rank or 16)
        sigma = torch.linalg.svdvals(before.get_parameter(name).data)[:, : logit.shape[1]]
        z = torch.sigmoid(logit) * sigma.sum(1, keepdim=True) / (sigma * torch.sigmoid(logit)).sum(1, keepdim=True)
        torch.testing.assert_close(layer.offset("default").double(), z - 1, rtol=0, atol=1e-6)
        norms = torch.linalg.svdvals(two_sided(before.get_parameter(name).data, layer.offset("default"))).sum(1)
        expected = torch.linalg.svdvals(before.get_parameter(name).data).sum(1)
        torch.testing.assert_close(norms, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits(model), logits(dense_copy(before, offsets_of(model))), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"layers_to_transform": [1]}, ["1.gate_up_proj", "1.down_proj"]),
        ({"exclude_modules": ["0.mlp.experts.down_proj"]}, ["0.gate_up_proj", "1.gate_up_proj", "1.down_proj"]),
        ({"target_parameters": ["0.mlp.experts.down_proj"]}, ["0.down_proj"]),
    ],
    ids=["layers_to_transform", "exclude_modules", "full ending"],
)
def test_parameters_are_selected_like_modules(settings: dict, expected: list[str]) -> None:
    model = adapt(build(), both(**settings))
    names = {name.removeprefix("model.layers.").replace(".mlp.experts", "") for name in wrappers(model)}
    assert names == set(expected)


def test_selecting_none_of_the_parameters_is_an_error() -> None:
    base = build()
    with pytest.raises(ValueError, match="`layers_to_transform` leave none of the parameters"):
        get_peft_model(base, both(layers_to_transform=[7]))
    assert not wrappers(base)


# life with adapters


@each_family
def test_adapters_switch_disable_and_come_back(family: str) -> None:
    base = build(family)
    before = logits(base)
    model = adapt(base, both(family, init_weights=False), "a")
    a = logits(model)
    add(model, "b", both(family, init_weights=False))
    assert torch.equal(logits(model), a)
    model.set_adapter("b")
    b = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), b) and not torch.allclose(a, b)
    model.base_model.set_strength("b", 0.0)
    assert torch.equal(logits(model), before)
    model.delete_adapter("b")
    assert torch.equal(logits(model), a) and not [name for name, _ in model.named_parameters() if ".b." in name]


def test_a_second_adapter_shares_wrappers_and_bases() -> None:
    model = adapt(build(), both(init_weights=False), "a")
    layers, bases = wrappers(model), {name: layer.svf_basis for name, layer in wrappers(model).items()}
    add(model, "b", both(init_weights=False))
    assert len(layers) == 4 and wrappers(model) == layers
    assert all(set(layer.svf_offset) == {"a", "b"} and layer.svf_basis is bases[n] for n, layer in layers.items())


@each_family
def test_training_lowers_the_loss_and_changes_only_the_offsets(family: str) -> None:
    base = build(family)
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    model = adapt(base, both(family)).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.03)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.05
    after = dict(model.unload().named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("use_reentrant", [False, True])
@each_family
def test_gradient_checkpointing_gives_the_same_gradients(family: str, use_reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapt(build(family), both(family, init_weights=False)).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(isinstance(layer.get_param(), nn.Parameter) for layer in wrappers(model).values())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(*gradients) and gradients[0].norm() > 0


def test_an_exception_in_the_model_leaves_the_parameter_as_it_was() -> None:
    model = adapt(build(), both(init_weights=False))
    expected = logits(model)
    experts = wrappers(model)["model.layers.1.mlp.experts.down_proj"].get_base_layer()
    parameters = dict(experts.named_parameters())

    def fail(*args: object) -> None:
        assert not isinstance(experts.down_proj, nn.Parameter)
        raise KeyboardInterrupt

    handle = experts.act_fn.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        logits(model)
    handle.remove()
    assert all(experts.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert torch.equal(logits(model), expected)


def test_autocast_keeps_the_dtype_of_the_parameter() -> None:
    base = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = logits(base)
        model = adapt(base, both())
        assert torch.equal(logits(model), before)
        layer = next(iter(wrappers(model).values()))
        assert layer._changed_parameter(layer.offset("default")).dtype == torch.float32


def test_the_forward_compiles_without_a_graph_break() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj = nn.Parameter(torch.randn(EXPERTS, 6, 9))
            self.down_proj = nn.Parameter(torch.randn(EXPERTS, 9, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.bmm(torch.bmm(x, self.up_proj).relu(), self.down_proj)

    torch.manual_seed(0)
    config = SVFConfig(target_modules=None, target_parameters=["0.up_proj", "0.down_proj"], init_weights=False)
    model = inject_adapter_in_model(config, nn.Sequential(Experts()))
    twin, x = copy.deepcopy(model), torch.randn(EXPERTS, 3, 6)
    compiled = torch.compile(twin, fullgraph=True, backend="eager")
    for one in (model, compiled):
        one(x).square().sum().backward()
    torch.testing.assert_close(compiled(x), model(x))
    for one, other in zip(wrappers(model).values(), wrappers(twin).values(), strict=True):
        gradient = other.svf_offset["default"].weight.grad
        assert gradient.norm() > 0 and isinstance(other.get_param(), nn.Parameter)
        torch.testing.assert_close(gradient, one.svf_offset["default"].weight.grad)


# merging


@each_family
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_is_the_formula_and_unmerge_is_exact(family: str, dtype: torch.dtype) -> None:
    base = build(family, dtype=dtype)
    before = copy.deepcopy(base)
    model = adapt(base, both(family, init_weights=False), "a")
    add(model, "b", both(family, init_weights=False))
    model.base_model.set_adapter(["a", "b"])
    unmerged = logits(model)
    model.merge_adapter(safe_merge=True)
    for name, layer in wrappers(model).items():
        expected = two_sided(before.get_parameter(name).data, layer.offset("a") + layer.offset("b"))
        assert layer.merged_adapters == ["a", "b"]
        assert (layer.get_param().double() - expected).norm() < torch.finfo(dtype).eps * expected.norm()
    if dtype == torch.float32:
        torch.testing.assert_close(logits(model), unmerged, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    for name, layer in wrappers(model).items():
        assert torch.equal(layer.get_param(), before.get_parameter(name)) and layer.svf_unmerged_weight is None
    assert torch.equal(logits(model), unmerged)


def test_disabling_a_merged_adapter_gives_the_base_model() -> None:
    base = build()
    before = logits(base)
    model = adapt(base, both(init_weights=False))
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


@each_family
def test_merge_and_unload_gives_the_plain_model_with_changed_weights(family: str) -> None:
    base = build(family)
    expected_type, before = type(base), copy.deepcopy(base)
    model = adapt(base, both(family, target_modules=["q_proj"], init_weights=False))
    adapted, offsets = logits(model), offsets_of(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is expected_type and not any(isinstance(module, SVFLayer) for module in merged.modules())
    assert merged.state_dict().keys() == before.state_dict().keys()
    for name, offset in offsets.items():
        expected = two_sided(before.get_parameter(name).data, offset).float()
        torch.testing.assert_close(merged.get_parameter(name).data, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-3, atol=1e-4)


def test_peft_cannot_convert_stacks_to_lora_and_says_so() -> None:
    with pytest.raises(TypeError, match=r"do not support LoRA conversion.*ParamWrapper"):
        convert_to_lora(adapt(build(), both(init_weights=False)), rank=4)


@each_family
def test_unload_gives_the_base_model_back(family: str) -> None:
    base = build(family)
    before, expected = dict(base.named_parameters()), logits(base)
    unloaded = adapt(base, both(family, init_weights=False)).unload()
    after = dict(unloaded.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is parameter for name, parameter in before.items())
    assert torch.equal(logits(unloaded), expected)


def test_safe_merge_refuses_broken_offsets_and_changes_nothing() -> None:
    base = build()
    before = copy.deepcopy(base)
    model = adapt(base, both(init_weights=False))
    wrappers(model)["model.layers.0.mlp.experts.gate_up_proj"].svf_offset["default"].weight.data[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"^NaNs detected in the merged weights"):
        wrappers(model)["model.layers.0.mlp.experts.gate_up_proj"].merge(safe_merge=True)
    for name, layer in wrappers(model).items():
        assert torch.equal(layer.get_param(), before.get_parameter(name)) and not layer.merged


# mixtures and mixed batches


@pytest.mark.parametrize("residual", [True, False])
def test_weighted_adapters_are_the_sum_of_singular_values(residual: bool) -> None:
    base = build(dtype=torch.float64)
    before = copy.deepcopy(base)
    model = adapt(base, both(target_modules=["q_proj"], rank=7, init_weights=False), "a")
    add(model, "b", both(init_weights=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.base_model.add_weighted_adapter(["a", "b"], [0.5, 2.0], "mix", residual=residual)
    model.set_adapter("mix")
    offsets = {}
    for name, layer in wrappers(model).items():
        a = nn.functional.pad(layer.offset("a"), (0, 9)).detach().double()
        offsets[name] = 0.5 * a + 2.0 * layer.offset("b").detach().double() + (0 if residual else 1.5)
        torch.testing.assert_close(layer.offset("mix").double(), offsets[name], rtol=1e-6, atol=1e-6)
    expected = dense_copy(before, offsets)
    for name, module in model.base_model.model.named_modules():
        if isinstance(module, Linear):
            mixture = 0.5 * module.offset("a").double() + (0 if residual else 1.5)
            mixture = nn.functional.pad(mixture, (0, 16 - len(mixture)), value=0 if residual else 1.5).detach()
            weight = expected.get_submodule(name).weight
            weight.data = two_sided(weight.data[None], mixture[None])[0]
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-6, atol=1e-6)


def test_mixed_batches_are_refused_with_the_name_of_the_parameter() -> None:
    model = adapt(build(), both(init_weights=False))
    message = (
        r"svf\.ParamWrapper does not support mixed adapter batches yet: 'model\.layers\.0\.mlp\.experts\.down_proj'"
    )
    with pytest.raises(ValueError, match=message):
        model(input_ids=IDS, adapter_names=["default", "__base__"])
    with pytest.raises(ValueError, match=message):
        model.generate(input_ids=IDS, adapter_names=["default", "__base__"], max_new_tokens=2)
    assert torch.isfinite(logits(model)).all()


# checkpoints


def load_with_peft(base: PreTrainedModel, path: Path) -> nn.Module:
    return PeftModel.from_pretrained(base, path)


def load_with_peft_in_low_memory(base: PreTrainedModel, path: Path) -> nn.Module:
    return PeftModel.from_pretrained(base, path, low_cpu_mem_usage=True)


def load_with_transformers(base: PreTrainedModel, path: Path) -> nn.Module:
    base.load_adapter(str(path))
    return base


def load_after_another(base: PreTrainedModel, path: Path) -> nn.Module:
    family = "llama4" if base.config.model_type.startswith("llama4") else "mixtral"
    model = adapt(base, both(family, init_weights=False), "other", seed=5)
    model.load_adapter(path, "second")
    model.set_adapter("second")
    return model


@each_family
@pytest.mark.parametrize(
    "load", [load_with_peft, load_with_peft_in_low_memory, load_with_transformers, load_after_another]
)
@pytest.mark.parametrize("settings", [{}, {"target_modules": ["q_proj"], "rank": 3}], ids=["experts", "and modules"])
def test_saved_adapters_load_with_equal_logits(family: str, load: Callable, settings: dict, tmp_path: Path) -> None:
    model = adapt(build(family), both(family, init_weights=False, **settings))
    expected = logits(model)
    assert not torch.allclose(expected, logits(build(family)))
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this adapter|Found missing adapter keys")
        loaded = load(build(family), tmp_path).eval()
    assert torch.equal(logits(loaded), expected)


def test_the_checkpoint_holds_float32_offsets_under_stable_names(tmp_path: Path) -> None:
    model = adapt(build(dtype=torch.bfloat16), both(init_weights=False), "a")
    add(model, "b", both(init_weights=False, target_parameters=["experts.gate_up_proj", "mlp.experts.down_proj"]))
    model.save_pretrained(tmp_path)
    prefix = "base_model.model.model.layers"
    for adapter in ("a", "b"):
        tensors = load_file(tmp_path / adapter / "adapter_model.safetensors")
        expected = {}
        for layer in (0, 1):  # the parameters of one module are nested in its own order, the first one innermost
            own = {n: w for n, w in wrappers(model).items() if f"layers.{layer}." in n}
            for suffix, parameter in (("", "down_proj"), ("base_layer.", "gate_up_proj")):
                offset = own[f"model.layers.{layer}.mlp.experts.{parameter}"].svf_offset[adapter].weight
                expected[f"{prefix}.{layer}.mlp.experts.{suffix}svf_offset.weight"] = offset.detach()
        assert tensors.keys() == expected.keys()
        assert all(tensors[key].dtype == torch.float32 and torch.equal(tensors[key], expected[key]) for key in tensors)


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("load", [load_with_peft, load_with_peft_in_low_memory, load_with_transformers])
def test_bases_saved_with_the_adapter_are_those_that_are_used(
    load: Callable, rank: int | None, tmp_path: Path
) -> None:
    model = adapt(build(), both(init_weights=False, save_basis=True, rank=rank))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {tensor.shape for key, tensor in saved.items() if key.endswith(".vectors")} == {(EXPERTS, 16, rank or 16)}
    base = build()
    for name, parameter in base.named_parameters():
        if ".experts." in name:  # close enough to be a quantization, but its basis would be another one
            parameter.data += 0.01 * torch.randn_like(parameter) * parameter.std()
    loaded = load(base, tmp_path).eval()
    assert not torch.equal(logits(loaded), expected)
    for name, layer in wrappers(loaded).items():
        assert torch.equal(layer.svf_basis, wrappers(model)[name].svf_basis)
        assert torch.equal(layer.svf_singular_values, wrappers(model)[name].svf_singular_values)
        layer.get_param().data = wrappers(model)[name].get_param().data
    assert torch.equal(logits(loaded), expected)


def test_a_saved_basis_of_another_shape_is_refused(tmp_path: Path) -> None:
    adapt(build(), both(init_weights=False, save_basis=True)).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "layers.1.mlp.experts." in key and key.endswith(".vectors"))
    tensors[key] = tensors[key][0].contiguous()
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\S*' has shape \(16, 16\).*\(4, 16, 16\)"):
        PeftModel.from_pretrained(build(), tmp_path)


def test_bases_can_come_from_the_checkpoint_before_rounding(tmp_path: Path) -> None:
    base = build("gpt_oss")
    base.save_pretrained(tmp_path)
    config = both("gpt_oss", basis_source=str(tmp_path))
    rounded, exact = adapt(build("gpt_oss", dtype=torch.bfloat16), config), adapt(base, both("gpt_oss"))
    for name, layer in wrappers(rounded).items():
        assert layer.svf_sketch == wrappers(exact)[name].svf_sketch
        assert torch.equal(layer.svf_singular_values, wrappers(exact)[name].svf_singular_values)


# the right base


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    base = build()
    base.name_or_path = "someone/base"
    adapt(base, both(init_weights=False)).save_pretrained(tmp_path)
    return tmp_path


def test_the_fingerprint_has_seven_numbers_for_each_parameter(saved: Path) -> None:
    fingerprint = json.loads((saved / "adapter_config.json").read_text())["base_fingerprint"]
    assert set(fingerprint) == set(wrappers(adapt(build(), both())))
    for name, sketch in fingerprint.items():
        weight = build().get_parameter(name).data.double()
        assert len(sketch) == 7 and sketch[:2] == [weight.shape[0] * weight.shape[1], weight.shape[2]]
        assert sketch[2] == pytest.approx(float(weight.norm()), rel=1e-12)


def test_another_base_is_refused_before_anything_changes(saved: Path) -> None:
    for base in (build(seed=1), build("qwen3_moe"), build("gpt_oss")):
        expected = logits(base)
        with pytest.raises(
            ValueError, match=r"another base model: 'model\.layers\.\d\.mlp.*; load it onto 'someone/base'"
        ):
            PeftModel.from_pretrained(base, saved)
        assert not wrappers(base) and torch.equal(logits(base), expected)


@pytest.mark.parametrize("change", ["one expert is another", "two experts are swapped", "one expert is 10 % off"])
def test_a_change_in_one_expert_is_found(saved: Path, change: str) -> None:
    base = build()
    weight = base.model.layers[1].mlp.experts.down_proj.data
    if change == "one expert is another":
        weight[3] = weight[0]
    elif change == "two experts are swapped":
        weight[[0, 1]] = weight[[1, 0]]
    else:
        weight[2] += (
            0.1 * weight[2].norm() * torch.randn(16, 24, generator=torch.Generator().manual_seed(0)) / 384**0.5
        )
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.experts\.down_proj' differs by"):
        PeftModel.from_pretrained(base, saved)


def test_a_rounded_base_gives_a_warning(saved: Path) -> None:
    with pytest.warns(UserWarning, match=r"slightly different weights.*experts"):
        PeftModel.from_pretrained(build(dtype=torch.bfloat16), saved)


def test_a_second_adapter_is_checked_while_another_one_is_merged(saved: Path) -> None:
    expected = logits(PeftModel.from_pretrained(build(), saved))
    model = PeftModel.from_pretrained(build(), saved, "first")
    model.merge_adapter()
    model.load_adapter(saved, "second")
    model.set_adapter("second")
    assert torch.equal(logits(model), expected)


# what cannot be


@pytest.mark.parametrize("fill", [0.0, float("nan")])
def test_an_expert_without_singular_basis_is_named_and_nothing_changes(fill: float) -> None:
    base = build()
    base.model.layers[1].mlp.experts.down_proj.data[2] = fill
    before, modules = dict(base.named_parameters()), dict(base.named_modules())
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.experts\.down_proj': in expert 2 of 4, the weight"):
        get_peft_model(base, both(target_modules=["q_proj"]))
    assert dict(base.named_modules()) == modules
    assert all(p is before[name] for name, p in base.named_parameters()) and len(before) == len(
        list(base.parameters())
    )


def test_a_failing_second_adapter_leaves_the_first_as_it_was() -> None:
    base = build()
    model = adapt(base, both(target_parameters=["0.mlp.experts.gate_up_proj"], init_weights=False), "first")
    expected, modules = logits(model), dict(model.named_modules())
    base.model.layers[1].mlp.experts.gate_up_proj.data[0] = 0
    zeroed = logits(model)
    with pytest.raises(ValueError, match="in expert 0 of 4, the weight is zero"):
        model.add_adapter("second", both(target_parameters=["mlp.experts.gate_up_proj"]))
    assert dict(model.named_modules()) == modules and list(model.peft_config) == ["first"]
    assert torch.equal(logits(model), zeroed) and not torch.equal(zeroed, expected)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["mlp.experts.gate_up_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
        (["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], ["mlp.experts.down_proj"]),
        (["mlp.experts.gate_up_proj"], ["mlp.experts.down_proj"]),
    ],
    ids=["more", "fewer", "others"],
)
def test_adapters_must_agree_on_the_parameters_of_a_module(first: list[str], second: list[str]) -> None:
    model = adapt(build(), both(target_parameters=first, init_weights=False), "first")
    expected, modules = logits(model), dict(model.named_modules())
    with pytest.raises(
        ValueError, match=r"all adapters must target the same set of parameters of 'model\.layers\.0\.mlp"
    ):
        model.add_adapter("second", both(target_parameters=second))
    assert dict(model.named_modules()) == modules and torch.equal(logits(model), expected)


class Odd(nn.Module):
    """Parameters that have no singular basis."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.ones(8))
        self.four = nn.Parameter(torch.ones(2, 2, 2, 2))
        self.bytes = nn.Parameter(torch.ones(4, 4, dtype=torch.uint8), requires_grad=False)
        self.tied = nn.Parameter(torch.randn(4, 4))
        self.computed = nn.Parameter(torch.randn(4, 4))
        nn.utils.parametrize.register_parametrization(self, "computed", nn.Tanh())


@pytest.mark.parametrize(
    ("parameter", "reason"),
    [
        ("vector", r"of shape \(8,\): only matrices and stacks of matrices"),
        ("four", r"of shape \(2, 2, 2, 2\): only matrices"),
        ("bytes", r"of dtype torch\.uint8: load the base model with these weights in a floating-point dtype"),
        ("tied", r"because it is tied, with the modules \['odd', 'twin'\]"),
        ("computed", r"because `torch\.nn\.utils\.parametrize` computes it"),
    ],
)
def test_parameters_without_a_singular_basis_are_refused_by_name(parameter: str, reason: str) -> None:
    model = nn.Module()
    model.odd, model.twin = Odd(), nn.Linear(4, 4)
    model.twin.weight = model.odd.tied
    if parameter != "computed":
        nn.utils.parametrize.remove_parametrizations(model.odd, "computed")
    modules = dict(model.named_modules())
    config = SVFConfig(target_modules=None, target_parameters=[f"odd.{parameter}"])
    with pytest.raises(ValueError, match=rf"'odd\.{parameter}' {reason}.*exclude_modules=\['odd\.{parameter}'\]"):
        inject_adapter_in_model(config, model)
    assert dict(model.named_modules()) == modules


def test_a_weight_that_is_read_without_its_module_is_refused() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    config = SVFConfig(target_modules=None, target_parameters=["out_proj.weight"])
    with pytest.raises(ValueError, match=r"'attention\.out_proj\.weight' because MultiheadAttention reads its weight"):
        inject_adapter_in_model(config, model)


def test_two_ways_of_adapting_one_weight_are_refused() -> None:
    def linear() -> nn.Module:
        return nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})

    by_parameter = SVFConfig(target_modules=None, target_parameters=["a.weight"])
    model = inject_adapter_in_model(by_parameter, linear(), "first")
    with pytest.raises(
        ValueError, match="'a' because an adapter with `target_parameters` adapts its parameter already"
    ):
        inject_adapter_in_model(SVFConfig(target_modules=["a", "b"]), model, "second")
    assert set(wrappers(model)) == {"a.weight"} and isinstance(model["b"], nn.Linear)

    model = inject_adapter_in_model(SVFConfig(target_modules=["a"]), linear(), "first")
    with pytest.raises(ValueError, match="not a valid target"):
        inject_adapter_in_model(by_parameter, model, "second")

    lora = LoraConfig(target_modules=[], target_parameters=["a.weight"])
    model = inject_adapter_in_model(lora, linear(), "lora")
    with pytest.raises(ValueError, match=r"'a\.weight' because an adapter of another method is on it"):
        inject_adapter_in_model(by_parameter, model, "svf")


def test_an_offloaded_parameter_is_an_error_rather_than_the_base_model() -> None:
    model = adapt(build(), both(init_weights=False))
    experts = wrappers(model)["model.layers.0.mlp.experts.down_proj"].get_base_layer()
    experts.down_proj = nn.Parameter(experts.down_proj.to("meta"))
    with pytest.raises(RuntimeError, match=r"'model\.layers\.0\.mlp\.experts\.down_proj' is offloaded"):
        logits(model)
