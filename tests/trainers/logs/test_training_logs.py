"""Every metric reaches every `report_to` target, as a number, under the names that users of GRPO know."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from peft_svf.trainers import SVFPolicyGradientTrainer


MakeTrainer = Callable[..., SVFPolicyGradientTrainer]
EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}


class Recorder(TrainerCallback):
    """Keeps every log as a report_to integration gets it."""

    def __init__(self) -> None:
        self.logs: list[tuple[int, dict[str, Any]]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        self.logs.append((state.global_step, dict(logs)))

    def names(self) -> set[str]:
        return {name for _, log in self.logs for name in log}


def recorded(trainer: Any) -> Recorder:
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    return recorder


def test_all_numbers_reach_a_target_in_training_and_evaluation(make_trainer: MakeTrainer) -> None:
    recorder = recorded(make_trainer(**EVALUATED, report_to="none", kl_coef=0.1))
    training = [log for _, log in recorder.logs if "loss" in log]
    evaluations = [log for _, log in recorder.logs if "eval_loss" in log]
    assert len(training) == 4 and len(evaluations) == 2
    everywhere = {"z/rms_change", "z/max_change"}
    names = everywhere | {"reward", "kl", "kl_sequence", "entropy", "policy_loss", "tokens_per_second", "grad_norm"}
    assert all(names <= log.keys() for log in training)
    places = {"z/layers/0", "z/layers/1", "z/modules/q_proj", "z/modules/down_proj"}
    assert all(everywhere | places | {"eval_reward", "eval_kl"} <= log.keys() for log in evaluations)
    assert not any(places & log.keys() for log in training)
    assert places <= recorder.logs[-1][1].keys()  # the last log
    assert {type(value) for _, log in recorder.logs for value in log.values()} <= {float, int}


def test_names_that_users_of_grpo_know_stay(make_trainer: MakeTrainer, tiny: Any, tmp_path: Path) -> None:
    options = {"max_steps": 1, "per_device_train_batch_size": 8, "max_completion_length": 4, "use_cpu": True}
    ours = recorded(make_trainer(**options, report_to="none", num_generations=2))
    trainer = GRPOTrainer(
        tiny.model(),
        tiny.reward,
        GRPOConfig(
            str(tmp_path), **options, num_generations=2, logging_steps=1, report_to="none", bf16=False, beta=0.0
        ),
        tiny.prompts(16),
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(),
    )
    theirs = {name for name in recorded(trainer).names() if not name.startswith("clip_ratio")}  # nothing is clipped
    theirs -= {"total_flos"}  # transformers' printer takes it away before it gets here
    assert {"reward", "rewards/even_digits/mean", "entropy", "completions/mean_length"} <= theirs
    assert theirs - ours.names() == set()


def test_a_metric_without_a_value_is_left_out(make_trainer: MakeTrainer) -> None:
    def never(completions: list[Any], **kwargs: Any) -> list[None]:
        return [None] * len(completions)

    def always(completions: list[Any], **kwargs: Any) -> list[float]:
        return [float(i % 2) for i in range(len(completions))]

    recorder = recorded(make_trainer({"reward_funcs": [never, always]}, **EVALUATED, report_to="none"))
    assert "rewards/always/mean" in recorder.names() and "rewards/never/mean" not in recorder.names()
    assert all(isinstance(value, (int, float)) for _, log in recorder.logs for value in log.values())


def test_evaluate_returns_no_statistics_of_the_offsets(make_trainer: MakeTrainer) -> None:
    metrics = make_trainer(report_to="none").evaluate()
    assert "eval_reward" in metrics and "eval_completions/mean_length" in metrics
    assert not [name for name in metrics if name.startswith("z/")]


def test_adapters_that_are_not_svf_log_all_but_the_statistics(make_trainer: MakeTrainer) -> None:
    recorder = recorded(make_trainer({"peft_config": LoraConfig()}, max_steps=1, report_to="none"))
    assert {"tokens_per_second", "reward"} <= recorder.names()
    assert not [name for name in recorder.names() if name.startswith("z/")]


def test_without_a_target_only_our_files_are_written(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer(**EVALUATED, report_to="none", learning_curve=True).train()
    known = {"learning_curve.csv", "learning_curve.png", "validation_rewards.safetensors"}
    assert {path.name for path in (tmp_path / "run").iterdir()} <= known
    assert os.listdir(tmp_path) == ["run"]


def test_tensorboard_gets_everything(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    reason = "needs tensorboard"
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason=reason)
    trainer = make_trainer(**EVALUATED, report_to="tensorboard")
    recorder = recorded(trainer)
    events = next((tmp_path / "run").rglob("events.out.tfevents.*"))
    reader = accumulator.EventAccumulator(str(events))
    reader.Reload()
    tags = set(reader.Tags()["scalars"])
    expected = {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
        for name in recorder.names()
        if not name.startswith("train_")
    }
    assert expected <= tags
    assert {"train/z/layers/1", "train/tokens_per_second", "eval/reward"} <= tags
    values = [event.value for event in reader.Scalars("train/z/rms_change")]
    logged = [log["z/rms_change"] for _, log in recorder.logs]
    assert values == pytest.approx(logged)
