"""Every way to generate under a route gives each row what its mixture gives alone, or says clearly that it cannot."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.generation.streamers import BaseStreamer

from peft_svf import SVFConfig
from peft_svf.tuner import SVFLayer
from peft_svf.tuner.mixed_batch import MixedBatch


Build = Callable[..., LlamaForCausalLM]
IDS = torch.randint(3, 97, (4, 6), generator=torch.Generator().manual_seed(0))
WEIGHTS = torch.tensor([[0.3, 0.7], [0.0, 0.0], [1.0, 0.0], [-0.5, 1.2]])
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4}


def with_adapters(base: nn.Module, **settings: Any) -> PeftModel:
    """The model with the adapters "a" and "b", and for each row of `WEIGHTS` an adapter that is its mixture."""
    torch.manual_seed(1)
    model = get_peft_model(base, SVFConfig(init_weights=False, **settings), "a")
    model.add_adapter("b", SVFConfig(init_weights=False, **settings))
    for name, parameter in model.named_parameters():
        if ".svf_offset." in name:
            parameter.data.mul_(4)
    for row, weights in enumerate(WEIGHTS.tolist()):
        model.add_weighted_adapter(["a", "b"], weights, f"row{row}")
    model.set_adapter("b")
    return model.eval()


@pytest.fixture(scope="module")
def prototypes() -> list[PeftModel]:
    return []


@pytest.fixture
def model(tiny_llama: Build, prototypes: list[PeftModel]) -> PeftModel:
    if not prototypes:
        prototypes.append(with_adapters(tiny_llama()))
    return copy.deepcopy(prototypes[0])


def batch(rows: slice | list[int] = slice(None), **settings: Any) -> MixedBatch:
    return MixedBatch(["a", "b"], WEIGHTS[rows], **settings)


@contextmanager
def routed(model: PeftModel, **settings: Any) -> Iterator[None]:
    """Under the mixtures of all rows; afterwards the model is as it was."""
    before = set(vars(model.get_base_model()))
    with model.base_model.routed(batch(**settings)):
        yield
    assert set(vars(model.get_base_model())) == before and not model.base_model.svf_batches.in_use


def row_by_row(model: PeftModel, ids: torch.Tensor = IDS, **settings: Any) -> torch.Tensor:
    """Each row alone, its mixture the active adapter, without any route."""
    rows = []
    for row in range(len(ids)):
        model.set_adapter(f"row{row}")
        rows.append(model.generate(ids[row : row + 1], **{**GREEDY, **settings}))
    model.set_adapter("b")
    return torch.cat(rows)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams and returned sequences": {"num_beams": 3, "num_return_sequences": 2},
    "returned sequences": {"num_return_sequences": 3, "do_sample": True, "top_k": 1},
    "static cache": {"cache_implementation": "static"},
    "without a cache": {"use_cache": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_each_row_gets_what_it_gets_alone(model: PeftModel, way: str) -> None:
    expected = row_by_row(model, **WAYS[way])
    assert len({tuple(row) for row in expected.tolist()}) >= 4  # the rows do differ
    with routed(model):
        for place in (model, model.get_base_model()):
            assert torch.equal(place.generate(IDS, **GREEDY, **WAYS[way]), expected)
        with model.disable_adapter():  # a matter of all threads, not of this one
            assert torch.equal(model.generate(IDS, **GREEDY, **WAYS[way]), expected)


def t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


def bart() -> nn.Module:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(vocab_size=97, d_model=16, encoder_ffn_dim=32, decoder_ffn_dim=32, init_std=0.3, **sizes)
    return BartForConditionalGeneration(config)


def opt() -> nn.Module:  # fc1 and fc2 see (rows · tokens, hidden)
    return OPTForCausalLM(
        OPTConfig(vocab_size=97, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, init_std=0.3)
    )


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("build", [t5, bart, opt])
def test_other_architectures(build: Callable[[], nn.Module], settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = with_adapters(build().eval())
    expected = row_by_row(model, **settings)
    with routed(model):
        assert torch.equal(model.generate(IDS, **GREEDY, **settings), expected)
        if model.config.is_encoder_decoder:
            outputs = model.get_base_model().get_encoder()(IDS)
            assert torch.equal(model.generate(encoder_outputs=outputs, **GREEDY, **settings), expected)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["sampling", "beam sampling"])
def test_sampling_draws_as_with_the_mixture_alone(model: PeftModel, settings: dict[str, Any]) -> None:
    def sample() -> torch.Tensor:
        torch.manual_seed(3)
        return model.generate(IDS, do_sample=True, top_k=0, num_return_sequences=2, **GREEDY, **settings)

    model.set_adapter("row3")
    expected = sample()
    model.set_adapter("b")
    with model.base_model.routed(MixedBatch(["a", "b"], WEIGHTS[[3] * 4])):
        assert torch.equal(sample(), expected)
    with model.base_model.routed(MixedBatch(["a", "b"], WEIGHTS[3:], every_row=True)):
        assert torch.equal(sample(), expected)
    assert not torch.equal(sample(), expected)


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def test_streaming(model: PeftModel) -> None:
    expected = row_by_row(model)[0].tolist()
    streamer = Collector()
    with model.base_model.routed(batch([0])):
        model.generate(IDS[:1], streamer=streamer, **GREEDY)
    assert streamer.tokens == [*expected, -1]


def test_embeddings_and_a_cache_of_the_first_tokens(model: PeftModel) -> None:
    expected = row_by_row(model)
    with routed(model):
        embeddings = model.get_input_embeddings()(IDS)
        assert torch.equal(model.generate(inputs_embeds=embeddings, **GREEDY), expected[:, 6:])
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(IDS[:, :4], past_key_values=cache)
        assert torch.equal(model.generate(IDS, past_key_values=cache, **GREEDY), expected)


# Assistants, which belong to another model


@pytest.mark.parametrize("kind", ["plain", "PeftModel", "its base model", "prompt lookup", "early exit"])
def test_an_assistant_keeps_its_own_adapter(model: PeftModel, tiny_llama: Build, kind: str) -> None:
    assistant = with_adapters(tiny_llama(seed=5)) if kind in ("PeftModel", "its base model") else None
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    if assistant is not None:
        layer = next(module for module in assistant.modules() if isinstance(module, SVFLayer))
        layer.register_forward_hook(lambda module, args, output: pairs.append((args[0], output)))
    settings: dict[str, Any] = {
        "plain": {"assistant_model": tiny_llama(seed=5)},
        "PeftModel": {"assistant_model": assistant},
        "its base model": {"assistant_model": assistant and assistant.get_base_model()},
        "prompt lookup": {"prompt_lookup_num_tokens": 2},
        "early exit": {"assistant_early_exit": 1},
    }[kind]
    for row in (0, 3):
        with model.base_model.routed(batch([row])):
            expected = model.generate(IDS[row : row + 1], **GREEDY)
            assert torch.equal(model.generate(IDS[row : row + 1], **GREEDY, **settings), expected)
    if assistant is not None:
        assert assistant.active_adapter == "b" and len(pairs) > 2
        for x, output in list(pairs):
            assert torch.equal(layer(x), output)  # the active adapter


# A wrong number of rows


@pytest.mark.parametrize("through", ["PeftModel", "base model"])
@pytest.mark.parametrize(
    ("prompts", "settings"),
    [(2, {"num_beams": 2}), (1, {"num_return_sequences": 4, "do_sample": True}), (8, {}), (3, {}), (1, {})],
    ids=str,
)
def test_prompts_that_are_not_the_rows_of_the_route(
    model: PeftModel, prompts: int, settings: dict[str, Any], through: str
) -> None:
    """Also where beams make the number of rows right, which would mix up the prompts."""
    place = model if through == "PeftModel" else model.get_base_model()
    ids = IDS.repeat(2, 1)[:prompts]
    with routed(model), pytest.raises(ValueError, match=f"got 4 and {prompts} .* rows of a route"):
        place.generate(ids, **GREEDY, **settings)
    with pytest.raises(ValueError, match=f"got 4 and {prompts} .* rows of a route"):
        model.generate(ids, adapter_names=["a", "b", "a", "b"], **GREEDY, **settings)


def test_no_prompt_is_one_row(model: PeftModel) -> None:
    with routed(model), pytest.raises(ValueError, match="got 4 and 1"):
        model.generate(**GREEDY)


def test_only_the_decoder_is_adapted() -> None:
    torch.manual_seed(0)
    model = with_adapters(t5().eval(), target_modules=r"decoder\..*\.(q|wi|wo)")
    with routed(model), pytest.raises(ValueError, match="got 4 and 2"):
        model.generate(IDS[:2], num_beams=2, **GREEDY)


@torch.no_grad()
def test_a_forward_pass_has_no_beams_wherever_they_are_set(model: PeftModel) -> None:
    model.generation_config.num_beams = 2
    with routed(model):
        model.generate(IDS, **GREEDY)
        for call in (model, model.get_base_model()):
            assert call(IDS).logits.shape[0] == 4
            with pytest.raises(ValueError, match="got 4 and 8"):
                call(IDS.repeat(2, 1))
    with pytest.raises(ValueError, match="got 4 and 8"):
        model(IDS.repeat(2, 1), adapter_names=["a", "b", "a", "b"])


@torch.no_grad()
def test_any_number_of_rows_where_the_route_is_for_all(model: PeftModel) -> None:
    model.set_adapter("row0")
    expected = model(IDS).logits
    model.set_adapter("b")
    with model.base_model.routed(batch([0], every_row=True)):
        for rows in (1, 3, 4):
            torch.testing.assert_close(model(IDS[:rows]).logits, expected[:rows], rtol=1e-4, atol=1e-5)
        assert model.generate(IDS[:3], num_beams=2, num_return_sequences=2, **GREEDY).shape[0] == 6


def test_continuous_batching_is_refused(model: PeftModel) -> None:
    with routed(model), pytest.raises(ValueError, match="continuous batching runs in a thread of its own"):
        model.get_base_model().generate_batch(IDS.tolist())
