"""`bank.routed`: routes, names and mixtures give what the experts give alone, and nothing of the bank is changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from peft_svf import ExpertBank, SVFConfig
from peft_svf.dispatch import Route


Build = Callable[..., LlamaForCausalLM]
IDS = torch.randint(4, 100, (4, 6), generator=torch.Generator().manual_seed(0))
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4}


@pytest.fixture
def bank(
    tiny_llama: Build, character_tokenizer: PreTrainedTokenizerFast, add_experts: Callable[..., PeftModel]
) -> ExpertBank:
    return ExpertBank(add_experts(tiny_llama(vocab_size=100)), character_tokenizer)


@torch.no_grad()
def alone(bank: ExpertBank, name: str) -> torch.Tensor:
    """The logits of the expert as the active adapter."""
    bank.model.set_adapter(name)
    return bank.model(IDS).logits


@torch.no_grad()
def routed(bank: ExpertBank, route: Any) -> torch.Tensor:
    before = bank.model.active_adapter
    with bank.routed(route) as model:
        assert model is bank.model
        logits = model(IDS).logits
    assert bank.model.active_adapter == before
    return logits


def test_names_and_one_hot_routes_are_the_experts(bank: ExpertBank) -> None:
    expected = {name: alone(bank, name) for name in ("math", "code")}
    for name, logits in expected.items():
        assert torch.equal(routed(bank, name), logits)
        assert torch.equal(routed(bank, {name: 1.0}), logits)
        assert torch.equal(routed(bank, Route.one_hot([name] * 4, ["code", "math"])), logits)
    chosen = ["code", "math", "others", "code"]
    mixed = routed(bank, Route.one_hot(chosen, ["math", "code"]))
    for row, name in enumerate(chosen[:2]):
        torch.testing.assert_close(mixed[row], expected[name][row], rtol=1e-4, atol=1e-5)


def test_the_base_model_bit_for_bit(bank: ExpertBank, tiny_llama: Build) -> None:
    with torch.no_grad():
        expected = tiny_llama(vocab_size=100)(IDS).logits
    for route in ("others", {"others": 1.0}, {"math": 0.0}, Route.one_hot(["others"] * 4, ["math"])):
        assert torch.equal(routed(bank, route), expected)
    with bank.base_only() as model, torch.no_grad():
        assert model is bank.base_model and torch.equal(model(IDS).logits, expected)
        with bank.routed("math"):
            assert not torch.equal(model(IDS).logits, expected)
        assert torch.equal(model(IDS).logits, expected)


@pytest.mark.parametrize("residual", [True, False])
def test_mixtures_are_those_of_add_weighted_adapter(bank: ExpertBank, residual: bool) -> None:
    weights = {"math": 0.7, "code": -0.4}
    bank.model.add_weighted_adapter([*weights], [*weights.values()], "mixed", residual=residual)
    expected = alone(bank, "mixed")
    torch.testing.assert_close(routed(bank, Route.mixture(weights, 4, residual)), expected, rtol=1e-4, atol=1e-5)
    if residual:
        torch.testing.assert_close(routed(bank, weights), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(routed(bank, {**weights, "others": 0.7}), expected, rtol=1e-4, atol=1e-5)


def test_groups_of_the_bank_cover_every_matrix(bank: ExpertBank) -> None:
    assert bank.layer_groups() == ("model.layers.0", "model.layers.1")
    assert len(bank.matrix_groups()) == 14 and "model.layers.1.mlp.up_proj" in bank.matrix_groups()
    row = torch.tensor([[0.7, -0.4]])
    expected = routed(bank, Route(row.expand(4, -1), ("math", "code")))
    for groups in (bank.layer_groups(), bank.matrix_groups()):
        weights = row.expand(4, len(groups), 2)
        torch.testing.assert_close(
            routed(bank, Route(weights, ("math", "code"), groups=groups)), expected, rtol=1e-5, atol=1e-5
        )
    first, second = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])  # (groups, experts)
    weights = torch.stack([first, second, first + second, 0 * first])  # (rows, groups, experts)
    by_layer = routed(bank, Route(weights, ("math", "code"), groups=bank.layer_groups()))
    torch.testing.assert_close(by_layer[2], routed(bank, "math")[2], rtol=1e-5, atol=1e-5)
    assert torch.equal(by_layer[3], routed(bank, "others")[3])
    assert min((by_layer[i] - by_layer[j]).abs().max() for i in range(4) for j in range(i)) > 0.1


def test_a_classifier_is_no_expert_but_can_be_routed_to(
    tiny_llama: Build, character_tokenizer: PreTrainedTokenizerFast, add_experts: Callable[..., PeftModel]
) -> None:
    model = add_experts(tiny_llama(vocab_size=100), names=("math", "judge"))
    bank = ExpertBank(model, character_tokenizer, classifier="judge")
    assert list(bank.experts) == ["math"]
    assert torch.equal(routed(bank, "judge"), alone(bank, "judge"))


def test_an_expert_that_is_added_to_a_live_bank(bank: ExpertBank) -> None:
    with bank.routed("math"):
        expected = bank.model.generate(IDS, **GREEDY)
        bank.model.add_adapter("new", SVFConfig(init_weights=False))
        assert torch.equal(bank.model.generate(IDS, **GREEDY), expected)
        route = Route.one_hot(["new", "math", "others", "new"], ["math", "new"])
        with bank.routed(route):
            found = bank.model.generate(IDS, **GREEDY)
        assert torch.equal(found[1], expected[1]) and torch.equal(bank.model.generate(IDS, **GREEDY), expected)


@pytest.mark.parametrize(
    ("route", "message"),
    [
        ("typo", "Unknown expert 'typo'; this bank knows 'math', 'code', 'others'"),
        ({"typo": 0.5}, "Unknown expert 'typo'"),
        (None, "a Route, an expert's name or a mixture by expert, not None"),
        ({"math": math.nan}, "must be finite numbers"),
        (Route.one_hot(["typo"] * 4, ["typo"]), "typo; loaded are"),
        (Route.one_hot(["math"] * 3, ["math"]), "got 3 and 4 respectively.*rows of a route"),
        (Route.one_hot(["math"] * 8, ["math"]), "got 8 and 4"),
        (Route(torch.zeros(0, 1), ("math",)), "got 0 and 4"),
        (
            Route(torch.zeros(4, 1, 1), ("math",), groups=("model.layers.0",)),
            r"no group has weights .*model\.layers\.1",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_routes_are_refused_and_leave_nothing(bank: ExpertBank, route: Any, message: str) -> None:
    expected = alone(bank, "code")
    with pytest.raises(ValueError, match=message):
        routed(bank, route)
    assert torch.equal(bank.model(IDS).logits, expected)
    assert "generate" not in vars(bank.base_model)


def test_a_merged_expert_is_refused(bank: ExpertBank) -> None:
    bank.model.merge_adapter(["math"])
    for route in ("code", "others", Route.one_hot(["others"] * 4, ["math"])):
        with pytest.raises(ValueError, match="unmerge_adapter"):
            routed(bank, route)


def test_a_bank_without_experts_has_one_route(tiny_llama: Build, character_tokenizer: Any) -> None:
    bank = ExpertBank(tiny_llama(vocab_size=100), character_tokenizer)
    with bank.base_only() as model, torch.no_grad():
        assert model(IDS).logits.shape[0] == 4
    with (
        pytest.raises(ValueError, match="has no experts, so it cannot be routed to"),
        bank.routed(Route.one_hot(["math"], ["math"])),
    ):
        pytest.fail("entered")
