"""Mixed batches: every row under its own adapter, equal to running the rows one adapter at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, OPTConfig, OPTForCausalLM, T5Config, T5ForConditionalGeneration

from peft_svf import SVFConfig
from peft_svf.tuner import SVFLayer


IDS = torch.randint(3, 97, (4, 6), generator=torch.Generator().manual_seed(0))
NAMES = ["b", "__base__", "a", "b"]
Build = Callable[..., LlamaForCausalLM]


def with_adapters(base: nn.Module, **settings: object) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(base, SVFConfig(init_weights=False, **settings), "a")
    model.add_adapter("b", SVFConfig(init_weights=False, **settings))
    return model.eval()


def one_by_one(model: PeftModel, call: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    """Row by row, each under its own adapter alone."""
    rows = []
    for ids, name in zip(IDS, NAMES, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(call(ids[None]))
        else:
            model.set_adapter(name)
            rows.append(call(ids[None]))
    return rows


def hooks(model: PeftModel) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture
def model(tiny_llama: Build) -> PeftModel:
    return with_adapters(tiny_llama(attention_bias=True))


@torch.no_grad()
def test_forward_equals_single_runs(model: PeftModel) -> None:
    single = torch.cat(one_by_one(model, lambda ids: model(ids).logits))
    mixed = model(IDS, adapter_names=NAMES).logits
    torch.testing.assert_close(mixed, single, rtol=1e-4, atol=1e-5)
    assert (mixed[0] - mixed[3]).abs().max() > 1e-3
    assert hooks(model) == 0


@torch.no_grad()
def test_base_rows_are_the_base_model_bit_for_bit(model: PeftModel) -> None:
    with model.disable_adapter():
        base = model(IDS).logits
    assert torch.equal(model(IDS, adapter_names=["__base__"] * 4).logits, base)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
    ],
    ids=["greedy", "beams", "beams and returned sequences", "sampling"],
)
def test_generation_equals_single_runs(model: PeftModel, settings: dict) -> None:
    if settings.get("do_sample"):
        settings = {**settings, "top_k": 1}  # sampling whose result does not depend on the batch
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, **settings}

    def generate(ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings, **kwargs)

    single = torch.cat(one_by_one(model, generate))
    mixed = generate(IDS, adapter_names=NAMES)
    assert torch.equal(mixed, single)
    assert hooks(model) == 0


def test_beams_from_the_generation_config(model: PeftModel) -> None:
    model.generation_config.num_beams = 2
    arguments = {"max_new_tokens": 4, "min_new_tokens": 4}
    single = torch.cat(one_by_one(model, lambda ids: model.generate(input_ids=ids, **arguments)))
    assert torch.equal(model.generate(input_ids=IDS, adapter_names=NAMES, **arguments), single)


@torch.no_grad()
def test_encoder_decoder_with_beams() -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = with_adapters(T5ForConditionalGeneration(config).eval())
    arguments = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 3}
    single = torch.cat(one_by_one(model, lambda ids: model.generate(input_ids=ids, **arguments)))
    assert torch.equal(model.generate(input_ids=IDS, adapter_names=NAMES, **arguments), single)


@torch.no_grad()
def test_saved_modules_follow_the_rows_with_beams(tiny_llama: Build) -> None:
    model = with_adapters(tiny_llama(), modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head.modules_to_save
    for index, name in enumerate(("a", "b")):
        head[name].weight.add_(torch.randn(head[name].weight.shape, generator=torch.Generator().manual_seed(index)))
    single = torch.cat(one_by_one(model, lambda ids: model(ids).logits))
    torch.testing.assert_close(model(IDS, adapter_names=NAMES).logits, single, rtol=1e-4, atol=1e-4)
    arguments = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2}
    single = torch.cat(one_by_one(model, lambda ids: model.generate(input_ids=ids, **arguments)))
    assert torch.equal(model.generate(input_ids=IDS, adapter_names=NAMES, **arguments), single)


@torch.no_grad()
def test_an_adapter_that_skips_a_layer_leaves_it_as_the_base(tiny_llama: Build) -> None:
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), SVFConfig(init_weights=False, target_modules=["q_proj"]), "a")
    model.add_adapter("b", SVFConfig(init_weights=False, target_modules=["q_proj", "down_proj"]))
    model.eval()
    single = torch.cat(one_by_one(model, lambda ids: model(ids).logits))
    torch.testing.assert_close(model(IDS, adapter_names=NAMES).logits, single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b", "a", "typo"], r"non-existing adapter\(s\): typo; loaded are a, b"),
        (["a", "b", "a"], "Length of `adapter_names`.*got 3 and 4"),
        (["a"] * 5, "got 5 and 4"),
        ([], "got 0 and 4"),
    ],
    ids=["unknown", "too short", "too long", "empty"],
)
def test_bad_names_are_refused_and_the_model_works_on(model: PeftModel, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(IDS, adapter_names=names)
    assert hooks(model) == 0
    model(IDS)


def test_a_string_is_not_a_list_of_names(model: PeftModel) -> None:
    with pytest.raises(TypeError, match="must be a list"):
        model(IDS, adapter_names="abab")


def test_mixed_batches_are_refused_in_training_mode(model: PeftModel) -> None:
    with pytest.raises(ValueError, match="training mode"):
        model.train()(IDS, adapter_names=NAMES)


def test_mixed_batches_are_refused_while_merged(model: PeftModel) -> None:
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(IDS, adapter_names=NAMES)
    model.unmerge_adapter()
    model(IDS, adapter_names=NAMES)


def test_hooks_are_removed_after_an_exception_in_generate(model: PeftModel) -> None:
    before = model.generate(input_ids=IDS, max_new_tokens=3)
    with pytest.raises(RuntimeError, match="stop here"):
        model.generate(input_ids=IDS, max_new_tokens=3, adapter_names=NAMES, stopping_criteria=[failing_criterion])
    assert hooks(model) == 0
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=3), before)
    assert model.generate(input_ids=IDS[:1], max_new_tokens=3).shape == (
        1,
        9,
    )  # another batch size than the failed one


def failing_criterion(*args: object, **kwargs: object) -> bool:
    raise RuntimeError("stop here")


@torch.no_grad()
def test_layers_that_see_flattened_tokens() -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=97, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, init_std=0.3
    )
    model = with_adapters(OPTForCausalLM(config).eval())  # fc1 and fc2 see (batch * tokens, hidden)
    single = torch.cat(one_by_one(model, lambda ids: model(ids).logits))
    torch.testing.assert_close(model(IDS, adapter_names=NAMES).logits, single, rtol=1e-4, atol=1e-4)


def test_batches_without_a_sequence() -> None:
    model = with_adapters(nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 8)), target_modules=["0", "2"])
    x = torch.randn(4, 8)
    mixed = model(x, adapter_names=NAMES)
    model.set_adapter("b")
    torch.testing.assert_close(mixed[[0, 3]], model(x[[0, 3]]))


class Patches(nn.Module):
    """Cuts every row into four, as vision towers do with images."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.reshape(4 * x.shape[0], -1, 8))


def test_rows_that_are_not_those_of_the_batch_are_refused() -> None:
    model = with_adapters(Patches(), target_modules=["linear"])
    with pytest.raises(ValueError, match=r"Length of `adapter_names`.*got 4 and 16"):
        model(torch.randn(4, 8, 8), adapter_names=NAMES)
    assert hooks(model) == 0


def test_layers_that_see_routed_tokens_are_refused_by_name() -> None:
    experts = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(8, 8)])})
    model = with_adapters(experts, target_modules=["0"])
    with pytest.raises(ValueError, match=r"adapts 'experts\.0': it sees tokens routed to it"):
        model(torch.randn(4, 8), adapter_names=NAMES)
    assert hooks(model) == 0


@torch.no_grad()
def test_offsets_are_gathered_once_for_each_call_of_generate(
    model: PeftModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = SVFLayer.offset
    monkeypatch.setattr(SVFLayer, "offset", lambda layer, name: calls.append(name) or original(layer, name))
    model.generate(input_ids=IDS, adapter_names=NAMES, max_new_tokens=5, min_new_tokens=5)
    assert len(calls) == 14 * 2  # layers times adapters, however many tokens
