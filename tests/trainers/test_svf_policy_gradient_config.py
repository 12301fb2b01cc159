"""Configuration: defaults for a laptop, the paper's preset, and what is refused by name."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from packaging.version import Version
from transformers import TrainingArguments
from trl import GRPOConfig, TrlParser

from peft_svf.trainers import SVFPolicyGradientConfig
from peft_svf.trainers.svf_policy_gradient_config import OPTIONS_THAT_BREAK, OPTIONS_WITHOUT_EFFECT


MakeConfig = Callable[..., SVFPolicyGradientConfig]


def test_works_with_an_output_folder_alone(tmp_path: Path) -> None:
    config = SVFPolicyGradientConfig(str(tmp_path))
    assert config.num_generations == 1 and config.generation_batch_size == 64
    if config.device.type == "cpu":
        assert config.bf16 is False and config.gradient_checkpointing is False


def test_use_cpu_alone_means_float32(tmp_path: Path) -> None:
    config = SVFPolicyGradientConfig(str(tmp_path), use_cpu=True)
    assert config.bf16 is False and config.gradient_checkpointing is False


def test_what_the_user_sets_is_kept(tmp_path: Path) -> None:
    config = SVFPolicyGradientConfig(str(tmp_path), use_cpu=True, bf16=True, gradient_checkpointing=True)
    assert config.bf16 is True and config.gradient_checkpointing is True


def test_pickles(make_config: MakeConfig) -> None:
    config = make_config(kl_coef=0.3)
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()


def test_command_line_flags_reach_the_config(tmp_path: Path) -> None:
    flags = ["--output_dir", str(tmp_path), "--baseline", "none", "--kl_coef", "0.2", "--kl_estimator", "k3"]
    (config,) = TrlParser(SVFPolicyGradientConfig).parse_args_and_config([*flags, "--use_cpu"])
    assert (config.baseline, config.kl_coef, config.kl_estimator) == ("none", 0.2, "k3")


def test_paper_preset_is_table_6(tmp_path: Path) -> None:
    config = SVFPolicyGradientConfig.paper(str(tmp_path), use_cpu=True)
    assert config.baseline == "none" and config.kl_estimator == "exact" and config.num_generations == 1
    assert config.optim == "adamw_torch" and config.lr_scheduler_type == "cosine"
    assert (config.learning_rate, config.max_grad_norm, config.weight_decay) == (2e-3, 1e-3, 0.0)
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size == 256


def test_paper_preset_keeps_the_batch_when_memory_decides_the_micro_batch(tmp_path: Path) -> None:
    config = SVFPolicyGradientConfig.paper(str(tmp_path), use_cpu=True, per_device_train_batch_size=64, kl_coef=0.1)
    assert config.gradient_accumulation_steps == 4 and config.kl_coef == 0.1


def test_paper_preset_refuses_a_micro_batch_that_does_not_divide(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`per_device_train_batch_size` × processes = 48"):
        SVFPolicyGradientConfig.paper(str(tmp_path), use_cpu=True, per_device_train_batch_size=48)


@pytest.mark.parametrize("name", OPTIONS_WITHOUT_EFFECT)
def test_grpo_options_without_effect_are_refused_by_name(make_config: MakeConfig, name: str) -> None:
    defaults = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
    if name not in defaults:
        pytest.skip(f"this version of TRL has no `{name}`")
    special: dict[str, Any] = {
        "loss_type": "grpo",
        "scale_rewards": "batch",
        "importance_sampling_level": "sequence",
        "multi_objective_aggregation": "normalize_then_sum",
        "transformers_continuous_batching_config": {"max_memory_percent": 0.3},
        "train_sampling_strategy": "group_by_length",
        "length_column_name": "tokens",
        "data_seed": 3,
    }
    default: Any = defaults[name]
    value = (
        special[name] if name in special else not default if isinstance(default, bool) else (default or 0.0) + 0.125
    )
    with pytest.raises(ValueError, match=f"`{name}` has no effect"):
        make_config(**{name: value})


# GRPO's options that do here what TRL's documentation says.
USED_AS_THEY_ARE = {
    "model_init_kwargs",
    "trust_remote_code",
    "cast_lm_head_to_fp32",
    "max_completion_length",
    "ds3_gather_for_generation",
    "shuffle_dataset",
    "pad_to_multiple_of",
    "chat_template_kwargs",
    "cache_implementation",
    "use_vllm",
    "vllm_mode",
    "vllm_model_impl",
    "vllm_enable_sleep_mode",
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_group_port",
    "vllm_gpu_memory_utilization",
    "vllm_max_model_length",
    "vllm_tensor_parallel_size",
    "vllm_importance_sampling_correction",
    "reward_weights",
    "mask_truncated_completions",
    "max_tool_calling_iterations",
    "log_completions",
    "log_multimodal",
    "num_completions_to_print",
    "log_unique_prompts",
    "log_completions_hub_repo",
}
# Options that `SVFPolicyGradientConfig` gives another default, checks or warns of, by tests in this folder.
OURS = {
    "disable_dropout",
    "num_generations",
    "num_generations_eval",
    "generation_batch_size",
    "steps_per_generation",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "generation_kwargs",
    "vllm_structured_outputs_regex",
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
}
# Refused with a reason and a remedy of their own.
REFUSED = {
    "beta",
    "num_iterations",
    "use_transformers_continuous_batching",
    "use_transformers_paged",
    "vllm_importance_sampling_cap",
}


def test_every_option_of_grpo_is_used_ours_or_refused() -> None:
    """A new version of TRL fails here, with the names that somebody has to think about."""
    inherited = {f.name for f in dataclasses.fields(TrainingArguments)}
    options = {f.name for f in dataclasses.fields(GRPOConfig)} - inherited
    classes = [USED_AS_THEY_ARE, OURS, REFUSED, set(OPTIONS_WITHOUT_EFFECT)]
    assert options - set().union(*classes) == set()
    assert sum(map(len, classes)) == len(set().union(*classes)), "an option is in two classes"
    if Version(trl.__version__) >= Version("1.16"):
        assert set().union(*classes) - inherited - options == set(), "TRL has no such option (any more)"


@pytest.mark.parametrize("name", OPTIONS_THAT_BREAK)
def test_options_that_change_policy_or_offsets_are_refused_with_the_reason(make_config: MakeConfig, name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` (adds|casts)"):
        make_config(**{name: 0.5 if name.startswith("neftune") else True})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"stop_strings": ["Q:"]}, "cut answers in the reward function, or use vLLM"),
        ({"temperature": 0.5}, "set that"),
        ({"max_new_tokens": 5}, "set `max_completion_length`"),
        ({"num_beams": 2}, "not samples of the policy"),
        ({"num_return_sequences": 2}, "set `num_generations`"),
        ({"return_dict_in_generate": True}, "token ids alone"),
    ],
)
def test_generation_kwargs_that_break_scoring_are_refused(
    make_config: MakeConfig, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(kwargs))}` in `generation_kwargs` is not supported.*{message}"):
        make_config(generation_kwargs=kwargs)


def test_greedy_answers_of_a_group_are_refused(make_config: MakeConfig) -> None:
    with pytest.raises(ValueError, match="are all the same"):
        make_config(generation_kwargs={"do_sample": False}, num_generations=2)


@pytest.mark.parametrize("options", [{}, {"steps_per_generation": 2}, {"generation_batch_size": 32}])
def test_config_remembers_who_chose_the_steps_per_generation(make_config: MakeConfig, options: dict[str, int]) -> None:
    config = make_config(gradient_accumulation_steps=2, **options)
    assert config.chooses_steps_per_generation is not bool(options)
    assert config.steps_per_generation == 2 and config.generation_batch_size == 32
    assert pickle.loads(pickle.dumps(config)).chooses_steps_per_generation is not bool(options)


@pytest.mark.parametrize(
    "option",
    [
        {"cast_lm_head_to_fp32": True},
        {"pad_to_multiple_of": 8},
        {"mask_truncated_completions": True},
        {"shuffle_dataset": False},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"cache_implementation": "dynamic"},
        {"log_completions": True, "num_completions_to_print": 1, "log_unique_prompts": True},
        {"optim": "adafactor"},
        {"optim": "sgd"},
        {"weight_decay": 0.1},
    ],
)
def test_options_used_as_they_are_train_the_offsets(make_trainer: Callable[..., Any], option: dict[str, Any]) -> None:
    trainer = make_trainer(per_device_train_batch_size=4, max_steps=2, **option)
    trainer.train()
    offsets = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {p.dtype for p in offsets} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in offsets) and any(p.abs().max() > 0 for p in offsets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.1}, "`kl_coef`"),
        ({"kl_coef": -0.1}, "cannot be negative"),
        ({"baseline": "mean"}, "`baseline` is one of 'none', 'batch', 'group'"),
        ({"kl_estimator": "k2"}, "`kl_estimator` is one of"),
        ({"baseline": "group"}, "set `num_generations` to at least 2"),
        ({"per_device_train_batch_size": 1}, "which has 1"),
        ({"num_iterations": 2}, "`num_iterations` must be 1"),
        ({"gradient_accumulation_steps": 3, "steps_per_generation": 2}, r"`steps_per_generation` \(2\) must divide"),
        ({"temperature": 0.0}, "`temperature` must be positive"),
        ({"eval_temperature": -1.0}, "`eval_temperature` is 0"),
        ({"num_generations_eval": 4}, "all the same"),
        ({"use_transformers_continuous_batching": True}, "`use_transformers_continuous_batching` casts"),
        ({"num_generations": 3}, "must be divisible by num_generations"),
        ({"load_best_model_at_end": True}, "`eval_strategy"),
        ({"vllm_importance_sampling_clip_min": 4.0}, "must be less than"),
        ({"vllm_importance_sampling_cap": 2.0}, "use `vllm_importance_sampling_clip_max`"),
        (
            {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": None},
            "needs `vllm_importance_sampling_clip_min`",
        ),
    ],
)
def test_meaningless_combinations_are_refused(make_config: MakeConfig, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.9},
        {"top_k": 5},
        {"generation_kwargs": {"repetition_penalty": 1.2}},
        {"generation_kwargs": {"do_sample": False}},
        {"use_vllm": True, "vllm_structured_outputs_regex": "[0-9]+"},
    ],
)
def test_filtered_sampling_warns_of_a_biased_gradient(make_config: MakeConfig, options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="the gradient is biased"):
        make_config(**options)


@pytest.mark.parametrize("save_strategy", ["steps", "best"])
def test_best_model_at_end_needs_only_an_evaluation_strategy(make_config: MakeConfig, save_strategy: str) -> None:
    config = make_config(eval_strategy="steps", eval_steps=7, load_best_model_at_end=True, save_strategy=save_strategy)
    assert config.eval_on_start and config.greater_is_better and config.metric_for_best_model == "eval_reward"
    assert config.save_strategy == save_strategy and (save_strategy == "best" or config.save_steps == 7)
