"""Fixed routes, functions, and what `as_dispatcher` makes of a user's value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from peft_svf import ExpertBank, PromptDispatcher
from peft_svf.dispatch import CallableDispatcher, ClassifierDispatcher, FixedDispatcher, Route, as_dispatcher


PROMPTS = ["What is 2+2?", "def f(x):", "Hello there"]


@pytest.fixture(scope="module")
def bank(request) -> ExpertBank:
    from peft_svf.playground import BANK_FOLDER

    return ExpertBank.from_pretrained(BANK_FOLDER)  # math, code, reasoning


@pytest.mark.parametrize(
    ("route", "expected"),
    [
        ("code", {"code": 1.0}),
        ("others", {}),
        ({"math": 0.5, "code": -0.25}, {"math": 0.5, "code": -0.25}),
        ({"math": 0.5, "others": 0.5}, {"math": 0.5}),
        (Route(torch.tensor([[2.0]]), ("reasoning",), residual=False), {"reasoning": 2.0}),
    ],
)
def test_a_fixed_route_is_that_of_every_prompt(bank, route, expected):
    fixed = FixedDispatcher(bank, route).route(PROMPTS)
    assert fixed.row_weights() == [expected] * 3
    assert fixed.residual == (not isinstance(route, Route))
    assert len(FixedDispatcher(bank, route).route([])) == 0


def test_a_fixed_route_keeps_its_weights_per_layer(bank):
    groups = bank.layer_groups()
    row = Route(torch.rand(1, len(groups), 1), ("math",), groups=groups)
    fixed = FixedDispatcher(bank, row).route(PROMPTS)
    assert fixed.groups == groups
    assert torch.equal(fixed.weights, row.weights.expand(3, -1, -1))


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ("maths", "Unknown expert 'maths'"),
        ({"maths": 1.0}, "Unknown expert 'maths'"),
        ({"math": "a lot"}, "weight of 'math' in the mixture must be a finite number"),
        ({"math": float("nan")}, "finite"),
        (Route.one_hot(["math", "code"], ["math", "code"]), "one row"),
        (Route.one_hot(["maths"], ["maths"]), "Unknown expert 'maths'"),
    ],
)
def test_a_fixed_route_that_cannot_be_is_refused_at_once(bank, route, message):
    with pytest.raises(ValueError, match=message):
        FixedDispatcher(bank, route)


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (["code", "others", "math"], [{"code": 1.0}, {}, {"math": 1.0}]),
        (["code", {"math": 0.5, "code": 0.25}, {}], [{"code": 1.0}, {"math": 0.5, "code": 0.25}, {}]),
        (torch.tensor([[1.0, 0, 0], [0, 0, 0], [0, 0.5, 0.5]]), [{"math": 1}, {}, {"code": 0.5, "reasoning": 0.5}]),
        (np.array([[1, 0, 0], [0, 0, 0], [0, 1, 0]]), [{"math": 1.0}, {}, {"code": 1.0}]),
        ([[1, 0, 0], [0, 0, 0], [0, 1, 0]], [{"math": 1.0}, {}, {"code": 1.0}]),
        (Route.one_hot(["code", "code", "math"], ["code", "math"]), [{"code": 1.0}, {"code": 1.0}, {"math": 1.0}]),
    ],
)
def test_a_function_may_return_names_mixtures_weights_or_a_route(bank, returned, expected):
    assert CallableDispatcher(bank, lambda prompts: returned).route(PROMPTS).row_weights() == expected


def test_a_function_sees_the_prompts_as_they_are_and_none_without_any(bank):
    asked = []
    dispatcher = CallableDispatcher(bank, lambda prompts: asked.append(prompts) or ["math"] * len(prompts))
    chat = [{"role": "user", "content": "x"}]
    assert dispatcher.route(("text", chat)).chosen() == ["math", "math"]
    assert len(dispatcher.route([])) == 0
    assert asked == [["text", chat]]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (["math"], "3 prompts and routed 1"),
        ("math", "one choice; return a list"),
        (["math", "maths", "code"], "Unknown expert 'maths'"),
        (["math", 1, "code"], "1 is neither an expert's name"),
        (None, "no route"),
        ([[1, 0], [0, 1], [0, 0]], r"shape \(3, 2\)"),
        (Route.one_hot(["poems"] * 3, ["poems"]), "Unknown expert 'poems'"),
    ],
)
def test_a_function_that_returns_no_route_is_named(bank, returned, message):
    def by_mood(prompts):
        return returned

    with pytest.raises(ValueError, match=f"routing function by_mood .*{message}"):
        CallableDispatcher(bank, by_mood).route(PROMPTS)


def test_what_a_user_may_give_as_dispatcher(bank, monkeypatch):
    assert type(as_dispatcher(None, bank)) is PromptDispatcher
    assert type(as_dispatcher("prompt", bank)) is PromptDispatcher
    monkeypatch.setattr(bank, "classifier", "reasoning")  # any adapter will do
    assert type(as_dispatcher(None, bank)) is ClassifierDispatcher
    assert type(as_dispatcher("classifier", bank)) is ClassifierDispatcher
    own = PromptDispatcher(bank, mode="soft")
    assert as_dispatcher(own, bank) is own
    for value, names in [
        ("code", ["code"] * 3),
        ("others", ["others"] * 3),
        ({"code": 1.0}, ["code"] * 3),
        (Route.one_hot(["math"], ["math"]), ["math"] * 3),
        (lambda prompts: ["code", "others", "math"], ["code", "others", "math"]),
    ]:
        assert as_dispatcher(value, bank).route(PROMPTS).names() == names


def test_a_value_that_is_no_dispatcher_gets_the_list_of_those_that_are(bank, tiny_llama, character_tokenizer):
    with pytest.raises(ValueError, match=r'neither "prompt" nor "classifier" nor an expert. Unknown expert \'maths\''):
        as_dispatcher("maths", bank)
    with pytest.raises(TypeError, match=r"a function of the prompts .* int is none of them"):
        as_dispatcher(3, bank)
    with pytest.raises(TypeError, match=r"class PromptDispatcher; pass an object"):
        as_dispatcher(PromptDispatcher, bank)
    with pytest.raises(ValueError, match="no classification expert"):
        as_dispatcher("classifier", bank)
    elsewhere = ExpertBank(tiny_llama(vocab_size=100), character_tokenizer)
    with pytest.raises(ValueError, match="bank of another model"):
        as_dispatcher(PromptDispatcher(elsewhere), bank)


def test_a_word_that_is_also_an_expert_is_not_guessed(tiny_llama, character_tokenizer, add_experts):
    bank = ExpertBank(add_experts(tiny_llama(vocab_size=100), ("prompt",)), character_tokenizer)
    with pytest.raises(ValueError, match=r"PromptDispatcher\(bank\) or FixedDispatcher\(bank, 'prompt'\)"):
        as_dispatcher("prompt", bank)
    del bank.experts["prompt"]
    assert type(as_dispatcher("prompt", bank)) is PromptDispatcher


def test_a_fixed_route_notices_that_its_expert_is_gone(tiny_llama, character_tokenizer, add_experts):
    bank = ExpertBank(add_experts(tiny_llama(vocab_size=100)), character_tokenizer)
    dispatcher = as_dispatcher("math", bank)
    del bank.experts["math"]
    with pytest.raises(ValueError, match="Unknown expert 'math'"):
        dispatcher.route(PROMPTS)
