"""Routes keep their promises about shape and meaning."""

from __future__ import annotations

import pytest
import torch

from peft_svf.dispatch import Route
from peft_svf.dispatch.route import user_text


def test_one_hot_and_chosen_are_inverse():
    names = ["code", "others", "math"]
    route = Route.one_hot(names, ["math", "code"])
    assert route.weights.tolist() == [[0, 1], [0, 0], [1, 0]]
    assert route.chosen() == names
    assert route.scores == (None, None, None)
    assert len(route) == 3


def test_a_mixture_has_no_chosen_expert():
    route = Route(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), ("math", "code"), (None, None))
    with pytest.raises(ValueError, match="Row 1 of the route is the mixture"):
        route.chosen()


@pytest.mark.parametrize(
    ("weights", "message"),
    [(torch.zeros(3, 2), "expected .* \\(2, 2\\)"), (torch.full((2, 2), float("nan")), "finite")],
)
def test_broken_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        Route(weights, ("math", "code"), (None, None))


def test_an_unknown_expert_is_refused():
    with pytest.raises(ValueError, match=r"unknown expert 'maths'.*'math'"):
        Route.one_hot(["maths"], ["math"])


def test_the_last_user_message_of_a_chat_is_classified():
    chat = [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "answer"},
        {"role": "user", "content": [{"type": "text", "text": "second"}, {"type": "image"}]},
        {"role": "assistant", "content": "prefill"},
    ]
    assert user_text(chat) == "second"
    assert user_text("plain") == "plain"
    with pytest.raises(ValueError, match="no user message"):
        user_text([{"role": "system", "content": "x"}])


def test_rows_are_chosen_and_repeated_with_their_scores() -> None:
    scores = ({"math": 0.9}, None, {"code": 0.6})
    route = Route.one_hot(["math", "others", "code"], ["math", "code"], scores)
    assert route[1:].chosen() == ["others", "code"] and route[1:].scores == (None, {"code": 0.6})
    assert route[[2, 0, 2]].chosen() == ["code", "math", "code"] and route[[2, 0]].scores == (scores[2], scores[0])
    assert route.repeat_rows(2).chosen() == ["math", "math", "others", "others", "code", "code"]
    assert route.repeat_rows(2).scores == (scores[0], scores[0], None, None, scores[2], scores[2])
    assert len(route[:0]) == 0 and route[:0].weights.shape == (0, 2)


def test_routes_of_different_experts_are_put_together_by_name() -> None:
    one = Route.one_hot(["math", "others"], ["math", "code"], [{"math": 1.0}, None])
    other = Route(torch.tensor([[0.3, 0.7]]), ("law", "math"))
    both = Route.concatenate([one, other])
    assert both.experts == ("math", "code", "law")
    assert both.row_weights() == [{"math": 1.0}, {}, {"law": pytest.approx(0.3), "math": pytest.approx(0.7)}]
    assert both.names() == ["math", "others", "mixture"] and both.scores == ({"math": 1.0}, None, None)
    for routes in ([], [one, Route.mixture({"math": 1.0}, residual=False)]):
        with pytest.raises(ValueError, match="same groups and the same convention"):
            Route.concatenate(routes)


def test_a_mixture_names_the_base_as_the_rest() -> None:
    route = Route.mixture({"math": 0.25, "others": 0.75}, rows=3)
    assert route.experts == ("math",) and route.weights.tolist() == [[0.25]] * 3
    assert Route.mixture({"others": 1.0}, rows=2).chosen() == ["others", "others"]


def test_groups_have_weights_of_their_own() -> None:
    weights = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    route = Route(weights, ("math", "code"), groups=("model.layers.0", "model.layers.1"))
    assert route.names() == ["math", "mixture", "others"]
    assert route.row_weights() == [{"math": 1.0}, {"math": 0.5, "code": 0.5}, {}]
    assert route[[1]].groups == route.groups and route[[1]].weights.shape == (1, 2, 2)
    with pytest.raises(ValueError, match=r"rows, groups, experts\) \(3, 1, 2\)"):
        Route(weights, ("math", "code"), groups=("model",))
    with pytest.raises(ValueError, match="'model' is there twice"):
        Route(weights, ("math", "code"), groups=("model", "model"))
    with pytest.raises(ValueError, match="'math' is there twice"):
        Route(torch.zeros(1, 2), ("math", "math"))


def test_zeros_are_the_base_model_only_under_the_residual_convention() -> None:
    assert Route(torch.zeros(1, 1), ("math",)).chosen() == ["others"]
    assert Route(torch.zeros(1, 1), ("math",), residual=False).names() == ["mixture"]
