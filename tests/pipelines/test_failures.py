"""Bad input gets one clear line, and no failure leaves a trace on the model."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from peft_svf import ExpertBank, Transformer2Pipeline
from peft_svf.dispatch import Route


def message_of(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("call", [lambda p: p("x", expert="maths"), lambda p: p([{"text": "x", "expert": "maths"}])])
def test_an_unknown_expert_is_refused_with_the_known_ones(pipe, call):
    with pytest.raises(ValueError, match="Unknown expert 'maths'") as error:
        call(pipe)
    assert "'math', 'code', 'reasoning', 'others'" in message_of(error)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", "prompt is empty"),
        (" \n\t", "prompt is empty"),
        (["fine", ""], "prompt is empty"),
        ([], "nothing to answer"),
        ([[]], "chat is empty"),
        ({"messages": []}, "chat is empty"),
        ([{"role": "user", "content": " "}], "last message of the chat is empty"),
        ({"question": "x"}, "needs 'text' or 'messages'"),
    ],
)
def test_empty_prompts_are_refused(pipe, prompt, expected):
    with pytest.raises(ValueError, match=expected) as error:
        pipe(prompt, batch_size=2 if isinstance(prompt, list) else 1)
    message_of(error)


def test_a_prompt_of_another_type_is_refused(pipe):
    with pytest.raises(TypeError, match=r"a text or a chat .* not int"):
        pipe([3])


@pytest.mark.parametrize(
    ("length", "kwargs", "expected"),
    [
        (
            480,
            {"max_new_tokens": 20},
            "has 500 tokens and max_new_tokens is 20, .*context is 512; pass max_new_tokens=12",
        ),
        (492, {}, "has 512 tokens.*; shorten the prompt"),
        (700, {"max_new_tokens": 1}, "has 720 tokens .*512; shorten the prompt"),
        (480, {"max_length": 513}, "context is 512"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(bank, dispatcher, length, kwargs, expected):
    prompt = "x" * (length + 20 - len("[user]\n[assistant]"))
    with pytest.raises(ValueError, match=expected) as error:
        Transformer2Pipeline(bank, dispatcher=dispatcher)(prompt, **kwargs)
    message_of(error)


def test_a_prompt_that_just_fits_is_answered(bank, dispatcher):
    prompt = "x" * (500 - len("[user]\n[assistant]"))
    assert Transformer2Pipeline(bank, dispatcher=dispatcher)(prompt, max_new_tokens=12)


@pytest.mark.parametrize(
    "model",
    [
        BertForSequenceClassification(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2)),
        T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
        torch.nn.Linear(2, 2),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_model_that_is_no_causal_language_model_is_named(model, character_tokenizer):
    with pytest.raises(ValueError, match=f"{type(model).__name__} is not a causal language model") as error:
        Transformer2Pipeline(model, tokenizer=character_tokenizer)
    message_of(error)


@pytest.mark.parametrize(
    ("dispatcher", "error", "expected"),
    [
        (object(), TypeError, "an object with route"),
        ("physics", ValueError, "neither .* nor an expert"),
        ({"math": 0.5, "physics": 0.5}, ValueError, "physics"),
    ],
)
def test_what_is_no_dispatcher_is_refused(bank, dispatcher, error, expected):
    with pytest.raises(error, match=expected):
        Transformer2Pipeline(bank, dispatcher=dispatcher)


@pytest.mark.parametrize(
    ("route", "expected"),
    [
        (Route.one_hot(["math", "math"], ["math"]), "given 1 prompts and routed 2"),
        (Route.one_hot(["physics"], ["physics"]), "Unknown expert 'physics'"),
    ],
)
def test_a_route_that_does_not_fit_the_bank_is_refused(pipe, route, expected):
    pipe.dispatcher.route = lambda prompts: route
    with pytest.raises(ValueError, match=expected):
        pipe("x")


def test_images_are_not_silently_left_out(pipe):
    with pytest.raises(ValueError, match="reads no images; use pipeline"):
        pipe({"text": "What is this?", "images": ["a.png"]})


def test_a_misspelt_generation_argument_is_still_refused(pipe):
    with pytest.raises((ValueError, TypeError), match="max_new_tokenz"):
        pipe("x", max_new_tokenz=3)


@pytest.mark.parametrize("experts", [["math", "code"], ["others", "others"]])
def test_a_failing_generation_leaves_the_model_as_it_was(pipe, bank: ExpertBank, experts):
    bank.model.set_adapter("reasoning", inference_mode=True)
    prompts = [{"text": "abc", "expert": expert} for expert in experts]
    expected = pipe(prompts, batch_size=2)

    def state() -> tuple:
        hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in bank.model.modules()]
        flags = [p.requires_grad for p in bank.model.parameters()]
        return hooks, flags, bank.model.active_adapter, bank.model.get_model_status().enabled, bank.model.training

    before = state()

    def fail(*args: object) -> None:
        raise RuntimeError("out of memory")

    last = bank.base_model.model.layers[1].mlp.down_proj
    handle = last.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        pipe(prompts, batch_size=2)
    handle.remove()
    assert state() == before
    assert pipe(prompts, batch_size=2) == expected
