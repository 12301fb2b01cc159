"""Validation that tells the truth, and the base model as a candidate for the best checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback

from peft_svf.trainers import SVFPolicyGradientTrainer
from peft_svf.trainers.decoding import decoding_temperature


MakeTrainer = Callable[..., SVFPolicyGradientTrainer]


def by_index(value: Callable[[int], float | None]) -> Callable[..., list[float | None]]:
    """A reward that depends on the row alone, so that its mean is known."""

    def reward(completions: list[Any], index: list[int], **kwargs: Any) -> list[float | None]:
        return [value(i) for i in index]

    return reward


class Scripted:
    """A reward that is `scores[k]` in the k-th evaluation and ±1 by row in training."""

    __name__ = "scripted"

    def __init__(self, scores: list[float]) -> None:
        self.scores = scores
        self.evaluations = 0
        self.trainer: SVFPolicyGradientTrainer

    def __call__(self, completions: list[Any], index: list[int], **kwargs: Any) -> list[float]:
        if self.trainer.model.training:
            return [1.0 if i % 2 else -1.0 for i in index]
        return [self.scores[min(self.evaluations, len(self.scores) - 1)]] * len(completions)


class CountEvaluations(TrainerCallback):
    def __init__(self, reward: Scripted) -> None:
        self.reward = reward

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.reward.evaluations += 1


def scripted_trainer(make_trainer: MakeTrainer, scores: list[float], **options: Any) -> SVFPolicyGradientTrainer:
    """Evaluates before the first step and after every two of six; the k-th evaluation scores `scores[k]`."""
    reward = Scripted(scores)
    callbacks = [CountEvaluations(reward), *options.pop("callbacks", [])]
    settings = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, **options}
    trainer = make_trainer({"reward_funcs": reward, "callbacks": callbacks}, **settings)
    reward.trainer = trainer
    return trainer


def offsets(trainer: SVFPolicyGradientTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def test_greedy_validation_gives_the_same_numbers_twice(make_trainer: MakeTrainer, tiny: SimpleNamespace) -> None:
    trainer = make_trainer(kl_coef=0.1)
    tiny.randomize_offsets(trainer.model)
    first, second = trainer.evaluate(), trainer.evaluate()
    timing = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    assert {k: v for k, v in first.items() if k not in timing} == {k: v for k, v in second.items() if k not in timing}
    assert trainer.state.log_history[-1]["eval_kl"] > 0


def test_validation_at_a_temperature_samples_and_leaves_training_as_it_was(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(eval_temperature=0.7, num_generations_eval=2)
    before = trainer.generation_config
    with decoding_temperature(trainer, 0.7):
        assert trainer.generation_config.do_sample and trainer.generation_config.temperature == 0.7
    assert trainer.generation_config is before and before.temperature == 1.0
    assert "eval_reward" in trainer.evaluate()


def test_greedy_decoding_is_undone_when_it_raises(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    before = trainer.generation_config, trainer.generation_kwargs
    with pytest.raises(RuntimeError, match="stop"), decoding_temperature(trainer, 0.0):
        assert not trainer.generation_config.do_sample
        raise RuntimeError("stop")
    assert (trainer.generation_config, trainer.generation_kwargs) == before


def test_eval_reward_is_the_mean_over_samples_with_an_odd_last_batch(make_trainer: MakeTrainer) -> None:
    """65 rows in batches of 32, 32 and 1: the mean of batch means would be off."""
    trainer = make_trainer({"reward_funcs": by_index(lambda i: 1.0 if i < 5 else -1.0)})
    metrics = trainer.evaluate(trainer.train_dataset.select([*range(64), 0]))
    expected = torch.tensor([1.0 if i < 5 else -1.0 for i in [*range(64), 0]])
    assert metrics["eval_reward"] == pytest.approx(expected.mean().item())
    assert metrics["eval_reward_std"] == pytest.approx(expected.std().item())
    assert trainer.state.log_history[-1]["eval_reward"] == metrics["eval_reward"]


def test_rows_that_cannot_be_judged_are_in_no_mean(make_trainer: MakeTrainer) -> None:
    rewards = [by_index(lambda i: None if i % 3 else 1.0), by_index(lambda i: None if i % 2 else -1.0)]
    rewards[0].__name__, rewards[1].__name__ = "third", "half"
    metrics = make_trainer({"reward_funcs": rewards}, reward_weights=[1.0, 0.5]).evaluate()
    sums = [(i % 3 == 0) - 0.5 * (i % 2 == 0) for i in range(21) if i % 3 == 0 or i % 2 == 0]
    assert metrics["eval_reward"] == pytest.approx(sum(sums) / len(sums))
    assert metrics["eval_rewards/third/mean"] == 1.0 and metrics["eval_rewards/half/mean"] == -1.0


def test_every_eval_dataset_has_its_own_name(make_trainer: MakeTrainer, tiny: SimpleNamespace) -> None:
    datasets = {"low": tiny.prompts(10), "high": tiny.prompts(20).select(range(10, 20))}
    trainer = make_trainer(
        {"eval_dataset": datasets, "reward_funcs": by_index(lambda i: -1.0 if i < 10 else 1.0)}, kl_coef=0.1
    )
    metrics = trainer.evaluate()
    assert (metrics["eval_low_reward"], metrics["eval_high_reward"]) == (-1.0, 1.0)
    logged = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    assert (logged["eval_low_reward"], logged["eval_high_reward"]) == (-1.0, 1.0)
    assert "eval_low_kl" in logged and "eval_reward" not in logged


def test_best_checkpoint_is_restored(make_trainer: MakeTrainer) -> None:
    trainer = scripted_trainer(make_trainer, [0.0, 0.2, 0.8, 0.4])
    trainer.train()
    assert trainer.state.best_global_step == 4 and trainer.base_eval_reward == 0.0
    saved = load_file(Path(trainer.state.best_model_checkpoint) / "adapter_model.safetensors")
    saved_offsets = {name.replace(".weight", ".default.weight"): value for name, value in saved.items()}
    current = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert saved_offsets.keys() == current.keys()
    assert all(torch.equal(current[name], saved_offsets[name]) for name in current)
    assert offsets(trainer).abs().max() > 0


@pytest.mark.parametrize("scores", [[0.5, 0.2, 0.4, 0.3], [0.5, 0.5, 0.5, 0.5]], ids=["worse", "no better"])
@pytest.mark.parametrize("save_strategy", ["steps", "best"])
def test_base_model_wins_over_checkpoints_that_are_not_better(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture, scores: list[float], save_strategy: str
) -> None:
    trainer = scripted_trainer(make_trainer, scores, save_strategy=save_strategy)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert offsets(trainer).abs().max() == 0
    assert trainer.base_eval_reward == trainer.state.best_metric == 0.5
    best = max(scores[1:])
    (message,) = [r.getMessage() for r in caplog.records if "No checkpoint is better" in r.getMessage()]
    assert f"0.5 at step 0, at best {best:.4g} at step" in message and "starting offsets are restored" in message
    if save_strategy == "best":
        assert not list(Path(trainer.args.output_dir).glob("checkpoint-*"))


def test_a_destructive_learning_rate_ends_at_the_base_model(make_trainer: MakeTrainer, tiny: SimpleNamespace) -> None:
    """No script: the share of distinct words, which the random model has and a broken one loses."""

    def varied(completions: list[Any], **kwargs: Any) -> list[float]:
        words = [completion[0]["content"].split() for completion in completions]
        return [len(set(w)) / max(len(w), 1) for w in words]

    def misleading(completions: list[Any], trainer_state: Any, **kwargs: Any) -> list[float]:
        sign = -1.0 if trainer.model.training else 1.0  # trains against what it is judged by
        return [sign * value for value in varied(completions)]

    trainer = make_trainer(
        {"reward_funcs": misleading},
        max_steps=8,
        learning_rate=0.5,
        eval_strategy="steps",
        eval_steps=4,
        load_best_model_at_end=True,
    )
    trainer.train()
    history = trainer._eval_history()
    assert max(history[4], history[8]) <= history[0]
    assert offsets(trainer).abs().max() == 0
    assert trainer.evaluate()["eval_reward"] == trainer.base_eval_reward


def test_an_expert_that_training_made_worse_comes_back_as_it_was_given(
    make_trainer: MakeTrainer, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    first = make_trainer()
    tiny.randomize_offsets(first.model)
    first.save_model(str(tmp_path / "expert"))
    given = offsets(first)
    model = PeftModel.from_pretrained(tiny.model(), tmp_path / "expert", is_trainable=True)
    reward = Scripted([0.5, 0.1])
    trainer = make_trainer(
        {"model": model, "peft_config": None, "reward_funcs": reward, "callbacks": [CountEvaluations(reward)]},
        max_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )
    reward.trainer = trainer
    trainer.train()
    assert torch.equal(offsets(trainer), given)


def test_without_an_evaluation_after_the_start_the_last_offsets_are_kept(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = scripted_trainer(make_trainer, [0.5], max_steps=1, eval_delay=10)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert offsets(trainer).abs().max() > 0
    assert "No evaluation took place after the first step" in caplog.text


def test_resuming_still_has_to_beat_the_base_model(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    scripted_trainer(make_trainer, [0.5, 0.1, 0.2, 0.3]).train()
    trainer = scripted_trainer(make_trainer, [0.4, 0.4])
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert trainer.base_eval_reward == trainer.state.best_metric == 0.5
    assert offsets(trainer).abs().max() == 0


def test_early_stopping_counts_from_the_base_model(make_trainer: MakeTrainer) -> None:
    callbacks = [EarlyStoppingCallback(early_stopping_patience=2)]
    trainer = scripted_trainer(make_trainer, [0.5, 0.4, 0.3, 0.2], callbacks=callbacks, max_steps=20)
    trainer.train()
    assert trainer.state.global_step == 4
