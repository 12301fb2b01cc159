"""Runs that collapse are stopped and end at something sound; runs whose answers change for the better are not."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM, TrainerCallback, TrainerControl

from peft_svf.trainers import SVFPolicyGradientTrainer
from peft_svf.trainers.guards.collapse import CollapseCallback


MakeTrainer = Callable[..., SVFPolicyGradientTrainer]


def lengths(completions: list[Any]) -> list[int]:
    return [len(completion[0]["content"].split()) for completion in completions]


def longest_wins(completions: list[Any], **kwargs: Any) -> list[float]:
    """Answers race against one another, as before a judge that prefers the longer one: nobody gains."""
    words = lengths(completions)
    median = sorted(words)[len(words) // 2]
    return [1.0 if n > median else -1.0 for n in words]


def number_of_words(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(n) for n in lengths(completions)]


def brevity(completions: list[Any], **kwargs: Any) -> list[float]:
    return [-float(n) for n in lengths(completions)]


@pytest.fixture
def make_run(make_trainer: MakeTrainer, tiny: SimpleNamespace) -> MakeTrainer:
    """A model whose answers have 4 words on average, 22 % of them cut off, and which learns within a few steps."""

    def make(reward: Any, **options: Any) -> SVFPolicyGradientTrainer:
        model: LlamaForCausalLM = tiny.model()
        with torch.no_grad():
            model.lm_head.weight.mul_(4.0)
        model.generation_config.eos_token_id = [2, *range(5, 15)]
        settings = {
            "max_steps": 20,
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 32,
            "max_completion_length": 8,
            "collapse_patience": 4,
            "zero_variance_patience": 0,
            **options,
        }
        return make_trainer({"model": model, "reward_funcs": reward}, **settings)

    return make


def offsets(trainer: SVFPolicyGradientTrainer) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def is_at(trainer: SVFPolicyGradientTrainer, checkpoint: Path) -> bool:
    saved = load_file(checkpoint / "adapter_model.safetensors")
    expected = {name.replace(".weight", ".default.weight"): value for name, value in saved.items()}
    found = offsets(trainer)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def is_at_start(trainer: SVFPolicyGradientTrainer) -> bool:
    return all(bool((value == 0).all()) for value in offsets(trainer).values())


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.endswith(("collapse", "guarded_training"))]


@pytest.mark.parametrize("options", [{}, {"logging_steps": 100, "gradient_accumulation_steps": 2}])
def test_answers_that_never_end_stop_the_run_at_the_start(
    make_run: MakeTrainer, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    trainer = make_run(longest_wins, max_steps=40, **options)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    stopped, restored = messages(caplog)
    step = trainer.state.global_step
    assert 5 <= step < 40 and f"training stops at step {step}. For " in stopped
    assert "of the answers are cut off at `max_completion_length` (" in stopped and "lower `learning_rate`" in stopped
    assert "the starting offsets are restored" in restored and is_at_start(trainer)


def test_without_the_guard_the_same_run_ends_in_answers_that_never_end(make_run: MakeTrainer) -> None:
    trainer = make_run(longest_wins, collapse_patience=0)
    trainer.train()
    last = [entry for entry in trainer.state.log_history if "reward" in entry][-1]
    assert trainer.state.global_step == 20 and not is_at_start(trainer)
    assert last["completions/clipped_ratio"] > 0.8 and last["reward"] == -1.0


@pytest.mark.parametrize(
    ("reward", "name", "change"), [(number_of_words, "clipped_ratio", 4), (brevity, "mean_length", 0.5)]
)
def test_answers_that_grow_or_shrink_with_the_reward_are_left_alone(
    make_run: MakeTrainer, caplog: pytest.LogCaptureFixture, reward: Any, name: str, change: float
) -> None:
    trainer = make_run(reward, kl_coef=1e-6, collapse_kl=0.5)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    entries = [entry for entry in trainer.state.log_history if "reward" in entry]
    first, last = entries[0][f"completions/{name}"], entries[-1][f"completions/{name}"]
    assert last >= change * first if change > 1 else last <= change * first
    assert entries[-1]["kl"] > 0.5 and entries[-1]["reward"] > entries[0]["reward"] + 1
    assert trainer.state.global_step == 20 and messages(caplog) == []


def test_a_kl_that_explodes_while_the_reward_is_lost(make_run: MakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make_run(longest_wins, kl_coef=1e-6, collapse_kl=0.2, collapse_patience=3)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "the KL from the base model is " in messages(caplog)[0] and trainer.state.global_step < 15


def learns_then_races(completions: list[Any], trainer_state: Any, **kwargs: Any) -> list[float]:
    """A reward for answers of four words that becomes, after four steps, a race for length."""
    if trainer_state.global_step < 4:
        return [-float(abs(n - 4)) for n in lengths(completions)]
    return [value - 10.0 for value in longest_wins(completions)]


def test_the_best_checkpoint_from_before_is_restored_also_by_a_resumed_run(
    make_run: MakeTrainer, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 20, "kl_coef": 1e-6}
    trainer = make_run(learns_then_races, **options)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    step = trainer.state.global_step
    assert step < 20
    rewards = {e["step"]: e["reward"] for e in trainer.state.log_history if "reward" in e}
    means = {s: sum(rewards[i] for i in range(max(1, s - 3), s + 1)) / min(s, 4) for s in rewards if s % 2 == 0}
    best = max(means, key=lambda at: means[at])
    assert 0 < best < step - 4 and means[best] > rewards[1]
    assert f"checkpoint-{best} are restored" in messages(caplog)[1]
    assert is_at(trainer, tmp_path / "run" / f"checkpoint-{best}") and not is_at_start(trainer)

    resumed = make_run(learns_then_races, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{(step - 1) // 2 * 2}"))
    assert resumed.state.global_step == step and is_at(resumed, tmp_path / "run" / f"checkpoint-{best}")


def test_a_run_killed_after_the_checkpoint_of_its_collapse_does_not_go_on(
    make_run: MakeTrainer, tmp_path: Path
) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 20}
    trainer = make_run(longest_wins, **options)
    trainer.train()
    step = trainer.state.global_step
    resumed = make_run(longest_wins, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
    assert resumed.state.global_step == step < 20
    found = offsets(resumed)
    assert all(torch.equal(found[name], value) for name, value in offsets(trainer).items())


def test_a_resumed_run_that_collapses_ends_at_the_start_of_the_run(make_run: MakeTrainer, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 20}
    make_run(longest_wins, **options).train()
    resumed = make_run(longest_wins, **options)
    resumed._start = {name: tensor + 1.0 for name, tensor in resumed._start.items()}  # as of an expert that is loaded
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.global_step < 20 and is_at_start(resumed)


class Evaluations(TrainerCallback):
    """Adds 0.1 to the score of the evaluation at one step."""

    def __init__(self, best: int) -> None:
        self.best = best

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        metrics["eval_reward"] = 0.1 if state.global_step == self.best else -1.0
        for entry in state.log_history:
            if "eval_reward" in entry and entry["step"] == state.global_step:
                entry["eval_reward"] = metrics["eval_reward"]


@pytest.mark.parametrize("best", [0, 2])
def test_the_best_by_validation_is_restored_where_there_is_one(
    make_run: MakeTrainer, caplog: pytest.LogCaptureFixture, tmp_path: Path, best: int
) -> None:
    trainer = make_run(longest_wins, load_best_model_at_end=True, eval_strategy="steps", eval_steps=2, max_steps=40)
    trainer.add_callback(Evaluations(best))
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert len(messages(caplog)) == 1 and trainer.state.global_step < 40  # it stopped, and others restored
    assert is_at_start(trainer) if best == 0 else is_at(trainer, tmp_path / "run" / "checkpoint-2")


def test_a_collapse_before_the_first_evaluation_ends_at_the_start(make_run: MakeTrainer) -> None:
    trainer = make_run(longest_wins, load_best_model_at_end=True, eval_strategy="steps", eval_steps=100, max_steps=40)
    trainer.train()
    assert trainer.state.global_step < 40 and is_at_start(trainer)


HEALTHY = {
    "reward": -0.5,
    "completions/clipped_ratio": 0.1,
    "completions/mean_length": 100.0,
    "entropy": 1.0,
    "kl": 0.0,
}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"completions/clipped_ratio": 0.95}, "95% of the answers are cut off at `max_completion_length` (10% at"),
        ({"completions/mean_length": 9.0}, "answers have 9 tokens (100 at the start)"),
        ({"entropy": 6.0}, "the entropy is 6 a token (1 at the start)"),
        ({"kl": 1.5}, "the KL from the base model is 1.5 a token (0 at the start)"),
        ({"completions/clipped_ratio": 0.85}, None),
        ({"completions/mean_length": 12.0}, None),
        ({"entropy": 5.0}, None),
        ({"kl": 0.9}, None),
        ({"kl": 1.5, "reward": -0.1}, None),
        ({"completions/clipped_ratio": 0.95, "reward": -0.1}, None),
    ],
)
def test_every_sign_by_its_threshold(
    changes: dict[str, float], says: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    callback, control = CollapseCallback(), TrainerControl()
    args = SimpleNamespace(collapse_patience=3, collapse_kl=1.0)
    text_config = SimpleNamespace(vocab_size=32000)  # log(32000) / 2 is 5.19
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text_config))
    stops = []
    for i, step in enumerate([HEALTHY, *[{**HEALTHY, **changes}] * 2, HEALTHY, *[{**HEALTHY, **changes}] * 3]):
        state = SimpleNamespace(global_step=i + 1, is_world_process_zero=True)
        callback.observe({**step, "unused": math.nan})
        callback.on_step_end(args, state, control, model=model)  # type: ignore[arg-type]
        stops.append(control.should_training_stop)
    assert stops == [False] * 6 + [says is not None]  # one healthy step in between begins the count anew
    assert says is None or says in caplog.text


def test_the_reward_may_fall_to_half_of_its_gain(caplog: pytest.LogCaptureFixture) -> None:
    for last, stops in ((0.1, False), (-0.1, True)):
        callback, control = CollapseCallback(), TrainerControl()
        args = SimpleNamespace(collapse_patience=2, collapse_kl=1.0)
        model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=32000)))
        for i, (reward, kl) in enumerate([(-0.5, 0.0), (0.5, 0.0), (0.5, 0.0), (last, 2.0), (last, 2.0)]):
            callback.observe({**HEALTHY, "reward": reward, "kl": kl})
            state = SimpleNamespace(global_step=i + 1, is_world_process_zero=True)
            callback.on_step_end(args, state, control, model=model)  # type: ignore[arg-type]
        assert control.should_training_stop == stops
