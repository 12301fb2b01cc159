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
