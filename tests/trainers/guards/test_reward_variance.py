"""One warning for rewards without spread, with what they mean and what to try, in real runs on a tiny model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_svf.trainers import SVFPolicyGradientTrainer


MakeTrainer = Callable[..., SVFPolicyGradientTrainer]
Reward = Callable[..., list[float | None]]


def constant(value: float | None) -> Reward:
    def reward(completions: list[Any], **kwargs: Any) -> list[float | None]:
        return [value] * len(completions)

    return reward


def by_prompt(completions: list[Any], index: list[int], **kwargs: Any) -> list[float | None]:
    return [1.0 if i % 2 else -1.0 for i in index]


def spread_at(*steps: int) -> Reward:
    """The same for every answer, except in these steps (the first is 1)."""

    def reward(completions: list[Any], trainer_state: Any, **kwargs: Any) -> list[float | None]:
        first = 1.0 if trainer_state.global_step + 1 in steps else -1.0
        return [first, *([-1.0] * (len(completions) - 1))]

    return reward


@pytest.fixture
def warnings_of(make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture) -> Callable[..., list[str]]:
    """Trains with a reward and returns the warnings of this guard. Answers are long enough to end."""

    def train(reward: Any, resume_from_checkpoint: str | None = None, **options: Any) -> list[str]:
        settings = {
            "max_steps": 5,
            "zero_variance_patience": 3,
            "logging_steps": 100,
            "collapse_patience": 0,
            **options,
        }
        trainer = make_trainer({"reward_funcs": reward}, **settings)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            trainer.train(resume_from_checkpoint=resume_from_checkpoint)
        return [r.getMessage() for r in caplog.records if r.name.endswith("reward_variance")]

    return train


@pytest.mark.parametrize("baseline", ["none", "batch"])
def test_an_unreachable_reward_is_called_sparse_once(warnings_of: Callable[..., list[str]], baseline: str) -> None:
    [message] = warnings_of(constant(-1.0), baseline=baseline, max_steps=6)
    assert message.startswith("No learning signal: for the 3 steps up to step 3 all answers of one batch")
    for advice in ("sparse rewards", "easier prompts", "partial credit", "`num_generations`", "`temperature` (now 1)"):
        assert advice in message


def test_answers_that_are_cut_off_are_the_first_suspect(warnings_of: Callable[..., list[str]]) -> None:
    [message] = warnings_of(constant(0.0), max_completion_length=1)
    assert "of the answers are cut off: first try a longer `max_completion_length` (now 1)" in message


def test_a_solved_task_is_no_sparse_reward(warnings_of: Callable[..., list[str]]) -> None:
    [message] = warnings_of(constant(0.3))  # 0.3 is no float32: a mean of it has a rounding error
    assert "the task is solved" in message and "sparse" not in message


def test_nothing_that_can_be_judged(warnings_of: Callable[..., list[str]]) -> None:
    [message] = warnings_of(constant(None))
    assert "returned None for every one" in message


def test_groups_without_spread_count_where_groups_are_compared(warnings_of: Callable[..., list[str]]) -> None:
    [message] = warnings_of(by_prompt, baseline="group", num_generations=4)
    assert "all answers to one prompt had the same reward" in message
    assert "some prompts are always solved and the others never" in message and "(`num_generations`, now 4)" in message
    assert warnings_of(by_prompt, baseline="batch", num_generations=4) == []
    [message] = warnings_of(constant(-1.0), baseline="group", num_generations=4)
    assert "sparse rewards" in message


def test_one_step_with_spread_begins_a_new_episode(warnings_of: Callable[..., list[str]]) -> None:
    first, second = warnings_of(spread_at(1, 5), max_steps=9)
    assert "up to step 4 " in first and "up to step 8 " in second
    assert warnings_of(spread_at(1, 3, 5), max_steps=7) == []


def test_spread_in_one_of_several_generation_batches_is_a_signal(warnings_of: Callable[..., list[str]]) -> None:
    calls: list[int] = []

    def every_fourth(completions: list[Any], **kwargs: Any) -> list[float | None]:
        calls.append(0)
        return [1.0 if len(calls) % 4 == 0 else -1.0, *([-1.0] * (len(completions) - 1))]

    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 1}
    assert warnings_of(every_fourth, max_steps=3, zero_variance_patience=1, **options) == []
    assert len(calls) == 12
    assert len(warnings_of(constant(-1.0), max_steps=1, zero_variance_patience=1, **options)) == 1


@pytest.mark.parametrize("patience", [0, 6])
def test_silent_if_turned_off_or_patient(warnings_of: Callable[..., list[str]], patience: int) -> None:
    assert warnings_of(constant(-1.0), zero_variance_patience=patience) == []


def test_counts_on_after_resuming(warnings_of: Callable[..., list[str]], tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    assert warnings_of(constant(-1.0), max_steps=2, **saving) == []
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    [message] = warnings_of(constant(-1.0), checkpoint, max_steps=4, **saving)
    assert "up to step 3 " in message
    assert warnings_of(constant(-1.0), str(tmp_path / "run" / "checkpoint-4"), max_steps=6) == []  # has warned
