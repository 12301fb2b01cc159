"""Policy-gradient training of experts: REINFORCE with a KL penalty, on top of TRL's `GRPOTrainer`."""

from __future__ import annotations

import contextlib
import os
import textwrap
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer

from peft_svf.trainers import checks
from peft_svf.trainers.checkpoints.atomic_checkpoints import AtomicCheckpoints
from peft_svf.trainers.checkpoints.hub_push import PushesExperts, check_can_push
from peft_svf.trainers.distributed import forget_evaluation, is_sharded, refuse_half_precision_engine
from peft_svf.trainers.guards.finite_loss import StopsOnNonFinite
from peft_svf.trainers.guards.guarded_training import GuardsRollouts
from peft_svf.trainers.guards.parameter_checks import ParameterChecks
from peft_svf.trainers.kl_sweep.sweep import KLSweep
from peft_svf.trainers.logs.completion_tables import CompletionTables
from peft_svf.trainers.logs.training_logs import TrainingLogs
from peft_svf.trainers.loss.advantages import subtract_baseline
from peft_svf.trainers.loss.forward_checks import check_forward, check_reference
from peft_svf.trainers.loss.hidden_states import (
    add_hidden_states_output,
    check_logits_follow_from_hidden_states,
    without_router_logits,
)
from peft_svf.trainers.loss.scoring import ScoresTokens
from peft_svf.trainers.rollouts.decoding import decoding_temperature
from peft_svf.trainers.rollouts.generation_memory import StepsPerGenerationThatFit
from peft_svf.trainers.rollouts.image_prompts import ImagePrompts, adapt_language_model_only, check_processor
from peft_svf.trainers.rollouts.merged_rollouts import MergedRollouts, check_vllm, disable_all_dropout
from peft_svf.trainers.svf_policy_gradient_config import SVFPolicyGradientConfig
from peft_svf.trainers.validation.answer_metrics import score_metrics
from peft_svf.trainers.validation.best_checkpoint import StartIsACandidate
from peft_svf.trainers.validation.exact_evaluation import ExactEvaluation
from peft_svf.trainers.validation.reward_metrics import total_rewards
from peft_svf.tuner import SVFConfig


# The outermost base comes first. `train`: KLSweep sees the trainer untouched; AtomicCheckpoints turns True into a
# path for all below; GuardsRollouts acts on the verdict of StartIsACandidate. `log`: TrainingLogs adds before
# CompletionTables prints. `_calculate_rewards`: StopsOnNonFinite judges what all have added. `_generate`:
# MergedRollouts spans all turns. Callbacks are added from the last base to the first.
class SVFPolicyGradientTrainer(
    PushesExperts,
    ExactEvaluation,
    KLSweep,
    AtomicCheckpoints,
    StopsOnNonFinite,
    GuardsRollouts,
    TrainingLogs,
    CompletionTables,
    StartIsACandidate,
    ScoresTokens,
    MergedRollouts,
    StepsPerGenerationThatFit,
    ImagePrompts,
    GRPOTrainer,
):
    r"""
    Trainer for experts by singular value fine-tuning (SVF) with policy gradients, as in Transformer²: Self-adaptive
    LLMs ([2501.06252](https://huggingface.co/papers/2501.06252)).

    Only the offsets of the singular values are trained, with REINFORCE on a reward and a penalty for leaving the base
    model (Eq. 1 of the paper; y is the answer to prompt x, r its reward, b the baseline):

        loss = mean over answers of [ −(r(x, y) − b) · log π(y|x) + λ · KL(π ‖ base) ],   both summed over tokens.

    Differences to [`~trl.GRPOTrainer`], whose generation, rewards, logging and vLLM support are used as they are:
    one answer per prompt is enough, nothing is clipped or normalized by length or spread, answers are generated from
    merged weights, evaluation is greedy with exact means, and with `load_best_model_at_end=True` the starting point is
    a candidate for the best checkpoint.

    With `use_vllm=True` merged weights reach vLLM through TRL's own sync, before the answers of every step, and the
    log-probabilities in the policy term are weighted by TRL's `importance_sampling_ratio`. Tested up to the sync, with
    a stand-in for the engine; not run with vLLM itself, and refused for FSDP and quantized base models.

    Logs `policy_loss`, `entropy` and, with a `kl_coef`, `kl` (mean over tokens) and `kl_sequence` (sum over tokens,
    what `kl_coef` multiplies) in addition to GRPO's `reward`, `rewards/<function>/mean` and `completions/*`, how far
    the singular values have moved (`z/rms_change`, `z/max_change`, and with evaluations `z/layers/<index>` and
    `z/modules/<name>`) and `tokens_per_second`. Writes `learning_curve.csv` and, with matplotlib,
    `learning_curve.png`; with `log_completions=True`, prints completions and writes them to `completions/*.parquet`.

    After [`train`], `base_eval_reward` is the validation score before the first step, `best_is_base` tells whether no
    checkpoint beat it and `gain_over_base` by how much the best one did, prompt by prompt. [`sweep_kl`] trains with
    several KL coefficients and keeps the best expert.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            A causal language model, which may see images, with `peft_config`, or one that already has a trainable
            adapter.
        reward_funcs (`Callable` or `list[Callable]`):
            Reward functions as in [`~trl.GRPOTrainer`]: called with `prompts`, `completions` and every column of the
            dataset, they return one number per completion, normally −1 or +1, or None for "cannot be judged".
        args ([`SVFPolicyGradientConfig`], *optional*):
            Configuration. Defaults to one named after the model.
        train_dataset ([`~datasets.Dataset`]):
            Prompts in a column `prompt`, as text or as a list of chat messages, and what the reward functions need.
            Images, for chat messages only, in a column `image` or, several for a prompt, `images`.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`, *optional*):
            Prompts to evaluate on. With several, each logs under its own name: `eval_<name>_reward`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            The tokenizer or, for prompts with images, the processor. Defaults to the model's.
        peft_config ([`~peft.PeftConfig`], *optional*):
            What to train, normally `SVFConfig()`. Of a vision-language model, "all-linear" adapts the language model.
        kwargs:
            Other arguments of [`~trl.GRPOTrainer`]: `callbacks`, `optimizers`, `tools`, `rollout_func` and so on.

    Raises:
        ValueError: For a model, dataset, reward function or configuration that cannot work, before anything is
            generated.

    Example:

    ```python
    from peft_svf import SVFConfig
    from peft_svf.trainers import SVFPolicyGradientConfig, SVFPolicyGradientTrainer

    trainer = SVFPolicyGradientTrainer(
        "meta-llama/Llama-3.1-8B-Instruct",
        reward_funcs=is_correct,
        args=SVFPolicyGradientConfig(
            "llama-svf-math", eval_strategy="steps", eval_steps=10, load_best_model_at_end=True
        ),
        train_dataset=train_dataset,
        eval_dataset=validation_dataset,
        peft_config=SVFConfig(),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "svf", "policy-gradient", "transformer-squared"]
    _name = "SVF policy gradient"
    _paper = {
        "title": "Transformer-Squared: Self-adaptive LLMs",
        "id": "2501.06252",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @inproceedings{sun2025transformersquared,
                title        = {{Transformer-Squared: Self-adaptive LLMs}},
                author       = {Qi Sun and Edoardo Cetin and Yujin Tang},
                year         = 2025,
                booktitle    = {International Conference on Learning Representations},
                eprint       = {arXiv:2501.06252},
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: Any,
        args: SVFPolicyGradientConfig | None = None,
        train_dataset: checks.AnyDataset | None = None,
        eval_dataset: checks.EvalDataset = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        *,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = SVFPolicyGradientConfig(f"{name.rstrip('/').split('/')[-1] or 'model'}-SVF")
        if not isinstance(args, SVFPolicyGradientConfig):
            raise TypeError(f"`args` must be an SVFPolicyGradientConfig, not a {type(args).__name__}.")
        checks.check_model(model, peft_config, args.trust_remote_code)
        check_vllm(model, args, peft_config, kwargs.get("quantization_config"))
        makes_columns = bool(kwargs.get("rollout_func") or kwargs.get("environment_factory"))
        checks.check_datasets(train_dataset, eval_dataset, [] if makes_columns else reward_funcs, not makes_columns)
        checks.check_enough_prompts(train_dataset, args)
        checks.check_best_metric(args, eval_dataset)
        check_can_push(args, model, peft_config)
        given = checks.trainable_snapshot(model)
        loading = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
        super().__init__(
            model,
            reward_funcs,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=adapt_language_model_only(peft_config, model, loading),
            **kwargs,
        )
        checks.check_images(self._is_vlm, train_dataset, eval_dataset)
        refuse_half_precision_engine(self)
        self._keep_float32(given)
        if args.disable_dropout:
            disable_all_dropout(self.model)
        self.add_callback(ParameterChecks(self))  # the last, to see what others did
        self._start = checks.trainable_snapshot(self.model)
        self._base_model: Any = self.accelerator.unwrap_model(self.model).get_base_model()
        self._choose_how_to_generate()
        self._prepare_scoring()

    def _keep_float32(self, given: dict[str, Tensor]) -> None:
        """Undo TRL's cast of adapters on quantized models to bfloat16, in which small updates are lost."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = given.get(name, parameter.data).to(parameter.device, torch.float32)
        checks.check_trainable(self.model)

    def _choose_how_to_generate(self) -> None:
        """From merged weights if they can be put back bit for bit, as SVF does; vLLM's sync merges itself."""
        self._adapter_layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        self._refuse_merged()
        configs = [self.model.peft_config[name] for name in self.model.active_adapters]
        self._is_svf = all(isinstance(config, SVFConfig) for config in configs)
        quantized = getattr(self._base_model, "is_quantized", False)
        self._generates_merged = self._is_svf and not (is_sharded(self) or quantized or self.use_vllm)

    def _prepare_scoring(self) -> None:
        """Let the base model return hidden states, and prove that its answers can be scored from them."""
        if self._is_vlm:
            check_processor(self.processing_class, self._base_model)
        if self.args.kl_coef:
            check_reference(self.model, self._base_model)
        add_hidden_states_output(self._base_model)
        if not is_sharded(self):
            check_logits_follow_from_hidden_states(self._base_model)
            check_forward(self._base_model)

    def train(
        self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """
        As [`~transformers.Trainer.train`], and an interrupted run goes on to the numbers of one that never stopped.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                `True` continues from the newest complete checkpoint in `output_dir`; incomplete ones are passed over
                with a warning. If there is no checkpoint at all, training starts from zero, so that a job that may be
                killed at any moment, also before its first checkpoint, can always be started with `True`. A path
                continues from that checkpoint. By default a new run begins at the offsets as they are now.
            args, kwargs:
                Other arguments of [`~transformers.Trainer.train`].

        Returns:
            `TrainOutput`: As of transformers, with `best_gain`, `best_gain_low` and `best_gain_high` in its metrics
            where a best checkpoint was compared with the start ([`gain_over_base`]).

        Raises:
            ValueError: If the checkpoint at the given path, or every one in `output_dir`, is incomplete.
            NonFiniteLossError: If a loss, a gradient, a reward or a logit is NaN or infinite; the batch is saved.
        """
        forget_evaluation(self)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    # -- rewards to advantages ---------------------------------------------------------------------------------------
    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        self._rewards_per_func: Tensor = super()._calculate_rewards(*args, **kwargs)  # gathered over processes
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        training = self.model.training
        decoding = contextlib.nullcontext() if training else decoding_temperature(self, self.args.eval_temperature)
        with decoding, without_router_logits(self._base_model):
            output = super()._generate_and_score_completions(inputs)
        n = self.num_generations if training else self.num_generations_eval
        rewards = total_rewards(self._rewards_per_func, self.reward_weights)
        advantages = subtract_baseline(rewards, self.args.baseline if training else "none", n)
        local = len(output["completion_ids"])
        start = self.accelerator.process_index * local
        output["advantages"] = advantages[start : start + local]
        logged = self._logs["advantages"]  # a bounded deque that already holds GRPO's group advantages
        for _ in range(min(len(advantages), len(logged))):
            logged.pop()
        logged.extend(advantages.tolist())
        if n == 1:
            self._metrics["train" if training else "eval"].pop("frac_reward_zero_std", None)  # always 1 here
        if not training:
            self._note_eval_batch(output, self._rewards_per_func)
        return output

    # -- loss --------------------------------------------------------------------------------------------------------
    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        training, coef, estimator = self.model.training, self.args.kl_coef, self.args.kl_estimator
        mask = inputs["completion_mask"]  # (B, T)
        if "tool_mask" in inputs:  # what a tool wrote is not the policy's
            mask = mask * inputs["tool_mask"]
        valid = mask.bool()
        scores = self._score(model, inputs, valid)

        def per_answer(values: Tensor) -> Tensor:  # (tokens,) to (B,): sums, only so has `kl_coef` its meaning
            return values.new_zeros(valid.shape).masked_scatter(valid, values).sum(1)

        advantages = inputs["advantages"]
        if scores.kl is not None and estimator == "k1_reward":
            advantages = advantages - coef * per_answer(scores.kl.detach())
        log_probs = scores.log_probs
        if training and "importance_sampling_ratio" in inputs:  # vLLM's policy is not quite ours; (B, 1) or (B, T)
            log_probs = log_probs * inputs["importance_sampling_ratio"].expand(valid.shape)[valid]
        policy_loss = -advantages * per_answer(log_probs)  # (B,)
        parts = {"tokens": valid.sum(1), "policy_loss": policy_loss, "entropy": per_answer(scores.entropy)}
        loss = policy_loss.mean()
        if scores.kl is not None:
            parts["kl"] = per_answer(scores.kl)
            if estimator != "k1_reward":
                loss = loss + coef * parts["kl"].mean()
        self._record(parts, inputs["num_items_in_batch"])
        return loss / self.current_gradient_accumulation_steps if training else loss

    def _record(self, parts: dict[str, Tensor], batch_tokens: Tensor) -> None:
        """Add the parts of the loss of each answer, of all processes, to the metrics of the running mode.

        In training the answers are one micro-batch of several, whose tokens together are `batch_tokens`.
        """
        columns = self.accelerator.gather(torch.stack([part.detach().float() for part in parts.values()], dim=1))
        answers = dict(zip(parts, columns.unbind(1), strict=True))
        training = self.model.training
        if not training:
            self._eval_answers.add(answers)
        tokens = batch_tokens / self.args.steps_per_generation if training else None
        for name, value in score_metrics(answers, tokens).items():
            self._metrics["train" if training else "eval"][name].append(value)
