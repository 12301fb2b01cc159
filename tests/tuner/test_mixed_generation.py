"""Mixed batches as users call them: generation settings from every place, unequal adapters, and calls that fail.

The layer and the plain cases are in test_mixed_batch.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_svf import SVFConfig


IDS = torch.randint(3, 97, (4, 6), generator=torch.Generator().manual_seed(0))
NAMES = ["b", "__base__", "a", "b"]
Build = Callable[..., LlamaForCausalLM]
Call = Callable[..., torch.Tensor]


def with_adapters(base: nn.Module, **adapters: dict[str, Any]) -> PeftModel:
    """The model with an adapter for each keyword, made with the settings that it holds."""
    torch.manual_seed(1)
    (first, settings), *others = adapters.items()
    model = get_peft_model(base, SVFConfig(init_weights=False, **settings), first)
    for name, settings in others:
        model.add_adapter(name, SVFConfig(init_weights=False, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name or "trainable_tokens_delta" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
    model.set_adapter(first)
    return model.eval()


@pytest.fixture
def model(tiny_llama: Build) -> PeftModel:
    return with_adapters(tiny_llama(), a={}, b={})


def one_by_one(model: PeftModel, call: Callable[[int], torch.Tensor], names: list[str] | None = None) -> torch.Tensor:
    """`call(row)` for every row, under its own adapter alone."""
    results = []
    for row, name in enumerate(names or NAMES):
        if name == "__base__":
            with model.disable_adapter():
                results.append(call(row))
        else:
            model.set_adapter(name)
            results.append(call(row))
    return torch.cat(results)


def generate(model: PeftModel, ids: torch.Tensor, *args: Any, **settings: Any) -> torch.Tensor:
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, **settings}
    return model.generate(ids, *args, attention_mask=torch.ones_like(ids), **settings)


def hooks(model: PeftModel) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


# Where generate finds its settings


def test_base_rows_generate_what_the_base_model_generates(model: PeftModel) -> None:
    with model.disable_adapter():
        expected = generate(model, IDS, num_beams=2)
    assert torch.equal(generate(model, IDS, num_beams=2, adapter_names=["__base__"] * 4), expected)
    assert not torch.equal(generate(model, IDS, num_beams=2, adapter_names=["a"] * 4), expected)


def test_sampling_draws_as_with_the_adapter_alone(model: PeftModel) -> None:
    def sample(**kwargs: Any) -> torch.Tensor:
        torch.manual_seed(3)
        return generate(model, IDS, do_sample=True, top_k=0, num_return_sequences=2, **kwargs)

    model.set_adapter("b")
    expected = sample()
    model.set_adapter("a")
    assert torch.equal(sample(adapter_names=["b"] * 4), expected)
    assert not torch.equal(sample(adapter_names=["a"] * 4), expected)


def in_a_keyword(model: PeftModel, ids: torch.Tensor, settings: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    return generate(
        model, ids, generation_config=GenerationConfig(pad_token_id=0, eos_token_id=2, **settings), **kwargs
    )


def in_second_place(model: PeftModel, ids: torch.Tensor, settings: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    return generate(model, ids, GenerationConfig(pad_token_id=0, eos_token_id=2, **settings), **kwargs)


def in_the_model(model: PeftModel, ids: torch.Tensor, settings: dict[str, Any], **kwargs: Any) -> torch.Tensor:
    model.generation_config.update(**settings)
    return generate(model, ids, **kwargs)


def in_the_model_next_to_another(
    model: PeftModel, ids: torch.Tensor, settings: dict[str, Any], **kwargs: Any
) -> torch.Tensor:
    model.generation_config.update(**settings)
    return generate(model, ids, generation_config=GenerationConfig(pad_token_id=0, eos_token_id=2), **kwargs)


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}], ids=str)
@pytest.mark.parametrize("place", [in_a_keyword, in_second_place, in_the_model, in_the_model_next_to_another])
def test_beams_and_returned_sequences_may_be_set_anywhere(model: PeftModel, place: Call, settings: dict) -> None:
    single = one_by_one(model, lambda row: place(model, IDS[row : row + 1], settings))
    mixed = place(model, IDS, settings, adapter_names=NAMES)
    assert torch.equal(mixed, single) and len(mixed) == 4 * settings.get("num_return_sequences", 1)


def test_arguments_win_over_the_generation_config(model: PeftModel) -> None:
    model.generation_config.num_beams = 4
    single = one_by_one(model, lambda row: generate(model, IDS[row : row + 1], num_beams=1))
    assert torch.equal(generate(model, IDS, num_beams=1, adapter_names=NAMES), single)


def test_padded_prompts_of_different_lengths(model: PeftModel) -> None:
    lengths = torch.tensor([6, 3, 5, 2])
    mask = (torch.arange(6) >= 6 - lengths[:, None]).long()  # padded on the left
    settings = {"max_new_tokens": 5, "min_new_tokens": 5}
    mixed = model.generate(input_ids=IDS * mask, attention_mask=mask, adapter_names=NAMES, **settings)
    single = one_by_one(model, lambda row: generate(model, IDS[row : row + 1, 6 - lengths[row] :])[:, -5:])
    assert torch.equal(mixed[:, -5:], single)


def test_token_embeddings_instead_of_ids(model: PeftModel) -> None:
    embeddings = model.get_input_embeddings()(IDS)
    expected = generate(model, IDS, adapter_names=NAMES)[:, 6:]
    mixed = model.generate(inputs_embeds=embeddings, max_new_tokens=5, min_new_tokens=5, adapter_names=NAMES)
    assert torch.equal(mixed, expected)


@pytest.mark.parametrize(
    "settings",
    [{"num_return_sequences": 2, "do_sample": True, "top_k": 1}, {"num_beams": 4, "num_return_sequences": 2}],
    ids=["sampling", "beams"],
)
def test_encoder_decoder_with_returned_sequences(settings: dict) -> None:
    torch.manual_seed(0)
    config = T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = with_adapters(T5ForConditionalGeneration(config).eval(), a={}, b={})
    single = one_by_one(model, lambda row: generate(model, IDS[row : row + 1], **settings))
    assert torch.equal(generate(model, IDS, adapter_names=NAMES, **settings), single)


@torch.no_grad()
@pytest.mark.parametrize("rows", [2, 8, 12])
def test_a_forward_pass_needs_a_name_for_every_row(model: PeftModel, rows: int) -> None:
    """Also where the rows are a multiple of the names: only generate makes several rows of one."""
    ids = IDS.repeat(3, 1)[:rows]
    with pytest.raises(ValueError, match=f"Length of `adapter_names`.*got 4 and {rows}"):
        model(ids, adapter_names=NAMES)
    assert hooks(model) == 0


# The state of the model


@torch.no_grad()
def test_active_adapters_change_nothing_and_stay_active(model: PeftModel) -> None:
    expected = model(IDS, adapter_names=NAMES).logits
    for active in ("a", "b", ["a", "b"]):
        model.base_model.set_adapter(active)
        alone = model(IDS).logits
        assert torch.equal(model(IDS, adapter_names=NAMES).logits, expected)
        assert torch.equal(model(IDS).logits, alone)
        assert model.base_model.active_adapters == ([active] if isinstance(active, str) else active)


@torch.no_grad()
def test_disabled_adapters_stay_disabled(model: PeftModel) -> None:
    with model.disable_adapter():
        expected = model(IDS).logits
        assert torch.equal(model(IDS, adapter_names=NAMES).logits, expected)
    assert not torch.allclose(model(IDS, adapter_names=NAMES).logits[2], expected[2], atol=1e-2)


# Adapters that differ in more than their offsets


@torch.no_grad()
@pytest.mark.parametrize(
    "other",
    [
        {"rank": 3},
        {"parametrization": "sigmoid"},
        {"target_modules": ["q_proj", "down_proj"]},
        {"layers_to_transform": [1], "rank_pattern": {"q_proj": 2}},
    ],
    ids=str,
)
def test_adapters_of_different_kinds_in_one_batch(tiny_llama: Build, other: dict[str, Any]) -> None:
    model = with_adapters(tiny_llama(), a={}, b=other)
    single = one_by_one(model, lambda row: model(IDS[row : row + 1]).logits)
    torch.testing.assert_close(model(IDS, adapter_names=NAMES).logits, single, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("first", ["a", "b"], ids=lambda name: f"{name} active")
@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 4, 5, 60]}], ids=str
)
def test_only_one_adapter_has_more_than_offsets(tiny_llama: Build, settings: dict[str, Any], first: str) -> None:
    model = with_adapters(tiny_llama(), a=settings, b={})
    ids = IDS.clone()
    ids[:, 1], ids[:, 3] = 4, 60  # tokens whose embeddings "a" trained
    single = one_by_one(model, lambda row: model(ids[row : row + 1]).logits)
    model.set_adapter(first)
    mixed = model(ids, adapter_names=NAMES).logits
    torch.testing.assert_close(mixed, single, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_trained_tokens_follow_the_rows_with_beams(tiny_llama: Build) -> None:
    settings = {"trainable_token_indices": [3, 4, 5, 60]}
    model = with_adapters(tiny_llama(), a=settings, b=settings)
    ids = IDS.clone()
    ids[:, 1], ids[:, 3] = 4, 60
    single = one_by_one(model, lambda row: generate(model, ids[row : row + 1], num_beams=2))
    assert torch.equal(generate(model, ids, num_beams=2, adapter_names=NAMES), single)


@torch.no_grad()
def test_classifier_with_a_head_for_each_adapter(tiny_llama: Build) -> None:
    config = tiny_llama(num_labels=3, id2label={0: "x", 1: "y", 2: "z"}).config
    torch.manual_seed(0)
    settings = {"task_type": "SEQ_CLS"}
    model = with_adapters(LlamaForSequenceClassification(config), a=settings, b=settings)
    single = one_by_one(model, lambda row: model(IDS[row : row + 1]).logits)
    mixed = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), adapter_names=NAMES).logits
    torch.testing.assert_close(mixed, single, rtol=1e-4, atol=1e-4)
    assert (mixed[0] - mixed[3]).abs().max() > 1e-3 and mixed.shape == (4, 3)


# Calls that fail


class Stop(BaseException):
    """Like KeyboardInterrupt, no Exception."""


@pytest.mark.parametrize("error", [RuntimeError, Stop])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_an_exception_inside_generate_leaves_nothing_behind(
    tiny_llama: Build, settings: dict[str, Any], error: type[BaseException]
) -> None:
    model = with_adapters(tiny_llama(), a={"modules_to_save": ["lm_head"]}, b={"modules_to_save": ["lm_head"]})
    before = generate(model, IDS)
    calls = 0

    def fail_at_the_third_call(*args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error("stop here")

    layer = model.get_base_model().model.layers[1].mlp.down_proj
    handle = layer.register_forward_hook(fail_at_the_third_call)
    with pytest.raises(error, match="stop here"):
        generate(model, IDS, adapter_names=NAMES, **settings)
    handle.remove()
    assert calls == 3 and hooks(model) == 0
    assert torch.equal(generate(model, IDS), before)
    assert generate(model, IDS[:1]).shape == (1, 11)  # another batch size than the failed one
    names = ["a", "__base__"]
    single = one_by_one(model, lambda row: generate(model, IDS[row : row + 1]), names)
    assert torch.equal(generate(model, IDS[:2], adapter_names=names), single)


@torch.no_grad()
def test_an_exception_inside_forward_leaves_nothing_behind(model: PeftModel) -> None:
    before = model(IDS).logits
    with pytest.raises(IndexError):
        model(IDS + 1000, adapter_names=NAMES)  # tokens that do not exist
    assert hooks(model) == 0 and torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["a", "b", "typo", "__base__"], ValueError, r"non-existing adapter\(s\): typo"),
        (["a", "b", "a"], ValueError, "Length of `adapter_names`"),
        ("abab", TypeError, "must be a list"),
    ],
    ids=["unknown", "too short", "a string"],
)
def test_bad_names_are_refused_in_generate(
    model: PeftModel, names: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        generate(model, IDS, adapter_names=names, num_beams=2)
    assert hooks(model) == 0 and generate(model, IDS[:1]).shape == (1, 11)


def test_generation_from_merged_weights_is_refused_and_merges_nothing_away(model: PeftModel) -> None:
    model.merge_adapter()
    merged = generate(model, IDS)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        generate(model, IDS, adapter_names=NAMES)
    assert hooks(model) == 0 and torch.equal(generate(model, IDS), merged)
