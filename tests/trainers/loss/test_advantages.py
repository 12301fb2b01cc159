"""Baselines: each answer against the mean of the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_svf.trainers.loss.advantages import subtract_baseline


@pytest.mark.parametrize("baseline", ["batch", "group"])
def test_baseline_is_the_mean_of_the_other_judged_answers(baseline: Any) -> None:
    torch.manual_seed(0)
    rewards = torch.randn(12)
    rewards[[2, 7, 8]] = torch.nan
    advantages = subtract_baseline(rewards, baseline, num_generations=4)
    for i, reward in enumerate(rewards.tolist()):
        group = range(12) if baseline == "batch" else range(i // 4 * 4, i // 4 * 4 + 4)
        others = [rewards[j].item() for j in group if j != i and not rewards[j].isnan()]
        expected = 0.0 if reward != reward else reward - sum(others) / len(others)
        assert advantages[i].item() == pytest.approx(expected, abs=1e-6)


def test_without_baseline_rewards_are_kept_and_unjudged_answers_teach_nothing() -> None:
    rewards = torch.tensor([1.0, -1.0, torch.nan, 1.0])
    assert subtract_baseline(rewards, "none", 1).tolist() == [1.0, -1.0, 0.0, 1.0]


def test_leaving_one_out_is_mean_subtraction_times_n_over_n_minus_one() -> None:
    rewards = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0])
    torch.testing.assert_close(subtract_baseline(rewards, "batch", 1), (rewards - rewards.mean()) * 5 / 4)


@pytest.mark.parametrize("baseline", ["batch", "group"])
def test_equal_rewards_teach_nothing(baseline: Any) -> None:
    assert subtract_baseline(torch.full((6,), -1.0), baseline, 3).tolist() == [0.0] * 6
