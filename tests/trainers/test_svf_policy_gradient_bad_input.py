"""Mistakes are found when the trainer is made, before anything is generated or written."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)
from trl import GRPOConfig

from peft_svf import SVFConfig
from peft_svf.trainers import SVFPolicyGradientTrainer


MakeTrainer = Callable[..., SVFPolicyGradientTrainer]
SMALL: dict[str, Any] = {
    "vocab_size": 28,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def needs_answer(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    return [1.0 for _ in completions]


def test_missing_reward_column_names_function_column_dataset_and_remedy(make_trainer: MakeTrainer) -> None:
    message = (
        r"Reward function `needs_answer` needs a column `answer`, which the train dataset does not have "
        r"\(its columns: prompt, index\): add or rename the column"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer({"reward_funcs": needs_answer})


@pytest.mark.parametrize("named", [False, True])
def test_missing_reward_column_in_an_eval_dataset(
    make_trainer: MakeTrainer, tiny: SimpleNamespace, named: bool
) -> None:
    train = tiny.prompts(64).add_column("answer", ["1"] * 64)
    evaluation = {"hard": tiny.prompts(4)} if named else tiny.prompts(4)
    with pytest.raises(ValueError, match="the eval 'hard' dataset" if named else "the eval dataset"):
        make_trainer({"reward_funcs": [needs_answer], "train_dataset": train, "eval_dataset": evaluation})


class CallableReward:
    def __call__(self, completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
        return [1.0 for _ in completions]


async def asynchronous(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    return [1.0 for _ in completions]


@pytest.mark.parametrize("reward", [CallableReward(), asynchronous], ids=["object", "async"])
def test_reward_columns_of_other_callables_are_checked_too(make_trainer: MakeTrainer, reward: Any) -> None:
    with pytest.raises(ValueError, match="needs a column `answer`"):
        make_trainer({"reward_funcs": reward})


def test_bound_arguments_and_defaults_need_no_column(make_trainer: MakeTrainer) -> None:
    def reward(completions: list[Any], index: list[int], scale: float = 2.0, **_: Any) -> list[float]:
        return [scale for _ in completions]

    partial = functools.partial(needs_answer, answer=["1"])
    make_trainer({"reward_funcs": [reward, partial]})


def test_reward_function_without_kwargs_is_refused(make_trainer: MakeTrainer) -> None:
    def narrow(completions: list[Any]) -> list[float]:
        return [1.0 for _ in completions]

    with pytest.raises(ValueError, match=r"`narrow` does not take all it is given \(.*index.*\): add `\*\*kwargs`"):
        make_trainer({"reward_funcs": narrow})


def test_missing_prompt_column(make_trainer: MakeTrainer) -> None:
    dataset = Dataset.from_dict({"question": ["1 + 1 = ?"] * 64})
    with pytest.raises(ValueError, match=r"train dataset has no column `prompt` .its columns: question.: rename"):
        make_trainer({"train_dataset": dataset})


def test_empty_eval_dataset(make_trainer: MakeTrainer, tiny: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match="eval dataset is empty"):
        make_trainer({"eval_dataset": tiny.prompts(4).select([])})


def build(kind: str) -> torch.nn.Module:
    if kind == "BertForMaskedLM":
        return BertForMaskedLM(BertConfig(**SMALL))
    if kind == "T5ForConditionalGeneration":
        return T5ForConditionalGeneration(
            T5Config(vocab_size=28, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        )
    return {"LlamaModel": LlamaModel, "LlamaForSequenceClassification": LlamaForSequenceClassification}[kind](
        LlamaConfig(**SMALL, num_key_value_heads=2)
    )


NOT_CAUSAL = ["BertForMaskedLM", "T5ForConditionalGeneration", "LlamaModel", "LlamaForSequenceClassification"]


@pytest.mark.parametrize("kind", NOT_CAUSAL)
@pytest.mark.parametrize("as_path", [False, True])
def test_models_that_are_no_causal_language_models(
    make_trainer: MakeTrainer, tmp_path: Path, kind: str, as_path: bool
) -> None:
    model: Any = build(kind)
    if as_path:
        model.save_pretrained(tmp_path / "model")
        model = str(tmp_path / "model")
    with pytest.raises(ValueError, match=f"{kind} is not a causal language model.*AutoModelForCausalLM"):
        make_trainer({"model": model})


def test_a_model_that_is_not_from_transformers(make_trainer: MakeTrainer) -> None:
    with pytest.raises(TypeError, match="not Linear"):
        make_trainer({"model": torch.nn.Linear(2, 2)})


def test_a_causal_language_model_by_path(make_trainer: MakeTrainer, tiny: SimpleNamespace, tmp_path: Path) -> None:
    tiny.model().save_pretrained(tmp_path / "model")
    trainer = make_trainer({"model": str(tmp_path / "model")}, max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_training_set_smaller_than_a_generation_batch_names_the_numbers(
    make_trainer: MakeTrainer, tiny: SimpleNamespace
) -> None:
    message = (
        r"has 10 prompts, but one generation batch takes 32: lower `per_device_train_batch_size` \(16\), "
        r"`gradient_accumulation_steps` \(2\) or `steps_per_generation` \(2\)"
    )
    with pytest.raises(ValueError, match=message):
        make_trainer({"train_dataset": tiny.prompts(10)}, gradient_accumulation_steps=2)


def test_a_group_needs_fewer_prompts(make_trainer: MakeTrainer, tiny: SimpleNamespace) -> None:
    make_trainer({"train_dataset": tiny.prompts(4)}, num_generations=4)


def test_nothing_to_train_without_an_adapter(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match=r"pass `peft_config=SVFConfig\(\)`"):
        make_trainer({"peft_config": None})


def test_a_frozen_adapter(make_trainer: MakeTrainer, tiny: SimpleNamespace) -> None:
    model = get_peft_model(tiny.model(), SVFConfig(inference_mode=True))
    with pytest.raises(ValueError, match=r"`PeftModel\.from_pretrained.*is_trainable=True"):
        make_trainer({"model": model, "peft_config": None})


def test_anything_trainable_that_is_not_float32(make_trainer: MakeTrainer, tiny: SimpleNamespace) -> None:
    model = get_peft_model(tiny.model(), SVFConfig()).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"svf_offset\.default\.weight` is trainable in bfloat16"):
        make_trainer({"model": model, "peft_config": None})


def test_offsets_cast_after_construction_are_refused_at_train(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(max_steps=1)
    trainer.model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="is trainable in bfloat16"):
        trainer.train()


def test_a_merged_adapter(make_trainer: MakeTrainer, tiny: SimpleNamespace) -> None:
    model = get_peft_model(tiny.model(), SVFConfig())
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="unmerge_adapter"):
        make_trainer({"model": model, "peft_config": None})


def test_a_best_metric_that_named_eval_datasets_do_not_have(make_trainer: MakeTrainer, tiny: SimpleNamespace) -> None:
    datasets = {"valid": tiny.prompts(4), "hard": tiny.prompts(4)}
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    with pytest.raises(ValueError, match='one of "eval_valid_reward", "eval_hard_reward"'):
        make_trainer({"eval_dataset": datasets}, **options)
    make_trainer({"eval_dataset": datasets}, **options, metric_for_best_model="eval_hard_reward")


def test_the_configuration_of_another_trainer(tiny: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be an SVFPolicyGradientConfig, not a GRPOConfig"):
        SVFPolicyGradientTrainer(
            tiny.model(),
            tiny.reward,
            args=GRPOConfig(str(tmp_path), use_cpu=True, bf16=False),
            train_dataset=tiny.prompts(64),
            peft_config=SVFConfig(),
        )


def test_a_model_whose_logits_are_not_scaled_hidden_states(make_trainer: MakeTrainer, tiny: SimpleNamespace) -> None:
    model = tiny.model()
    head = model.lm_head.forward
    model.lm_head.forward = lambda hidden: head(hidden) ** 3
    with pytest.raises(ValueError, match="LlamaForCausalLM does not compute its logits as"):
        make_trainer({"model": model})


def test_a_refused_run_writes_nothing(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a column"):
        make_trainer({"reward_funcs": needs_answer})
    assert not (tmp_path / "run").exists()
