"""From probabilities to routes: the best label with a margin, or a mixture with the base model at its share."""

from __future__ import annotations

import pytest
import torch

from peft_svf.dispatch.decision import Decision


EXPERTS, LABELS = ("math", "code", "poems"), ("sums", "programs", "verse", "others")
PROBABILITIES = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.1, 0.7, 0.15, 0.05], [0.1, 0.05, 0.05, 0.8]])


def decide(**options):
    return Decision(**options).route(PROBABILITIES.log(), EXPERTS, LABELS)


def test_the_most_probable_label_wins_and_scores_are_by_label():
    route = decide()
    assert route.chosen() == ["math", "code", "others"]
    assert list(route.scores[0]) == list(LABELS)
    torch.testing.assert_close(torch.tensor([list(row.values()) for row in route.scores]), PROBABILITIES)


def test_a_margin_above_the_lead_sends_the_prompt_to_the_base_model():
    assert decide(margin=0.3).chosen() == ["others", "code", "others"]


def test_a_soft_route_leaves_the_share_of_others_to_the_base_model():
    route = decide(mode="soft")
    torch.testing.assert_close(route.weights, PROBABILITIES[:, :3])
    assert route.experts == EXPERTS and route.residual


@pytest.mark.parametrize(
    ("top_k", "first", "last"),
    [
        (1, [0.9, 0, 0], [0.2, 0, 0]),
        (2, [0.9 * 5 / 8, 0.9 * 3 / 8, 0], None),
        (3, [0.5, 0.3, 0.1], [0.1, 0.05, 0.05]),
        (9, [0.5, 0.3, 0.1], [0.1, 0.05, 0.05]),
    ],
)
def test_top_k_experts_share_the_weight_of_all(top_k, first, last):
    weights = decide(mode="soft", top_k=top_k).weights
    torch.testing.assert_close(weights[0], torch.tensor(first))
    if last is not None:
        torch.testing.assert_close(weights[2], torch.tensor(last))
    torch.testing.assert_close(weights.sum(1), 1 - PROBABILITIES[:, 3])


def test_a_label_without_any_probability_makes_no_nan():
    scores = torch.tensor([[-200.0, -200.0, -200.0, 0.0]])
    weights = Decision("soft", top_k=1).route(scores, EXPERTS, LABELS).weights
    assert weights.abs().max() < 1e-30  # and `Route` refuses NaN


def test_temperature_makes_probabilities_more_even():
    for mode in ("best", "soft"):
        scores = decide(mode=mode, temperature=2.0).scores
        expected = PROBABILITIES.sqrt() / PROBABILITIES.sqrt().sum(1, keepdim=True)
        torch.testing.assert_close(torch.tensor([list(row.values()) for row in scores]), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": 1.5}, "between 0 and 1"),
        ({"margin": float("nan")}, "between 0 and 1"),
        ({"mode": "softly"}, '"best" .* or "soft"'),
        ({"mode": "soft", "margin": 0.1}, 'margin belongs to mode="best"'),
        ({"top_k": 2}, 'top_k belongs to mode="soft"'),
        ({"mode": "soft", "top_k": 0}, "at least 1"),
        ({"temperature": 0.0}, "positive"),
    ],
)
def test_options_without_a_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Decision(**options)
