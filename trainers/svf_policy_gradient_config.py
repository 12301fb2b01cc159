"""Configuration of the policy-gradient trainer for singular value fine-tuning."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from transformers.utils.import_utils import is_torch_bf16_gpu_available
from trl import GRPOConfig

from peft_svf.trainers.guards.guard_options import check_guard_options
from peft_svf.trainers.loss.advantages import Baseline
from peft_svf.trainers.loss.token_scores import KLEstimator
from peft_svf.trainers.rollouts.decoding import check_decoding


# GRPO options without any effect on this loss: a value other than GRPO's default is refused, not ignored.
OPTIONS_WITHOUT_EFFECT = (
    "epsilon",
    "epsilon_high",
    "delta",
    "loss_type",
    "scale_rewards",
    "importance_sampling_level",
    "multi_objective_aggregation",
    "top_entropy_quantile",
    "entropy_coef",
    "entropy_coef_min",
    "entropy_coef_max",
    "entropy_coef_delta",
    "entropy_target",
    "use_adaptive_entropy",
    "off_policy_mask_threshold",
    "sapo_temperature_neg",
    "sapo_temperature_pos",
    "vespo_k_pos",
    "vespo_lambda_pos",
    "vespo_k_neg",
    "vespo_lambda_neg",
    "sync_ref_model",
    "ref_model_mixup_alpha",
    "ref_model_sync_steps",
    "use_bias_correction_kl",
    "router_aux_loss_coef",
    "use_liger_kernel",
    "transformers_continuous_batching_config",
    "label_smoothing_factor",
    "train_sampling_strategy",
    "length_column_name",
    "data_seed",
    "batch_eval_metrics",
)
# Options that would change the policy or the offsets behind the trainer's back, with what they do.
OPTIONS_THAT_BREAK = {
    "neftune_noise_alpha": "adds noise to the policy, so that the one that is scored is not the one that answered",
    "bf16_full_eval": "casts the offsets to bfloat16 for good",
    "fp16_full_eval": "casts the offsets to float16 for good",
}
OPTIONS_THAT_CAST_OFFSETS = (
    "use_transformers_continuous_batching",
    "use_transformers_paged",
    "bf16_full_eval",
    "fp16_full_eval",
)
PAPER_BATCH_SIZE = 256  # answers per optimizer step, Table 6 of arXiv 2501.06252


@dataclass
class SVFPolicyGradientConfig(GRPOConfig):
    r"""
    Configuration class for the [`~peft_svf.trainers.SVFPolicyGradientTrainer`].

    Only the parameters that are new or have another default than in [`~trl.GRPOConfig`] and
    [`~transformers.TrainingArguments`] are listed; the rest is inherited. Options of GRPO that have no effect on this
    loss are refused by name. Works without further flags on a machine without a GPU.

    Parameters:
        > Parameters that control the loss

        baseline (`str`, *optional*, defaults to `"batch"`):
            What is subtracted from a reward: `"none"` (the paper), `"batch"`, the mean of the other answers of the
            generation batch, or `"group"`, the mean of the other answers to the same prompt (leave-one-out, as in
            RLOO; needs `num_generations` of at least 2). Without a baseline a model that is mostly wrong learns
            mostly what not to say.
        kl_coef (`float`, *optional*, defaults to `0.0`):
            Coefficient λ of the KL divergence from the base model. Summed over tokens and averaged over answers, like
            the policy term. The paper sweeps {0, 0.1, 0.2, 0.3} on validation.
        kl_estimator (`str`, *optional*, defaults to `"exact"`):
            `"exact"` is KL(policy ‖ base) over the whole vocabulary at every visited token; `"exact_forward"` is
            KL(base ‖ policy), which the paper's released code computes; `"k1_reward"` takes the log-ratio of the
            sampled tokens from the reward (unbiased for the paper's Eq. 1, about 30 times the variance); `"k3"` is
            GRPO's estimator.

        > Parameters that control generation

        num_generations (`int`, *optional*, defaults to `1`):
            Answers sampled for each prompt.
        steps_per_generation (`int`, *optional*):
            Micro-batches whose answers are generated in one call; a divisor of `gradient_accumulation_steps`. Unless
            this or `generation_batch_size` is set, the largest whose answers fit into half of the free memory when
            training starts. With `baseline="batch"` it is also what the baseline is the mean of.
        eval_temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature in evaluation; 0 is greedy, so that two evaluations give the same numbers.
        num_generations_eval (`int`, *optional*, defaults to `1`):
            Answers for each prompt in evaluation.
        disable_dropout (`bool`, *optional*, defaults to `True`):
            Whether to disable dropout: the policy that is scored has to be the one that answered.

        > Parameters that control training

        learning_rate (`float`, *optional*, defaults to `2e-3`):
            Initial learning rate of AdamW. The default is the paper's, for 7 to 8 billion parameters, 256 answers a
            step and some hundred steps. AdamW moves every z by about the learning rate in each step, whatever the
            scale of the reward, so that short runs and small models want more: in `examples/benchmarks/trainer.py`
            3e-2 was best for models of under a million parameters in 20 to 40 steps, and 2e-3 was too little. Try
            2e-3, 1e-2 and 3e-2 on validation prompts; too much shows as a collapse or as a base model that wins.
        lr_scheduler_type (`str`, *optional*, defaults to `"cosine"`):
            Learning-rate schedule.
        max_grad_norm (`float`, *optional*, defaults to `1e-3`):
            Gradient clipping norm.
        weight_decay (`float`, *optional*, defaults to `0.0`):
            Pulls the offsets towards 0, that is the policy towards the base model.
        gradient_accumulation_steps (`int`, *optional*, defaults to `8`):
            Micro-batches per optimizer step. One optimizer step learns from `per_device_train_batch_size` ×
            `gradient_accumulation_steps` × processes answers: 64 by default on one process.
        bf16 (`bool`, *optional*):
            Whether to use bfloat16 autocast. By default on accelerators that support it, not on CPU and not with
            DeepSpeed, whose bfloat16 mode casts the offsets.
        gradient_checkpointing (`bool`, *optional*):
            Whether to recompute activations in the backward pass. By default on accelerators, not on CPU.
        load_best_model_at_end (`bool`, *optional*, defaults to `False`):
            Whether to end with the best offsets by `metric_for_best_model`, which is `"eval_reward"` unless set.
            Needs an `eval_strategy`. Also evaluates before the first step (`eval_on_start`), so that the starting
            point, normally the base model, is a candidate, and saves a checkpoint at every evaluation (or, with
            `save_strategy="best"`, at every improvement).
        early_stopping_patience (`int`, *optional*):
            Stop after this many evaluations in a row without a new best checkpoint, the start included. Needs
            `load_best_model_at_end=True`. By default training goes to its last step.

        > Parameters that control the guards

        zero_variance_patience (`int`, *optional*, defaults to `10`):
            Warn, and say what to try, when all rewards have been the same for this many optimizer steps in a row:
            there is nothing to learn from. With `baseline="group"`, the same within every group. 0 is never.
        collapse_patience (`int`, *optional*, defaults to `10`):
            Stop when, for this many optimizer steps in a row, nearly all answers have been cut off, or have shrunk to
            a tenth, or are as random as no text is, or the KL is above `collapse_kl`, and the reward has lost what it
            had gained. Ends at the best checkpoint with `load_best_model_at_end=True`, otherwise at the one from
            before with the best training reward, or at the start. Ten steps outlast a few bad batches and cost little
            of a run. 0 is never.
        collapse_kl (`float`, *optional*, defaults to `1.0`):
            KL from the base model, in nats per token above that of the first step, which counts as a collapse if the
            reward is lost too. Only with a `kl_coef`. At 1 the policy finds its tokens e times likelier, on average,
            than the base model does.

        > Parameters that control logging

        learning_curve (`bool`, *optional*, defaults to `True`):
            Whether to write `learning_curve.csv` and, with matplotlib, `learning_curve.png` into `output_dir`.
    """

    baseline: Baseline = field(
        default="batch",
        metadata={
            "help": "Subtracted from rewards: `none` (the paper), mean of the other answers of the `batch` or `group`."
        },
    )
    kl_coef: float = field(default=0.0, metadata={"help": "Coefficient of the KL divergence from the base model."})
    kl_estimator: KLEstimator = field(
        default="exact", metadata={"help": "KL estimator: `exact`, `exact_forward`, `k1_reward` or `k3`."}
    )
    num_generations: int = field(default=1, metadata={"help": "Answers sampled for each prompt."})
    eval_temperature: float = field(
        default=0.0, metadata={"help": "Sampling temperature in evaluation; 0 is greedy decoding."}
    )
    num_generations_eval: int = field(default=1, metadata={"help": "Answers for each prompt in evaluation."})
    disable_dropout: bool = field(default=True, metadata={"help": "Whether to disable dropout."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Initial learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    max_grad_norm: float = field(default=1e-3, metadata={"help": "Gradient clipping norm."})
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "Micro-batches per optimizer step."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without a new best checkpoint."}
    )
    zero_variance_patience: int = field(
        default=10, metadata={"help": "Warn after this many steps in which all rewards were the same; 0 is never."}
    )
    collapse_patience: int = field(
        default=10, metadata={"help": "Stop after this many steps of a collapsed policy; 0 is never."}
    )
    collapse_kl: float = field(
        default=1.0, metadata={"help": "KL from the base model, in nats per token, that counts as a collapse."}
    )
    bf16: bool | None = field(
        default=None, metadata={"help": "bfloat16 autocast; by default on accelerators that support it, not on CPU."}
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations; by default on accelerators, not on CPU."}
    )
    learning_curve: bool = field(
        default=True, metadata={"help": "Write `learning_curve.csv` and, with matplotlib, `learning_curve.png`."}
    )

    @classmethod
    def paper(cls, output_dir: str, **overrides: Any) -> SVFPolicyGradientConfig:
        """The recipe of the paper (arXiv 2501.06252, appendix A.1 and Table 6).

        REINFORCE on raw rewards with one answer per prompt, AdamW at 2e-3 with a cosine schedule, clipping at 1e-3 and
        256 answers per step, reached by gradient accumulation. The paper starts from `SVFConfig.paper()` and sweeps
        `kl_coef` over {0, 0.1, 0.2, 0.3} on validation; its released code computes `kl_estimator="exact_forward"`.

        Args:
            output_dir (`str`): Where checkpoints go.
            overrides: Any argument of the configuration, e.g. `per_device_train_batch_size=32`.

        Raises:
            ValueError: If 256 is not a multiple of the answers of one micro-batch over all processes.
        """
        options: dict[str, Any] = {
            "baseline": "none",
            "kl_estimator": "exact",
            "num_generations": 1,
            "optim": "adamw_torch",
            "learning_rate": 2e-3,
            "lr_scheduler_type": "cosine",
            "max_grad_norm": 1e-3,
            "weight_decay": 0.0,
            "per_device_train_batch_size": 8,
            **overrides,
        }
        if "gradient_accumulation_steps" not in overrides:
            # Not from `PartialState`: creating it here would settle the device before `use_cpu` is read.
            micro_batch = options["per_device_train_batch_size"] * int(os.environ.get("WORLD_SIZE", "1"))
            if PAPER_BATCH_SIZE % micro_batch:
                raise ValueError(
                    f"The paper's batch of {PAPER_BATCH_SIZE} is not a multiple of `per_device_train_batch_size` × "
                    f"processes = {micro_batch}: choose another `per_device_train_batch_size`."
                )
            options["gradient_accumulation_steps"] = PAPER_BATCH_SIZE // micro_batch
        return cls(output_dir, **options)

    def __post_init__(self) -> None:
        self.chooses_steps_per_generation = self.steps_per_generation is None and self.generation_batch_size is None
        if self.bf16 is None:  # GRPOConfig would turn it on and then fail on a machine without a GPU
            uses_deepspeed = self.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"  # casts offsets
            self.bf16 = not (self.fp16 or self.use_cpu or uses_deepspeed) and is_torch_bf16_gpu_available()
        if self.load_best_model_at_end:
            self._make_every_evaluation_a_candidate()
        # transformers 5.23 calls the option `activation_checkpointing` and turns it off if neither name is set.
        new_name = "activation_checkpointing"
        checkpointing_by_device = self.gradient_checkpointing is None and getattr(self, new_name, None) is None
        try:
            super().__post_init__()
        except ValueError as error:  # the last of GRPO's batch checks: only group advantages need 2 answers
            if self.num_generations != 1 or "at least 2 generations" not in str(error):
                raise
            self._check_vllm_importance_sampling()
        if checkpointing_by_device:
            self.gradient_checkpointing = self.device.type != "cpu"
            if hasattr(self, new_name):
                self.activation_checkpointing = self.gradient_checkpointing
        if self.device.type == "cpu":  # where it has no effect but a warning
            self.dataloader_pin_memory = False
        self._check_loss_options()
        check_guard_options(self)
        self._check_generation_options()
        self._refuse_options_without_effect()

    def _make_every_evaluation_a_candidate(self) -> None:
        """Evaluate before the first step and save whatever an evaluation could declare the best."""
        if self.eval_strategy == "no":
            raise ValueError(
                '`load_best_model_at_end=True` needs evaluations to choose by: set `eval_strategy="steps"` and '
                "`eval_steps`, and pass an `eval_dataset` to the trainer."
            )
        self.eval_on_start = True
        self.metric_for_best_model = self.metric_for_best_model or "eval_reward"  # type: ignore[has-type]
        if self.save_strategy != "best":  # type: ignore[has-type]
            self.save_strategy = self.eval_strategy
            self.save_steps = self.eval_steps or self.logging_steps

    def _check_loss_options(self) -> None:
        for name, choices in (("baseline", get_args(Baseline)), ("kl_estimator", get_args(KLEstimator))):
            if getattr(self, name) not in choices:
                raise ValueError(f"`{name}` is one of {', '.join(map(repr, choices))}, not {getattr(self, name)!r}.")
        if self.beta != 0.0:
            raise ValueError("`beta` is the coefficient of GRPO's own KL: use `kl_coef` and `kl_estimator`.")
        if self.kl_coef < 0.0:
            raise ValueError(f"`kl_coef` is a penalty and cannot be negative, but it is {self.kl_coef}.")
        if self.baseline == "group" and self.num_generations < 2:
            raise ValueError(
                '`baseline="group"` compares answers to the same prompt: set `num_generations` to at least 2, or '
                '`baseline="batch"`.'
            )
        if self.baseline == "batch" and self.generation_batch_size < 2:
            raise ValueError(
                '`baseline="batch"` compares answers of one generation batch, which has 1: raise '
                "`per_device_train_batch_size` or `gradient_accumulation_steps`."
            )
        if self.num_iterations != 1 or self.gradient_accumulation_steps % self.steps_per_generation:
            raise ValueError(
                "REINFORCE learns from answers of the current policy: `num_iterations` must be 1 and "
                f"`steps_per_generation` ({self.steps_per_generation}) must divide `gradient_accumulation_steps` "
                f"({self.gradient_accumulation_steps})."
            )

    def _check_generation_options(self) -> None:
        if self.temperature <= 0.0:
            raise ValueError(f"`temperature` must be positive to sample answers, but it is {self.temperature}.")
        if self.eval_temperature < 0.0:
            raise ValueError(f"`eval_temperature` is 0 (greedy) or positive, but it is {self.eval_temperature}.")
        if self.eval_temperature == 0.0 and self.num_generations_eval not in (None, 1):
            raise ValueError(
                "Greedy answers to one prompt are all the same: use `num_generations_eval=1`, or set "
                "`eval_temperature` above 0."
            )
        for name in OPTIONS_THAT_CAST_OFFSETS:
            if getattr(self, name, False):
                raise ValueError(f"`{name}` casts the offsets to half precision for good: remove it.")
        check_decoding(self)

    def _refuse_options_without_effect(self) -> None:
        defaults = {f.name: f.default for f in dataclasses.fields(GRPOConfig)}
        for name in OPTIONS_WITHOUT_EFFECT:
            if name in defaults and getattr(self, name) != defaults[name]:
                raise ValueError(f"`{name}` has no effect in SVFPolicyGradientTrainer: remove it.")
        for name, harm in OPTIONS_THAT_BREAK.items():
            if name in defaults and getattr(self, name) != defaults[name]:
                raise ValueError(f"`{name}` {harm}: remove it.")

    def _check_vllm_importance_sampling(self) -> None:
        """The checks that follow the refused group size in `GRPOConfig.__post_init__` (TRL 1.16)."""
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
        mode = self.vllm_importance_sampling_mode
        if self.vllm_importance_sampling_cap is not None:
            raise ValueError("`vllm_importance_sampling_cap` is deprecated: use `vllm_importance_sampling_clip_max`.")
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"`vllm_importance_sampling_clip_min` ({low}) must be less than `vllm_importance_sampling_clip_max` "
                f"({high})."
            )
        if self.vllm_importance_sampling_correction and mode.endswith("_truncate") and low is None and high is None:
            raise ValueError(
                f"`vllm_importance_sampling_mode={mode!r}` needs `vllm_importance_sampling_clip_min` or "
                "`vllm_importance_sampling_clip_max`."
            )
