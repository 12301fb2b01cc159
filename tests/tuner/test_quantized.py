"""SVF on quantized base models: bitsandbytes on the CPU, and a stand-in for formats that cannot be dequantized."""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import peft.utils.other
import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import quantization_utils, resolve_quantization_backend
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from peft_svf import SVFConfig
from peft_svf.tuner import SVFLayer


bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed, so there are no quantized layers")
from bitsandbytes.functional import (  # noqa: E402
    _convert_weight_packed_for_cpu,
    _convert_weight_packed_for_cpu_inverse,
    dequantize_4bit,
)


# Sizes that bitsandbytes can pack for its CPU kernel: rows in blocks of 32, columns in blocks of 64.
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
IDS = torch.randint(3, 97, (4, 12), generator=torch.Generator().manual_seed(0))
EIGHT_BIT, FOUR_BIT = ["int8"], ["nf4", "nf4 double", "nf4 in bfloat16", "fp4", "fp4 double"]
KINDS = EIGHT_BIT + FOUR_BIT
SOME_KINDS = ["int8", "nf4", "fp4 double"]  # where a whole model is built
Build = Callable[..., LlamaForCausalLM]


def quantized_layer(linear: nn.Linear, kind: str) -> nn.Module:
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    if kind == "int8":
        layer = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
    else:
        quant_type, *flags = kind.split()
        storage = torch.bfloat16 if "bfloat16" in flags else torch.uint8  # what FSDP needs to shard the weight
        layer = bnb.nn.Linear4bit(
            *sizes, quant_type=quant_type, compress_statistics="double" in flags, quant_storage=storage
        )
    layer.weight.data, layer.bias = linear.weight.data.clone(), linear.bias
    return layer.to("cpu")  # quantizes


def quantize(model: LlamaForCausalLM, kind: str) -> LlamaForCausalLM:
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, quantized_layer(module, kind))
    return model.eval()


@pytest.fixture
def quantized(tiny_llama: Build) -> Callable[[str], LlamaForCausalLM]:
    """Builds a random Llama, always the same, quantized in one of KINDS: `quantized(kind)`."""
    return lambda kind: quantize(tiny_llama(**SIZES), kind)


def logits(model: nn.Module) -> torch.Tensor:
    # Training mode, because in eval mode bitsandbytes changes 4-bit weights on some CPUs; there is no dropout here.
    with torch.no_grad():
        return model.train()(IDS).logits


def adapted(model: nn.Module) -> dict[str, SVFLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SVFLayer)}


def randomize(model: nn.Module, std: float = 0.3, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "svf_offset" in name:
                parameter.normal_(std=std, generator=generator)
    return model


def dequantized(layer: nn.Module) -> torch.Tensor:
    """The weight in float64, by bitsandbytes' own functions."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(torch.float64)
    scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
    return layer.weight.data.to(torch.float64) * scales.to(torch.float64).unsqueeze(1) / 127


def changed_weight(weight: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """U Σ diag(1 + offset) Vᵀ."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    return (u * (s * (1 + offset.to(torch.float64)))) @ vh


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# bitsandbytes: forward, training, saving


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_offset_zero_is_the_quantized_base_bit_for_bit(quantized: Callable[..., Any], kind: str) -> None:
    expected = logits(quantized(kind))
    model = get_peft_model(quantized(kind), SVFConfig())
    assert len(adapted(model)) == 7
    assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(randomize(model)), expected)


@pytest.mark.parametrize(
    "shape", [(64, 64), (32, 64), (128, 64), (64, 128)], ids=lambda shape: f"{shape[0]}x{shape[1]}"
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_the_formula_of_its_dequantized_weight(kind: str, bias: bool, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias=bias)
    layer = quantized_layer(linear, kind)
    weight = dequantized(layer)
    model = randomize(get_peft_model(nn.Sequential(layer), SVFConfig(target_modules=["0"])), std=0.5)
    offset = adapted(model)["base_model.model.0"].svf_offset["default"].weight.detach()
    x = torch.randn(16, shape[1])
    expected = x.double() @ changed_weight(weight, offset).T + (linear.bias.double() if bias else 0)
    # 8-bit layers quantize their inputs too.
    tolerance = 2e-2 if kind == "int8" else 1e-5
    with torch.no_grad():
        assert difference(model(x), expected) < tolerance
        assert difference(layer(x), expected) > 0.1


@pytest.mark.parametrize("kind", SOME_KINDS)
def test_training_moves_only_the_offsets_and_lowers_the_loss(quantized: Callable[..., Any], kind: str) -> None:
    model = get_peft_model(quantized(kind), SVFConfig(task_type="CAUSAL_LM")).train()
    weights = {name: parameter.data.clone() for name, parameter in model.named_parameters() if "base_layer" in name}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(8):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(p.data, weights[name]) for name, p in model.named_parameters() if name in weights)
    offsets = [layer.svf_offset["default"].weight for layer in adapted(model).values()]
    assert all(offset.dtype == torch.float32 and offset.abs().max() > 1e-2 for offset in offsets)


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_gradients_are_those_of_the_formula(kind: str) -> None:
    torch.manual_seed(0)
    layer = quantized_layer(nn.Linear(64, 128), kind)
    weight, bias = dequantized(layer), layer.bias.detach().double()
    model = randomize(get_peft_model(nn.Sequential(layer), SVFConfig(target_modules=["0"])))
    parameter = adapted(model)["base_model.model.0"].svf_offset["default"].weight
    x, target = torch.randn(16, 64), torch.randn(16, 128)
    ((model(x) - target) ** 2).sum().backward()
    offset = parameter.detach().double().requires_grad_()
    (((x.double() @ changed_weight(weight, offset).T + bias) - target.double()) ** 2).sum().backward()
    assert difference(parameter.grad, offset.grad) < 1e-5


@pytest.mark.parametrize("save_basis", [False, True])
@pytest.mark.parametrize("load", ["PeftModel", "low_cpu_mem_usage", "transformers"])
@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4 in bfloat16"])
def test_a_saved_expert_loads_onto_the_quantized_base_with_equal_logits(
    quantized: Callable[..., Any], tmp_path: Path, kind: str, load: str, save_basis: bool
) -> None:
    model = randomize(get_peft_model(quantized(kind), SVFConfig(task_type="CAUSAL_LM", save_basis=save_basis)))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    base = quantized(kind)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this adapter")
        if load == "transformers":
            base.load_adapter(str(tmp_path))
            loaded = base
        else:
            loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=load == "low_cpu_mem_usage")
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_8bit": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    ],
    ids=["int8", "nf4", "fp4 double"],
)
def test_a_trained_model_that_transformers_quantized_while_loading_it(
    stories_path: str, stories_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, settings: dict[str, Any]
) -> None:
    def load_base() -> Any:
        return AutoModelForCausalLM.from_pretrained(stories_path, quantization_config=BitsAndBytesConfig(**settings))

    text = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    ids = stories_tokenizer(text, return_tensors="pt").input_ids
    model = get_peft_model(load_base(), SVFConfig(task_type="CAUSAL_LM")).train()
    assert all(layer.quantization_backend is not None for layer in adapted(model).values())
    before = model(ids, labels=ids).loss
    with model.disable_adapter():
        assert torch.equal(model(ids, labels=ids).loss, before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model(ids, labels=ids).loss
    assert after < before - 0.1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load_base(), tmp_path).train()
    assert torch.equal(loaded(ids, labels=ids).loss, after)


# bitsandbytes: merging


MERGE_ERROR = {kind: {"int8": 2e-2, "nf4": 0.15, "fp4": 0.2}[kind.split()[0]] for kind in KINDS}


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_quantizes_the_changed_weight(quantized: Callable[..., Any], kind: str, safe_merge: bool) -> None:
    model = randomize(get_peft_model(quantized(kind), SVFConfig()), std=0.5)
    weights = {name: dequantized(layer.get_base_layer()) for name, layer in adapted(model).items()}
    model.merge_adapter(safe_merge=safe_merge)
    for name, layer in adapted(model).items():
        expected = changed_weight(weights[name], layer.svf_offset["default"].weight.detach())
        merged = layer.get_base_layer()
        assert type(merged) in (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit)
        assert difference(dequantized(merged), expected) < MERGE_ERROR[kind]
        assert difference(weights[name], expected) > 0.3
    unloaded = model.merge_and_unload()
    assert not adapted(unloaded) and type(unloaded.model.layers[0].mlp.up_proj) is type(merged)


def quantized_state(layer: nn.Module) -> list[torch.Tensor]:
    """Everything that says what a quantized layer computes."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return [layer.weight.data, *layer.weight.quant_state.as_dict(packed=True).values()]
    return [layer.weight.data, layer.weight.SCB if layer.state.SCB is None else layer.state.SCB]


@pytest.mark.parametrize("forward_before", [False, True])
@pytest.mark.parametrize("kind", SOME_KINDS)
def test_unmerging_brings_the_quantized_weights_back_bit_for_bit(
    quantized: Callable[..., Any], kind: str, forward_before: bool
) -> None:
    expected = logits(randomize(get_peft_model(quantized(kind), SVFConfig())))
    model = randomize(get_peft_model(quantized(kind), SVFConfig()))
    model.add_adapter("other", SVFConfig(init_weights=False))
    if forward_before:  # bitsandbytes moves its 8-bit scales from the weight to the layer
        assert torch.equal(logits(model), expected)
    layers = adapted(model)
    before = {name: [t.clone() for t in quantized_state(layer.get_base_layer())] for name, layer in layers.items()}
    parameters = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    for names in (["default"], ["other"], ["default", "other"]):
        model.merge_adapter(names)
        assert not torch.equal(logits(model), expected)
        model.unmerge_adapter()
        for name, layer in layers.items():
            assert layer.get_base_layer().weight is parameters[name]
            after = quantized_state(layer.get_base_layer())
            assert all(torch.equal(a, b) for a, b in zip(after, before[name], strict=True))
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", ["int8", "nf4 double"])
def test_a_merge_on_top_of_a_merge_starts_from_the_original_weight(quantized: Callable[..., Any], kind: str) -> None:
    at_once, one_by_one = (get_peft_model(quantized(kind), SVFConfig(), "a") for _ in range(2))
    for model in (at_once, one_by_one):
        model.add_adapter("b", SVFConfig())
        randomize(model)
    expected = logits(one_by_one)
    at_once.merge_adapter(["a", "b"])
    one_by_one.merge_adapter(["a"])
    one_by_one.merge_adapter(["b"])
    assert torch.equal(logits(one_by_one), logits(at_once))
    one_by_one.unmerge_adapter()
    assert torch.equal(logits(one_by_one), expected)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_merged_model_may_be_copied_moved_and_saved(
    quantized: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    model = randomize(get_peft_model(quantized(kind), SVFConfig(save_basis=True)))
    expected = logits(model)
    model.merge_adapter()
    twin = copy.deepcopy(model).to("cpu")
    assert torch.equal(logits(twin), logits(model))
    twin.save_pretrained(tmp_path, save_embedding_layers=False)
    assert torch.equal(logits(PeftModel.from_pretrained(quantized(kind), tmp_path)), expected)
    for merged in (twin, model):  # independent of each other
        merged.unmerge_adapter()
        assert torch.equal(logits(merged), expected)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: bnb.nn.Linear4bit(64, 64),
        lambda: bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False),
    ],
    ids=["4 bits", "8 bits"],
)
def test_a_weight_that_is_not_quantized_yet_is_refused(layer: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"SVF cannot adapt '0': its weight is not quantized yet; move the model"):
        get_peft_model(nn.Sequential(layer()), SVFConfig(target_modules=["0"]))


def test_an_8_bit_layer_with_weights_of_16_bits_has_their_basis() -> None:
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=True)
    expected = layer.weight.detach().double()
    model = randomize(get_peft_model(nn.Sequential(layer.to("cpu")), SVFConfig(target_modules=["0"])), std=0.5)
    offset = adapted(model)["base_model.model.0"].svf_offset["default"].weight.detach()
    x = torch.randn(16, 64)
    with torch.no_grad():
        assert difference(model(x), x.double() @ changed_weight(expected, offset).T + layer.bias.double()) < 2e-2


def test_a_broken_adapter_is_not_merged(quantized: Callable[..., Any]) -> None:
    model = get_peft_model(quantized("nf4"), SVFConfig())
    expected = logits(model)
    for layer in adapted(model).values():
        layer.svf_offset["default"].weight.data[3] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_adapter(safe_merge=True)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


# bitsandbytes: 4-bit weights that are packed for its CPU kernel, as AVX512-BF16 machines do in the first eval forward


def pack(model: nn.Module) -> None:
    """What the first forward in eval mode does where `Linear4bit.support_avx512bf16_for_cpu` is true."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.weight.data, state = _convert_weight_packed_for_cpu(module.weight.data, module.weight.quant_state)
            assert state is module.weight.quant_state and state.packing_format_for_cpu


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_packing_is_what_the_first_eval_forward_does(quantized: Callable[..., Any], kind: str) -> None:
    packed, forwarded = quantized(kind), quantized(kind)
    pack(packed)
    layers = [
        (a, b) for a, b in zip(packed.modules(), forwarded.modules(), strict=True) if isinstance(a, bnb.nn.Linear4bit)
    ]
    for by_pack, by_forward in layers:
        by_forward.support_avx512bf16_for_cpu = True
        with torch.no_grad():
            by_forward(torch.randn(2, by_forward.in_features))
        assert torch.equal(by_pack.weight.data, by_forward.weight.data)
        assert torch.equal(by_pack.weight.quant_state.absmax, by_forward.weight.quant_state.absmax)


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_the_basis_of_a_packed_weight_is_that_of_the_unpacked_one(quantized: Callable[..., Any], kind: str) -> None:
    base = quantized(kind)
    weights = {name: dequantized(m) for name, m in base.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    pack(base)
    states = {name: copy.deepcopy(vars(base.get_submodule(name).weight.quant_state)) for name in weights}
    model = randomize(get_peft_model(base, SVFConfig()))
    for name, weight in weights.items():
        layer = base.get_submodule(name)
        packed = layer.get_base_layer()
        # What PEFT and bitsandbytes make of the packed weight; here the scales are rounded to bfloat16, no more.
        assert difference(layer.quantization_backend.get_base_weight(packed), weight) > 1
        assert difference(layer.get_base_weight(), weight) < 3e-3
        offset = layer.svf_offset["default"].weight.detach()
        assert difference(layer.get_delta_weight("default"), changed_weight(weight, offset) - weight) < 0.3
        for key, value in states[name].items():  # the layer still runs from its packed weight
            left = vars(packed.weight.quant_state)[key]
            assert torch.equal(left, value) if isinstance(value, torch.Tensor) else key == "state2" or left == value
    assert len(adapted(model)) == len(weights) == 7


def test_why_bitsandbytes_own_way_back_is_not_used(quantized: Callable[..., Any]) -> None:
    """It leaves the scales transposed if they were not quantized. When this fails, it could be used."""
    layer = quantized("nf4").model.layers[0].mlp.down_proj
    weight = dequantized(layer)
    pack(layer)
    data, state = _convert_weight_packed_for_cpu_inverse(layer.weight.data, copy.copy(layer.weight.quant_state))
    assert difference(dequantize_4bit(data, state), weight) > 0.05


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_merging_into_packed_weights_and_back(quantized: Callable[..., Any], kind: str) -> None:
    model = randomize(get_peft_model(quantized(kind), SVFConfig()))
    weights = {name: dequantized(layer.get_base_layer()) for name, layer in adapted(model).items()}
    pack(model)
    before = {name: layer.get_base_layer().weight.data.clone() for name, layer in adapted(model).items()}
    model.merge_adapter()
    for name, layer in adapted(model).items():
        merged = layer.get_base_layer()
        expected = changed_weight(weights[name], layer.svf_offset["default"].weight.detach())
        assert difference(dequantized(merged), expected) < MERGE_ERROR[kind]
    pack(model)  # an eval forward of the merged model
    for name, layer in adapted(model).items():
        assert difference(layer.unmerged_weight(), weights[name]) < 3e-3
    model.unmerge_adapter()
    for name, layer in adapted(model).items():
        assert torch.equal(layer.get_base_layer().weight.data, before[name])
        assert layer.get_base_layer().weight.quant_state.packing_format_for_cpu
        assert difference(layer.get_base_weight(), weights[name]) < 3e-3


def test_an_expert_meets_a_packed_base_with_a_warning_about_its_rounding(
    quantized: Callable[..., Any], tmp_path: Path
) -> None:
    get_peft_model(quantized("nf4"), SVFConfig(init_weights=False)).save_pretrained(tmp_path)
    base = quantized("nf4")
    pack(base)
    with pytest.warns(UserWarning, match=r"slightly different weights.*difference is \d\.\de-03"):
        PeftModel.from_pretrained(base, tmp_path)


# An expert of the unquantized model on a quantized one


@pytest.fixture
def expert(tiny_llama: Build, tmp_path: Path) -> tuple[torch.Tensor, Path, Path]:
    """Logits and folder of an expert for the unquantized model, and the folder of that model."""
    base = tiny_llama(**SIZES)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = str(tmp_path / "base")
    model = randomize(get_peft_model(base, SVFConfig(task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path / "expert", save_embedding_layers=False)
    return logits(model), tmp_path / "expert", tmp_path / "base"


@pytest.mark.parametrize("kind", FOUR_BIT)
def test_four_bits_are_refused_with_the_remedy_and_the_remedy_works(
    quantized: Callable[..., Any], expert: tuple[torch.Tensor, Path, Path], kind: str
) -> None:
    expected, path, base_path = expert
    base = quantized(kind)
    message = (
        r"trained on other weights than those of this quantized model: '\S+_proj' differs by \de?.*of its norm; take "
        r"the singular bases from the unquantized weights: load the adapter with "
        rf"`config=SVFConfig\.from_pretrained\(<adapter>, basis_source='{re.escape(str(base_path))}'\)`"
    )
    with pytest.raises(ValueError, match=message) as caught:
        PeftModel.from_pretrained(base, path)
    assert "\n" not in str(caught.value) and not adapted(base)
    config = SVFConfig.from_pretrained(path, basis_source=str(base_path))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this adapter")
        model = PeftModel.from_pretrained(base, path, config=config)
    recomputed = PeftModel.from_pretrained(quantized(kind), path, config=without_fingerprint(path))
    source_error, recomputed_error = difference(logits(model), expected), difference(logits(recomputed), expected)
    assert source_error < 0.7 * recomputed_error


def without_fingerprint(path: Path) -> PeftConfig:
    config = PeftConfig.from_pretrained(path)
    config.base_fingerprint, config.compares_base = None, False
    return config


def test_eight_bits_are_a_warning_with_the_remedy(
    quantized: Callable[..., Any], expert: tuple[torch.Tensor, Path, Path]
) -> None:
    expected, path, base_path = expert
    with pytest.warns(UserWarning, match=r"difference is \d\.\de-0[32].*, or take the singular bases from the unq"):
        recomputed = PeftModel.from_pretrained(quantized("int8"), path)
    config = SVFConfig.from_pretrained(path, basis_source=str(base_path))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this adapter")
        model = PeftModel.from_pretrained(quantized("int8"), path, config=config)
    source_error, recomputed_error = difference(logits(model), expected), difference(logits(recomputed), expected)
    assert source_error < 0.7 * recomputed_error


@pytest.mark.parametrize("rows", [64, 2048])
def test_the_thresholds_hold_for_long_rows(rows: int) -> None:
    """An 8-bit weight is a warning and a 4-bit weight an error, however long its rows are."""
    torch.manual_seed(0)
    base = nn.ModuleDict({str(i): nn.Linear(rows, 64, bias=False) for i in range(8)})
    config = SVFConfig(target_modules=r"\d+", rank=1)
    get_peft_model(copy.deepcopy(base), config)
    loaded = SVFConfig(target_modules=r"\d+", rank=1, base_fingerprint=config.base_fingerprint)

    def to(kind: str) -> nn.ModuleDict:
        return nn.ModuleDict({name: quantized_layer(layer, kind) for name, layer in base.items()})

    with pytest.warns(UserWarning, match="slightly different weights"):
        get_peft_model(to("int8"), loaded)
    for kind in FOUR_BIT:
        with pytest.raises(ValueError, match="this quantized model"):
            get_peft_model(to(kind), loaded)


def test_an_expert_of_the_quantized_model_does_not_fit_the_unquantized_one(
    quantized: Callable[..., Any], expert: tuple[torch.Tensor, Path, Path], tmp_path: Path, tiny_llama: Build
) -> None:
    get_peft_model(quantized("nf4"), SVFConfig()).save_pretrained(tmp_path / "nf4", save_embedding_layers=False)
    with pytest.raises(ValueError, match=r"another base model.*in the dtype and quantization of the training$"):
        PeftModel.from_pretrained(tiny_llama(**SIZES), tmp_path / "nf4")
    config = SVFConfig.from_pretrained(tmp_path / "nf4", basis_source=str(expert[2]))
    with pytest.raises(
        ValueError, match=r"other weights than those of `basis_source='\S+'`: '\S+' differs by .*`None`"
    ):
        PeftModel.from_pretrained(quantized("nf4"), tmp_path / "nf4", config=config)


def test_bases_of_the_quantized_and_the_unquantized_weights_are_not_mixed(
    quantized: Callable[..., Any], expert: tuple[torch.Tensor, Path, Path]
) -> None:
    model = randomize(get_peft_model(quantized("nf4"), SVFConfig(), "first"))
    before = logits(model)
    config = SVFConfig.from_pretrained(expert[1], basis_source=str(expert[2]))
    with pytest.raises(ValueError, match=r"another singular basis than the adapters that the model already has"):
        model.add_adapter("second", config)
    assert torch.equal(logits(model), before)


def test_quantized_conv1d_layers_take_their_basis_from_a_checkpoint(tmp_path: Path) -> None:
    """transformers replaces them by layers that keep the weight the other way round than the checkpoint."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=1, n_head=2)).save_pretrained(
        tmp_path
    )

    def load(**settings: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path, **settings).eval()

    expected = adapted(get_peft_model(load(), SVFConfig()))
    base = load(quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    layers = adapted(get_peft_model(base, SVFConfig(basis_source=str(tmp_path))))
    assert len(layers) == 4 and all(isinstance(m.get_base_layer(), bnb.nn.Linear8bitLt) for m in layers.values())
    assert all(layer.svf_sketch == expected[name].svf_sketch for name, layer in layers.items())


# Formats that cannot be dequantized: GPTQ, AWQ, AQLM, EETQ, …


class OpaqueLinear(nn.Module):
    """Codes of four bits for groups of 16 inputs, which only the layer itself can read."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        groups = linear.weight.detach().view(linear.out_features, -1, 16)
        scales = groups.abs().amax(-1, keepdim=True) / 7
        self.register_buffer("qweight", torch.round(groups / scales).to(torch.int8))
        self.register_buffer("scales", scales)
        self.bias = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = (self.qweight * self.scales).view(self.out_features, self.in_features)
        return nn.functional.linear(x, weight.to(x.dtype))


@pytest.fixture
def opaque(tiny_llama: Build, monkeypatch: pytest.MonkeyPatch) -> Callable[[], LlamaForCausalLM]:
    """Builds the Llama with opaque layers, which PEFT takes for those of GPT-QModel."""
    for module in (quantization_utils, peft.utils.other):
        monkeypatch.setattr(module, "is_gptqmodel_available", lambda: True)
    for name in ("gptqmodel", "gptqmodel.nn_modules", "gptqmodel.nn_modules.qlinear"):
        stand_in = ModuleType(name)
        stand_in.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, stand_in)
    stand_in.BaseQuantLinear = OpaqueLinear

    def build() -> LlamaForCausalLM:
        model = tiny_llama(**SIZES)
        for name, module in list(model.named_modules()):
            if type(module) is nn.Linear and name != "lm_head":
                model.set_submodule(name, OpaqueLinear(module))
        layer = model.model.layers[0].mlp.up_proj
        assert isinstance(resolve_quantization_backend(layer), ForwardOnlyQuantizationBackend)
        return model

    return build


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_an_opaque_format_needs_a_basis_from_elsewhere(opaque: Callable[..., Any]) -> None:
    base = opaque()
    expected = logits(base)
    message = (
        r"SVF cannot adapt 'model\.layers\.0\.\S+': its weight, of type OpaqueLinear, cannot be dequantized; pass "
        r"`basis_source=<folder or Hub id of the unquantized base model>` to SVFConfig, or .*`save_basis=True`"
    )
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, SVFConfig(target_modules=TARGETS))
    assert not adapted(base) and torch.equal(logits(base), expected)


def test_an_expert_on_an_opaque_base_needs_a_basis_from_elsewhere(
    opaque: Callable[..., Any], expert: tuple[torch.Tensor, Path, Path]
) -> None:
    """The error is about the format; that the layers are "no linear layers" would be wrong."""
    with pytest.raises(ValueError, match=r"of type OpaqueLinear, cannot be dequantized; pass `basis_source="):
        PeftModel.from_pretrained(opaque(), expert[1])


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_all_linear_finds_opaque_layers(
    opaque: Callable[..., Any], expert: tuple[torch.Tensor, Path, Path], autocast_adapter_dtype: bool
) -> None:
    config = SVFConfig(basis_source=str(expert[2]))
    model = get_peft_model(opaque(), config, autocast_adapter_dtype=autocast_adapter_dtype)
    assert len(adapted(model)) == 7
    assert not any("lm_head" in name for name in adapted(model))


@pytest.mark.parametrize("bring", ["basis_source", "basis_source, transformers", "save_basis"])
def test_an_expert_runs_on_an_opaque_base(
    opaque: Callable[..., Any], expert: tuple[torch.Tensor, Path, Path], tmp_path: Path, tiny_llama: Build, bring: str
) -> None:
    expected, path, base_path = expert
    config = SVFConfig.from_pretrained(path, basis_source=str(base_path))
    if bring == "basis_source":
        model = PeftModel.from_pretrained(opaque(), path, config=config)
    elif bring == "basis_source, transformers":
        model = opaque()
        model.load_adapter(str(path), peft_config=config)
    else:
        with_basis = PeftModel.from_pretrained(tiny_llama(**SIZES), path)
        with_basis.peft_config["default"].save_basis = True
        with_basis.save_pretrained(tmp_path / "with basis", save_embedding_layers=False)
        model = PeftModel.from_pretrained(opaque(), tmp_path / "with basis")
    assert difference(logits(model), expected) < 0.6 * difference(logits(opaque()), expected)
    for name, layer in adapted(model).items():  # each layer alone, against the formula
        x = torch.randn(8, layer.in_features)
        weight = (layer.base_layer.qweight * layer.base_layer.scales).view(layer.out_features, -1).double()
        u, _, vh = torch.linalg.svd(tiny_llama(**SIZES).get_submodule(name.removeprefix("base_model.model.")).weight)
        offset = layer.svf_offset["default"].weight.detach().double()
        basis = (vh.T if layer.in_features <= layer.out_features else u).detach().double()
        update = basis * offset @ basis.T
        changed = weight + (weight @ update if layer.in_features <= layer.out_features else update @ weight)
        with torch.no_grad():
            assert difference(layer(x), x.double() @ changed.T) < 1e-4


def test_training_on_an_opaque_base_saves_an_expert_that_loads_again(
    opaque: Callable[..., Any], expert: tuple[torch.Tensor, Path, Path], tmp_path: Path
) -> None:
    config = SVFConfig(target_modules=TARGETS, basis_source=str(expert[2]), save_basis=True, task_type="CAUSAL_LM")
    model = get_peft_model(opaque(), config).train()
    assert torch.equal(logits(model), logits(opaque()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(8):
        losses.append(model(IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.5
    model.save_pretrained(tmp_path / "trained", save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(opaque(), tmp_path / "trained")
    assert torch.equal(logits(loaded), logits(model))
    by_transformers = opaque()
    by_transformers.load_adapter(str(tmp_path / "trained"))
    assert torch.equal(logits(by_transformers), logits(model))


@pytest.mark.parametrize("merge", [lambda m: m.merge_adapter(), lambda m: m.merge_and_unload(safe_merge=True)])
def test_an_opaque_weight_cannot_be_merged(
    opaque: Callable[..., Any], expert: tuple[torch.Tensor, Path, Path], merge: Callable[[PeftModel], None]
) -> None:
    config = SVFConfig(target_modules=TARGETS, basis_source=str(expert[2]), init_weights=False)
    model = get_peft_model(opaque(), config)
    expected = logits(model)
    message = r"cannot merge default into 'model\.layers\.0\.\S+': a weight in the format 'gptq' cannot be changed"
    with pytest.raises(TypeError, match=message):
        merge(model)
    assert torch.equal(logits(model), expected)


def test_an_opaque_layer_of_another_shape_is_refused(
    opaque: Callable[..., Any], tiny_llama: Build, tmp_path: Path
) -> None:
    other = tiny_llama(**{**SIZES, "intermediate_size": 96})
    config = SVFConfig(save_basis=True)
    get_peft_model(other, config).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.\S+' is 64×128 here and was 64×96 in training"):
        PeftModel.from_pretrained(opaque(), tmp_path)
