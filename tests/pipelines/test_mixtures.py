"""Mixtures: any route in any row of a batch gives the text of an adapter that was mixed beforehand."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch

from peft_svf import ExpertBank, Transformer2Pipeline
from peft_svf.dispatch import Route


PROMPTS = ["math: 2+2?", "a longer prompt, padded less", "x"]
MIXTURES = [{"math": 0.7, "code": 0.3}, {"reasoning": -0.5, "code": 1.5}, {"math": 0.4, "code": 0.4, "reasoning": 0.4}]


class ListedRoute:
    """A dispatcher that gives row b of every batch the b-th row of a route."""

    def __init__(self, route: Route) -> None:
        self.given = route

    def route(self, prompts: Sequence) -> Route:
        return self.given[: len(prompts)]


@pytest.fixture
def write_mixed(bank: ExpertBank, write: Callable[..., str]) -> Callable[..., str]:
    """The answer by hand under a mixture that PEFT's `add_weighted_adapter` made an adapter of."""

    def write_mixed(text: str, mixture: Mapping[str, float], residual: bool = True, **kwargs: object) -> str:
        tuner = bank.model.base_model
        tuner.add_weighted_adapter(list(mixture), list(mixture.values()), "mixed", residual=residual)
        answer = write(text, "mixed", **kwargs)
        bank.model.delete_adapter("mixed")
        return answer

    return write_mixed


def texts(records: list[list[dict]]) -> list[str]:
    return [record["generated_text"] for (record,) in records]


def test_prompts_pinned_to_different_mixtures_share_a_batch(pipe, dispatcher, write, write_mixed):
    prompts = [{"text": text, "expert": mixture} for text, mixture in zip(PROMPTS, MIXTURES, strict=True)]
    records = pipe([*prompts[:2], {"text": "code: x"}, prompts[2]], batch_size=4)
    expected = [write_mixed(text, mixture) for text, mixture in zip(PROMPTS, MIXTURES, strict=True)]
    assert texts(records) == [*expected[:2], write("code: x", "code"), expected[2]]
    assert [record["expert"] for (record,) in records] == ["mixture", "mixture", "code", "mixture"]
    assert [record.get("weights") for (record,) in records] == [
        pytest.approx(MIXTURES[0]),
        pytest.approx(MIXTURES[1]),
        None,
        pytest.approx(MIXTURES[2]),
    ]
    assert dispatcher.asked == 1
    assert len({*expected, write(PROMPTS[0], "math")}) == 4  # the mixtures matter


def test_a_call_can_pin_all_prompts_to_one_mixture(pipe, write_mixed):
    records = pipe(PROMPTS, expert=MIXTURES[0], batch_size=3, num_beams=2)
    assert texts(records) == [write_mixed(text, MIXTURES[0], num_beams=2) for text in PROMPTS]


def test_a_mixture_may_name_the_base_model_as_the_rest(pipe, write_mixed):
    (record,) = pipe("math: 2+2?", expert={"math": 0.7, "others": 0.3})
    assert record["generated_text"] == write_mixed("math: 2+2?", {"math": 0.7})
    assert record["weights"] == pytest.approx({"math": 0.7})


@pytest.mark.parametrize("residual", [True, False])
def test_a_soft_route_of_the_dispatcher_is_followed_and_reported(bank, write_mixed, residual):
    weights = torch.tensor([[0.5, 0.8, 0.0], [0.0, 0.0, 1.0], [0.2, 0.0, 0.6]])
    scores = ({"math": 0.6}, None, {"code": 0.1})
    route = Route(weights, ("math", "code", "reasoning"), scores, residual=residual)
    pipe = Transformer2Pipeline(bank, dispatcher=ListedRoute(route), max_new_tokens=8)
    records = pipe(PROMPTS, batch_size=3)
    assert texts(records) == [
        write_mixed(text, mixture, residual) for text, mixture in zip(PROMPTS, route.row_weights(), strict=True)
    ]
    assert [record["expert"] for (record,) in records] == ["mixture", "reasoning", "mixture"]
    assert [record["scores"] for (record,) in records] == list(scores)


def test_weights_of_each_layer_share_a_batch_with_pinned_prompts(bank, write, write_mixed):
    groups = bank.layer_groups()
    weights = torch.tensor([0.6, 0.4, 0.0]).expand(1, len(groups), 3)
    dispatcher = ListedRoute(Route(weights, ("math", "code", "reasoning"), groups=groups))
    pipe = Transformer2Pipeline(bank, dispatcher=dispatcher, max_new_tokens=8)
    records = pipe([{"text": "x", "expert": "code"}, {"text": "y"}], batch_size=2)
    assert texts(records) == [write("x", "code"), write_mixed("y", {"math": 0.6, "code": 0.4})]


def test_pinned_base_model_and_the_papers_formula_are_refused_in_one_batch(bank, write):
    route = Route(torch.tensor([[0.5, 0.8, 0.0]]), ("math", "code", "reasoning"), residual=False)
    pipe = Transformer2Pipeline(bank, dispatcher=ListedRoute(route), max_new_tokens=8)
    prompts = [{"text": "x", "expert": "others"}, "y"]
    with pytest.raises(ValueError, match="residual=False; pass batch_size=1"):
        pipe(prompts, batch_size=2)
    assert texts(pipe(prompts, batch_size=1))[0] == write("x", "others")
    assert texts(pipe([{"text": "x", "expert": "math"}, "y"], batch_size=2))[0] == write("x", "math")


@pytest.mark.parametrize(
    ("expert", "error", "expected"),
    [
        (["math", "code"], TypeError, r"not to a list; to pin single prompts pass \[\{'text'"),
        ({"math": 0.5, "physics": 0.5}, ValueError, "Unknown expert 'physics'"),
        ({"math": float("nan")}, ValueError, "weight of 'math' .* finite number, not nan"),
        ({"math": "0.5"}, ValueError, "weight of 'math' .* not '0.5'"),
        ({}, ValueError, "The mixture is empty"),
    ],
)
def test_what_expert_cannot_be_is_refused_before_anything_is_generated(pipe, expert, error, expected):
    with pytest.raises(error, match=expected):
        pipe(["x", "y"], expert=expert)
    if isinstance(expert, dict) and expert:
        with pytest.raises(error, match=expected):
            pipe([{"text": "x", "expert": expert}])


def test_seconds_of_both_passes_are_reported_on_request(bank, dispatcher):
    class Slow:
        def route(self, prompts: Sequence) -> Route:
            time.sleep(0.2)
            return dispatcher.route(prompts)

    pipe = Transformer2Pipeline(bank, dispatcher=Slow(), max_new_tokens=1)
    assert {"first_pass_seconds", "second_pass_seconds"}.isdisjoint(pipe("x")[0])
    records = [record for (record,) in pipe(["math: 1", "x"], batch_size=2, return_seconds=True)]
    assert records[0]["first_pass_seconds"] == records[1]["first_pass_seconds"] >= 0.2
    assert 0 < records[0]["second_pass_seconds"] == records[1]["second_pass_seconds"]
    timed = Transformer2Pipeline(bank, dispatcher=Slow(), max_new_tokens=1, return_seconds=True)
    assert timed("x", expert="math")[0]["first_pass_seconds"] < 0.2
