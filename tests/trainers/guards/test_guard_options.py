"""Options of the guards: what is refused, and early stopping by configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback

from peft_svf.trainers import SVFPolicyGradientConfig, SVFPolicyGradientTrainer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"early_stopping_patience": 3}, "`early_stopping_patience` .*needs `load_best_model_at_end=True`"),
        ({"early_stopping_patience": 0}, "at least 1, not 0"),
        ({"zero_variance_patience": -1}, "`zero_variance_patience` is a number of steps, or 0 for never, not -1"),
        ({"collapse_patience": -2}, "`collapse_patience` is a number of steps"),
        ({"collapse_kl": 0.0}, "`collapse_kl` .*must be positive.*`collapse_patience=0` turns"),
        ({"collapse_kl": float("nan")}, "`collapse_kl` .*must be positive"),
    ],
)
def test_bad_options_are_refused_with_the_remedy(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SVFPolicyGradientConfig(str(tmp_path), use_cpu=True, **options)


def falling(trainer_of: list[SVFPolicyGradientTrainer]) -> Callable[..., list[float]]:
    def reward(completions: list[Any], index: list[int], trainer_state: Any, **kwargs: Any) -> list[float]:
        if trainer_of[0].model.training:
            return [1.0 if i % 2 else -1.0 for i in index]
        return [-0.1 * trainer_state.global_step] * len(completions)

    return reward


def test_early_stopping_counts_from_the_start(make_trainer: Callable[..., SVFPolicyGradientTrainer]) -> None:
    trainers: list[SVFPolicyGradientTrainer] = []
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "max_steps": 12}
    trainers.append(make_trainer({"reward_funcs": falling(trainers)}, early_stopping_patience=3, **options))
    trainers[0].train()
    assert trainers[0].state.global_step == 3
    assert all(bool((p == 0).all()) for p in trainers[0].model.parameters() if p.requires_grad)


def test_no_early_stopping_unless_asked_for(make_trainer: Callable[..., SVFPolicyGradientTrainer]) -> None:
    callbacks = make_trainer().callback_handler.callbacks
    assert not any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks)
