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
from peft_svf.trainers.rollouts.decoding import decoding_temperature
from peft_svf.trainers.statistics import paired_difference_interval, wilson_interval
from peft_svf.trainers.validation.reward_metrics import reward_interval


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


def test_a_second_training_goes_back_to_its_own_start(make_trainer: MakeTrainer) -> None:
    trainer = scripted_trainer(make_trainer, [0.1, 0.2, 0.8, 0.4, 0.8, 0.2, 0.3, 0.4])
    trainer.train()
    best_of_first = offsets(trainer)
    trainer.train()
    assert trainer.best_is_base and trainer.base_eval_reward == pytest.approx(0.8)
    assert best_of_first.abs().max() > 0 and torch.equal(offsets(trainer), best_of_first)


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


# -- intervals -------------------------------------------------------------------------------------------------------
def test_success_is_logged_with_its_interval_under_the_name_of_each_set(
    make_trainer: MakeTrainer, tiny: SimpleNamespace
) -> None:
    """Also where ±1 is the weighted sum of several rewards."""
    rewards = [by_index(lambda i: 1.0 if i % 3 == 0 else -1.0), by_index(lambda i: 1.0 if i % 3 == 0 else -1.0)]
    rewards[0].__name__, rewards[1].__name__ = "first", "second"
    datasets = {"a": tiny.prompts(9), "b": tiny.prompts(40)}
    trainer = make_trainer({"reward_funcs": rewards, "eval_dataset": datasets}, reward_weights=[0.7, 0.3])
    metrics = trainer.evaluate()
    for name, successes, n in [("a", 3, 9), ("b", 14, 40)]:
        low, high = wilson_interval(successes, n)
        expected = {"success": successes / n, "success_low": low, "success_high": high, "unjudged": 0}
        expected |= {"reward_low": 2 * low - 1, "reward_high": 2 * high - 1}
        assert {key: metrics[f"eval_{name}_{key}"] for key in expected} == pytest.approx(expected)
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert {"eval_a_success_low", "eval_b_success_high", "eval_a_unjudged"} <= logged and "eval_success" not in logged


def test_other_rewards_have_a_normal_interval_and_no_success(make_trainer: MakeTrainer) -> None:
    metrics = make_trainer({"reward_funcs": by_index(lambda i: i / 10)}).evaluate()
    values = torch.arange(21) / 10
    half = 1.959964 * values.std().item() / 21**0.5
    assert metrics["eval_reward_low"] == pytest.approx(1.0 - half, rel=1e-5)
    assert metrics["eval_reward_high"] == pytest.approx(1.0 + half, rel=1e-5)
    assert "eval_success" not in metrics


def test_unjudged_answers_are_counted_and_in_no_rate(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer({"reward_funcs": by_index(lambda i: None if i % 3 else (1.0 if i % 2 else -1.0))})
    metrics = trainer.evaluate()  # judged: 0, 3, ..., 18, of which 3, 9 and 15 succeed
    assert metrics["eval_unjudged"] == 14 and metrics["eval_success"] == pytest.approx(3 / 7)
    assert (metrics["eval_success_low"], metrics["eval_success_high"]) == pytest.approx(wilson_interval(3, 7))


def test_several_answers_to_a_prompt_are_one_trial_of_the_interval(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        {"reward_funcs": by_index(lambda i: 1.0 if i % 3 == 0 else -1.0)}, eval_temperature=0.7, num_generations_eval=4
    )
    metrics = trainer.evaluate()
    assert metrics["eval_success"] == pytest.approx(7 / 21)
    assert (metrics["eval_success_low"], metrics["eval_success_high"]) == pytest.approx(wilson_interval(7, 21))


def test_no_interval_without_anything_judged() -> None:
    assert reward_interval(torch.full((3,), torch.nan)) == {}
    assert reward_interval(torch.tensor([0.5, torch.nan])) == {}


# -- the verdict -----------------------------------------------------------------------------------------------------
class Changing(Scripted):
    """Rewards of −1 and +1: the first `counts[k]` rows succeed in the k-th evaluation."""

    def __call__(self, completions: list[Any], index: list[int], **kwargs: Any) -> list[float]:
        if self.trainer.model.training:
            return super().__call__(completions, index, **kwargs)
        return [1.0 if i < self.scores[self.evaluations] else -1.0 for i in index]


def changing_trainer(make_trainer: MakeTrainer, counts: list[int], **options: Any) -> SVFPolicyGradientTrainer:
    reward = Changing(counts)  # type: ignore[arg-type]
    settings = {"max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, **options}
    trainer = make_trainer({"reward_funcs": reward, "callbacks": [CountEvaluations(reward)]}, **settings)
    reward.trainer = trainer
    return trainer


def paired(before: int, after: int, n: int = 21) -> tuple[float, float, float]:
    return paired_difference_interval([i < before for i in range(n)], [i < after for i in range(n)])


def test_the_gain_is_compared_prompt_by_prompt_and_told(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = changing_trainer(make_trainer, [8, 6, 14, 10])
    with caplog.at_level(logging.INFO, logger="peft_svf"):
        output = trainer.train()
    gain = trainer.gain_over_base
    assert not trainer.best_is_base and gain is not None and gain.prompts == 21
    assert (gain.gain, gain.low, gain.high) == pytest.approx(paired(8, 14))
    assert (gain.start, gain.best) == pytest.approx((8 / 21, 14 / 21))
    assert output.metrics["best_gain_low"] == gain.low
    assert "66.7 % vs 38.1 % at the start: +28.6 points [+8.8, +48.4], paired over 21 prompts" in caplog.text


def test_a_resumed_run_still_compares_with_its_start(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    changing_trainer(make_trainer, [8, 6, 14, 10]).train()
    trainer = changing_trainer(make_trainer, [16, 2])  # steps 4 and 6: the start is not evaluated again
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    gain = trainer.gain_over_base
    assert gain is not None and (gain.gain, gain.low, gain.high) == pytest.approx(paired(8, 16))
    assert sum("eval_reward" in entry for entry in trainer.state.log_history) == 4


@pytest.mark.parametrize(("counts", "is_base"), [([8, 6, 7, 8], True), ([8, 6, 9, 8], False)])
def test_verdict_is_public_and_does_not_change_with_later_evaluations(
    make_trainer: MakeTrainer, tiny: SimpleNamespace, counts: list[int], is_base: bool
) -> None:
    trainer = changing_trainer(make_trainer, [*counts, 1 if not is_base else 20])
    assert not trainer.best_is_base
    trainer.train()
    assert trainer.best_is_base is is_base
    trainer.evaluate(tiny.prompts(21))  # another dataset, logged under the same name
    assert trainer.best_is_base is is_base and trainer.base_eval_reward == pytest.approx(2 * 8 / 21 - 1)


@pytest.mark.parametrize(("scores", "is_base"), [([0.5, 0.6, 0.7, 0.8], True), ([0.5, 0.6, 0.4, 0.8], False)])
def test_verdict_where_less_is_better_and_sets_have_names(
    make_trainer: MakeTrainer, tiny: SimpleNamespace, scores: list[float], is_base: bool
) -> None:
    reward = Scripted(scores)
    trainer = make_trainer(
        {
            "reward_funcs": reward,
            "callbacks": [CountEvaluations(reward)],
            "eval_dataset": {"valid": tiny.prompts(8)},
        },
        max_steps=6,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="valid_reward",
        greater_is_better=False,
    )
    reward.trainer = trainer
    trainer.train()
    assert trainer.best_is_base is is_base and (offsets(trainer).abs().max() == 0) == is_base
    assert trainer.state.best_global_step == (None if is_base else 4)


def test_a_start_that_could_not_be_judged_does_not_win(make_trainer: MakeTrainer) -> None:
    """Nothing is greater than NaN: as the score to beat it would make every checkpoint lose."""
    trainer = scripted_trainer(make_trainer, [float("nan"), 0.2, 0.4, 0.3])
    trainer.train()
    assert not trainer.best_is_base and trainer.base_eval_reward is None
    assert trainer.state.best_global_step == 4 and offsets(trainer).abs().max() > 0


def test_a_best_checkpoint_in_a_moved_folder_is_found(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    """Resuming at the end of a run, whose best checkpoint is recorded under the old path."""
    first = scripted_trainer(make_trainer, [0.1, 0.8, 0.2, 0.3])
    first.train()
    (tmp_path / "run").rename(tmp_path / "moved")
    second = scripted_trainer(make_trainer, [0.0], output_dir=str(tmp_path / "moved"))
    second.train(resume_from_checkpoint=str(tmp_path / "moved" / "checkpoint-6"))
    assert not second.best_is_base and torch.equal(offsets(second), offsets(first))
