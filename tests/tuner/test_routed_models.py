"""Routes on models that are not plain: whole modules, experts, images, few bits, offloaded, compiled.

The reference is the same model with each row's mixture as an adapter of its own, made active, without any route.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)

from peft_svf import SVFConfig
from peft_svf.tuner.mixed_batch import MixedBatch


Build = Callable[..., LlamaForCausalLM]
IDS = torch.randint(3, 97, (4, 6), generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.tensor([[0.3, 0.7], [0.0, 0.0], [1.0, 0.0], [-0.5, 1.2]])
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def with_adapters(base: nn.Module, mixtures: bool = True, **settings: Any) -> PeftModel:
    """The model with the adapters "a" and "b", and for each row of `WEIGHTS` an adapter that is its mixture."""
    torch.manual_seed(1)
    model = get_peft_model(base, SVFConfig(init_weights=False, **settings), "a")
    model.add_adapter("b", SVFConfig(init_weights=False, **settings))
    for name, parameter in model.named_parameters():
        if ".svf_offset." in name:
            parameter.data.mul_(4)
        elif ".modules_to_save." in name or "trainable_tokens_delta" in name:
            parameter.data.add_(0.5 * torch.randn_like(parameter))
    for row, weights in enumerate(WEIGHTS.tolist() if mixtures else []):
        model.add_weighted_adapter(["a", "b"], weights, f"row{row}")
    model.set_adapter("b")
    return model.eval()


@torch.no_grad()
def row_by_row(model: PeftModel, **inputs: torch.Tensor) -> torch.Tensor:
    """The logits of the whole batch under the mixture of each row, and of these the row."""
    rows = []
    for row in range(4):
        model.set_adapter(f"row{row}")
        rows.append(model(input_ids=IDS, **inputs).logits[row])
    model.set_adapter("b")
    return torch.stack(rows)


@torch.no_grad()
def routed(model: nn.Module, batch: MixedBatch, peft_model: PeftModel | None = None, **inputs: Any) -> torch.Tensor:
    with (peft_model or model).base_model.routed(batch):
        return model(input_ids=IDS, **inputs).logits


def all_rows() -> MixedBatch:
    return MixedBatch(["a", "b"], WEIGHTS)


def uniform(row: int = 0) -> MixedBatch:
    """One mixture in every row, given row by row as a pipeline gives it."""
    return MixedBatch(["a", "b"], WEIGHTS[[row] * 4])


# Adapters with more than offsets


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 4, 5, 60]}], ids=str
)
@torch.no_grad()
def test_whole_modules_follow_one_hot_rows_and_refuse_mixtures(tiny_llama: Build, settings: dict[str, Any]) -> None:
    model = with_adapters(tiny_llama(), mixtures=False, **settings)
    model.add_adapter("plain", SVFConfig(init_weights=False))
    ids = IDS.clone()
    ids[:, 1], ids[:, 3] = 4, 60  # tokens whose embeddings the adapters trained
    rows = []
    for row, name in enumerate(["b", "a", "plain"]):
        model.set_adapter(name)
        rows.append(model(ids[row : row + 1]).logits)
    model.set_adapter("b")
    # A mixture that has none of their modules is fine: the last row
    weights = torch.tensor([[0, 1, 0], [1, 0, 0], [0, 0, 1.0], [0, 0, 0.5]])
    batch = MixedBatch(["a", "b", "plain"], weights)
    with model.base_model.routed(batch):
        found = model(ids).logits
        with model.disable_adapter(), pytest.raises(ValueError, match="within `disable_adapter`"):
            model(ids)
    torch.testing.assert_close(found[:3], torch.cat(rows), rtol=1e-4, atol=1e-4)
    for mixture in ([[0.5, 0.5, 0.0]] * 4, [[0.0, 0.5, 0.0]] * 4, [[1.0, 0.0, 0.5]] * 4):
        batch = MixedBatch(["a", "b", "plain"], torch.tensor(mixture))
        with (
            pytest.raises(ValueError, match=r"\(a, b: `modules_to_save`.*cannot be mixed"),
            model.base_model.routed(batch),
        ):
            pytest.fail("entered")
    assert not model.base_model.svf_batches.in_use and not any(m._forward_pre_hooks for m in model.modules())


# Mixture-of-experts models


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)).eval()


@torch.no_grad()
def test_fused_experts_take_any_route_whose_rows_are_alike() -> None:
    parameters = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
    model = with_adapters(mixtral(), target_modules=["q_proj"], target_parameters=parameters)
    model.add_adapter("attention", SVFConfig(init_weights=False, target_modules=["q_proj"]))
    model.set_adapter("row0")
    expected = model(IDS).logits
    generated = model.generate(IDS, num_beams=2, max_new_tokens=3, min_new_tokens=3)
    model.set_adapter("b")
    torch.testing.assert_close(routed(model, uniform()), expected, rtol=1e-4, atol=1e-5)
    with model.base_model.routed(uniform()):
        assert torch.equal(model.generate(IDS, num_beams=2, max_new_tokens=3, min_new_tokens=3), generated)
        with pytest.raises(ValueError, match="got 4 and 3"):
            model(IDS[:3])
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp\.experts\.[a-z_]*' is one parameter for all rows"):
        routed(model, all_rows())
    routed(model, MixedBatch.of_names(["attention", "__base__"] * 2))  # adapters that leave the experts alone mix


class Experts(nn.Module):
    """A layer with a list of experts, each of which sees the tokens routed to it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.linear(x).flatten(0, 1)
        first = flat[:, 0] > 0
        result = torch.empty_like(flat)
        result[first], result[~first] = self.experts[0](flat[first]), self.experts[1](flat[~first])
        return result.view_as(x)


@torch.no_grad()
def test_a_list_of_experts_takes_any_route_whose_rows_are_alike() -> None:
    torch.manual_seed(0)
    model = with_adapters(Experts(), target_modules=r"linear|experts\.\d")
    x = torch.randn(4, 6, 8)
    model.set_adapter("row0")
    expected = model(x)
    model.set_adapter("b")
    with model.base_model.routed(uniform()):
        torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match=r"adapts 'experts\.\d': it sees tokens routed to it, not rows"):
        model.base_model.routed(all_rows()).__enter__()


# Models that see images


def llava() -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=96)
    config.image_seq_length = 4
    return LlavaForConditionalGeneration(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_the_language_model_of_a_vision_language_model(settings: dict[str, Any]) -> None:
    """With two images in a row and none in another, so that images are no rows."""
    model = with_adapters(llava(), target_modules=r".*language_model.*(q|v|up|down)_proj|lm_head")
    ids = IDS.clone()
    ids[ids == 96] = 95
    ids = torch.cat([ids, torch.full((4, 8), 50)], 1)
    images = {0: 2, 2: 1, 3: 1}
    for row, count in images.items():
        ids[row, 6 : 6 + 4 * count] = 96
    pixels = torch.randn(4, 3, 8, 8)
    places = {0: slice(0, 2), 1: slice(0, 0), 2: slice(2, 3), 3: slice(3, 4)}
    settings = {**settings, "max_new_tokens": 3, "min_new_tokens": 3}
    rows = []
    for row, place in places.items():
        model.set_adapter(f"row{row}")
        own = {"pixel_values": pixels[place]} if row in images else {}
        rows.append(model.generate(input_ids=ids[row : row + 1], **own, **settings))
    model.set_adapter("b")
    if settings.get("num_beams"):  # transformers does not expand images that are not rows
        ids, pixels, rows = ids[2:], pixels[2:], rows[2:]
    with model.base_model.routed(MixedBatch(["a", "b"], WEIGHTS[-len(ids) :])):
        assert torch.equal(model.generate(input_ids=ids, pixel_values=pixels, **settings), torch.cat(rows))


@torch.no_grad()
def test_an_adapted_vision_tower_sees_images_not_rows() -> None:
    model = with_adapters(llava(), target_modules=r".*(vision_tower|multi_modal_projector).*(q_proj|linear_1)")
    ids = IDS.clone()
    ids[:, :4] = 96
    pixels = torch.randn(4, 3, 8, 8)
    model.set_adapter("row0")
    expected = model(input_ids=ids, pixel_values=pixels).logits
    model.set_adapter("b")
    with model.base_model.routed(uniform()):
        torch.testing.assert_close(model(input_ids=ids, pixel_values=pixels).logits, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="it sees images or sounds, not rows"), model.base_model.routed(all_rows()):
        pytest.fail("entered")


# Numbers of fewer bits, and weights that are elsewhere


def test_half_precision(tiny_llama: Build) -> None:
    model = with_adapters(tiny_llama().to(torch.bfloat16))
    expected, found = row_by_row(model), routed(model, all_rows())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=2e-1)
    assert (found[0] - found[3]).abs().max() > 1


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_models(tiny_llama: Build, kind: str) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    base = tiny_llama(hidden_size=64, intermediate_size=128, num_hidden_layers=1)
    for name, linear in list(base.named_modules()):
        if type(linear) is nn.Linear and name != "lm_head":
            settings = {"has_fp16_weights": False} if kind == "int8" else {"quant_type": "nf4"}
            make = bnb.nn.Linear8bitLt if kind == "int8" else bnb.nn.Linear4bit
            layer = make(linear.in_features, linear.out_features, False, **settings)
            layer.weight.data = linear.weight.data.clone()
            base.set_submodule(name, layer.to("cpu"))
    model = with_adapters(base, target_modules="all-linear")
    torch.testing.assert_close(routed(model, all_rows()), row_by_row(model), rtol=1e-2, atol=5e-2)
    with torch.no_grad(), model.disable_adapter():
        base_logits = model(IDS).logits
    assert torch.equal(routed(model, all_rows())[1], base_logits[1])
    assert (routed(model, all_rows())[3] - base_logits[3]).abs().max() > 0.5


@pytest.mark.parametrize("residual", [True, False])
def test_layers_that_are_offloaded_to_disk(tiny_llama: Build, tmp_path: Path, residual: bool) -> None:
    model = with_adapters(tiny_llama(num_hidden_layers=3))
    batch = MixedBatch(["a", "b"], WEIGHTS, residual=residual)
    expected = routed(model, batch)
    places: dict[str, Any] = {"model.layers.1": "disk", "model.layers.2": "disk"}
    others = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    device_map = {**dict.fromkeys(others, "cpu"), **places}
    dispatch_model(model.get_base_model(), device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert model.get_base_model().model.layers[1].mlp.down_proj.base_layer.weight.is_meta
    for _ in range(2):
        torch.testing.assert_close(routed(model, batch), expected, rtol=1e-5, atol=1e-5)


# torch.compile, DDP, checkpoints of activations


@torch.no_grad()
def test_compiled_models_follow_every_route() -> None:
    """With graph breaks; without a route there is none."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = with_adapters(nn.Sequential(nn.Linear(6, 8)), target_modules=["0"])
    x = torch.randn(4, 3, 6)
    active = model(x)
    whole = torch.compile(model.get_base_model(), fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(x), active)
    compiled = torch.compile(model.get_base_model(), backend="eager")
    for batch in (all_rows(), uniform(1), MixedBatch(["a"], torch.ones(1, 1), every_row=True), all_rows()):
        with model.base_model.routed(batch):
            torch.testing.assert_close(compiled(x), model(x))
            with ThreadPoolExecutor(1) as pool:  # a thread that has no route
                torch.testing.assert_close(pool.submit(torch.no_grad()(compiled), x).result(), active)
        torch.testing.assert_close(compiled(x), active)
    torch.testing.assert_close(whole(x), active)
    torch.compiler.reset()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    init_device_mesh("cpu", (1,))
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_model_in_ddp_and_with_gradient_checkpointing(tiny_llama: Build) -> None:
    model = with_adapters(tiny_llama())
    expected = row_by_row(model)
    wrapped = DistributedDataParallel(model).eval()
    torch.testing.assert_close(routed(wrapped, all_rows(), model), expected, rtol=1e-4, atol=1e-5)
    model.gradient_checkpointing_enable()
    with model.base_model.routed(all_rows()):
        logits = model(IDS).logits  # with gradients
    torch.testing.assert_close(logits.detach(), expected, rtol=1e-4, atol=1e-5)
    loss = logits.square().mean()
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    assert any(gradient.abs().max() > 0 for gradient in gradients)
