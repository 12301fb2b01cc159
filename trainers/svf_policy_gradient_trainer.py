"""Policy-gradient training of experts: REINFORCE with a KL penalty, on top of TRL's `GRPOTrainer`."""

from __future__ import annotations

import contextlib
import os
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_utils import EvalLoopOutput, TrainOutput
from trl import GRPOTrainer

from peft_svf.hub_cards import ExpertCardData, write_expert_card
from peft_svf.trainers import checks
from peft_svf.trainers.checkpoints.atomic_checkpoints import AtomicCheckpoints
from peft_svf.trainers.distributed import (
    check_can_evaluate,
    forget_evaluation,
    refuse_half_precision_engine,
    whole_head,
)
from peft_svf.trainers.guards.finite_loss import StopsOnNonFinite
from peft_svf.trainers.guards.parameter_checks import ParameterChecks
from peft_svf.trainers.guards.rollout_guards import GuardsRollouts
from peft_svf.trainers.kl_sweep.sweep import KLSweep
from peft_svf.trainers.logs.completion_tables import CompletionTables
from peft_svf.trainers.logs.training_logs import TrainingLogs
from peft_svf.trainers.loss.advantages import subtract_baseline
from peft_svf.trainers.loss.forward_checks import check_forward
from peft_svf.trainers.loss.hidden_states import (
    add_hidden_states_output,
    check_logits_follow_from_hidden_states,
    padded_inputs,
    without_router_logits,
)
from peft_svf.trainers.loss.token_scores import LanguageModelHead, TokenScores, score_tokens
from peft_svf.trainers.rollouts.decoding import decoding_temperature
from peft_svf.trainers.rollouts.generation_memory import StepsPerGenerationThatFit
from peft_svf.trainers.rollouts.image_prompts import (
    ImagePrompts,
    adapt_language_model_only,
    check_processor,
    multimodal_inputs,
)
from peft_svf.trainers.rollouts.merged_rollouts import MergedRollouts, check_vllm, disable_all_dropout
from peft_svf.trainers.svf_policy_gradient_config import SVFPolicyGradientConfig
from peft_svf.trainers.validation.answer_metrics import EvalAnswers, lengths_and_ends, score_metrics
from peft_svf.trainers.validation.best_checkpoint import StartIsACandidate
from peft_svf.trainers.validation.reward_metrics import exact_reward_metrics, mean_of_batches, total_rewards
from peft_svf.tuner import SVFConfig


class SVFPolicyGradientTrainer(
    KLSweep,
    AtomicCheckpoints,
    StopsOnNonFinite,
    GuardsRollouts,
    TrainingLogs,
    CompletionTables,
    StartIsACandidate,
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
    a stand-in for the engine; not run with vLLM itself. FSDP and quantized base models are refused.

    Logs `policy_loss`, `entropy` and, with a `kl_coef`, `kl` (mean over tokens) and `kl_sequence` (sum over tokens,
    what `kl_coef` multiplies) in addition to GRPO's `reward`, `rewards/<function>/mean` and `completions/*`, how far
    the singular values have moved (`z/rms_change`, `z/max_change`, and with evaluations `z/layers/<index>` and
    `z/modules/<name>`) and `tokens_per_second`. Writes `learning_curve.csv` and, with matplotlib,
    `learning_curve.png`; with `log_completions=True`, prints completions and writes them to `completions/*.parquet`.

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
        owns_data = bool(
            kwargs.get("rollout_func") or kwargs.get("environment_factory")
        )  # columns are made on the way
        checks.check_datasets(train_dataset, eval_dataset, [] if owns_data else reward_funcs, not owns_data)
        checks.check_enough_prompts(train_dataset, args)
        checks.check_best_metric(args, eval_dataset)
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
        self._adapter_layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]
        self._refuse_merged()
        self._base_model: Any = self.accelerator.unwrap_model(self.model).get_base_model()
        if self._is_vlm:
            check_processor(self.processing_class, self._base_model)
        add_hidden_states_output(self._base_model)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if not sharded:
            check_logits_follow_from_hidden_states(self._base_model)
            check_forward(self._base_model)
        # SVF's unmerge puts the original weights back bit for bit; other methods drift, and vLLM's sync merges itself.
        configs = [self.model.peft_config[name] for name in self.model.active_adapters]
        quantized = getattr(self._base_model, "is_quantized", False)
        self._is_svf = all(isinstance(config, SVFConfig) for config in configs)
        self._generates_merged = self._is_svf and not (sharded or quantized or self.use_vllm)
        self._eval_rewards: list[Tensor] = []  # gathered (answers, reward functions), in the order of the sampler
        self._eval_answers = EvalAnswers()

    def _keep_float32(self, given: dict[str, Tensor]) -> None:
        """Undo TRL's cast of adapters on quantized models to bfloat16, in which small updates are lost."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and parameter.dtype != torch.float32:
                parameter.data = given.get(name, parameter.data).to(parameter.device, torch.float32)
        checks.check_trainable(self.model)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As [`~transformers.Trainer.train`], also after `evaluate()` in several processes."""
        forget_evaluation(self)
        return super().train(*args, **kwargs)

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
            self._eval_rewards.append(self._rewards_per_func)
            tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)
            endings = [*self.eos_token_ids, tokenizer.pad_token_id]
            lengths = lengths_and_ends(output, endings)
            self._eval_answers.add({name: self.accelerator.gather(values) for name, values in lengths.items()})
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

    def _score(self, model: nn.Module, inputs: dict[str, Any], valid: Tensor) -> TokenScores:
        """Scores of the sampled tokens marked in `valid`, with a KL if there is a `kl_coef`."""
        self._refuse_merged()
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)  # (B, P + T)
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        model_inputs = padded_inputs(self._base_model, input_ids, attention_mask) | multimodal_inputs(inputs)

        def hidden_states() -> Tensor:  # (tokens, hidden): the states that predict the sampled tokens
            states = model(**model_inputs, return_hidden_states_only=True)
            return states[:, -valid.size(1) - 1 : -1][valid]

        reference = None
        if self.args.kl_coef:
            with torch.no_grad(), self._adapters_disabled():
                reference = hidden_states()
        return score_tokens(
            hidden_states(),
            inputs["completion_ids"][valid],
            whole_head(LanguageModelHead.of(self._base_model)),
            self.temperature,
            reference,
            self.args.kl_estimator,
        )

    @contextlib.contextmanager
    def _adapters_disabled(self) -> Iterator[None]:
        """The base model, without what makes `PeftModel.disable_adapter` take 9 to 17 ms on an 8B model."""
        tuner = self.accelerator.unwrap_model(self.model).base_model
        tuner.disable_adapter_layers()
        try:
            yield
        finally:
            tuner.enable_adapter_layers()

    # -- evaluation --------------------------------------------------------------------------------------------------
    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Means over answers instead of over batches, and one name per eval dataset."""
        check_can_evaluate(self)
        self._eval_rewards.clear()
        self._eval_answers.clear()
        self._metrics["eval"].clear()
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        sizes = [len(rewards) for rewards in self._eval_rewards]
        per_func = torch.cat(self._eval_rewards)
        if hasattr(dataloader.dataset, "__len__"):  # the last distributed batch is filled up with scored samples
            per_func = per_func[: len(dataloader.dataset) * self.num_generations_eval]
        n = self.num_generations_eval
        exact = exact_reward_metrics(per_func, self.reward_weights, self.reward_func_names, n)
        self._keep_validation_rewards(metric_key_prefix, total_rewards(per_func, self.reward_weights))
        exact |= self._eval_answers.metrics(len(per_func))
        metrics = self._metrics["eval"]
        dataset_name = metric_key_prefix.removeprefix("eval").removeprefix("_")  # GRPO logs each as `eval_reward`
        for key in list(metrics):
            values = metrics.pop(key)
            if key in exact:
                values = [exact[key]]
            elif len(values) == len(sizes) and "/min" not in key and "/max" not in key:
                values = mean_of_batches(values, sizes)
            metrics[f"{dataset_name}_{key}" if dataset_name else key] = values
        penalty = exact.get("kl_sequence", 0.0) if self.args.kl_estimator != "k1_reward" else 0.0
        exact["loss"] = exact["policy_loss"] + self.args.kl_coef * penalty
        named = {f"{metric_key_prefix}_{key}": value for key, value in exact.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    # -- card --------------------------------------------------------------------------------------------------------
    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Write the card of the expert into `output_dir`, with what the trainer knows and no results.

        Args:
            model_name (`str`, *optional*): Name of the expert. Defaults to the name of the folder.
            dataset_name (`str`, *optional*): What the expert was trained on.
            tags (`str` or `list[str]`, *optional*): Used only for adapters that are not SVF, whose card is TRL's.
        """
        if not self._is_svf:
            super().create_model_card(model_name, dataset_name, tags)
        elif self.is_world_process_zero():
            os.makedirs(self.args.output_dir, exist_ok=True)
            write_expert_card(self.args.output_dir, self._card_facts(model_name, dataset_name))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the expert with its card, last: PEFT rewrites the metadata of any card that it finds."""
        super()._save(output_dir, state_dict)
        if self._is_svf and self.args.should_save:
            write_expert_card(output_dir or self.args.output_dir, self._card_facts())

    def _card_facts(self, model_name: str | None = None, dataset_name: str | None = None) -> ExpertCardData:
        args, config = self.args, self._base_model.config
        return ExpertCardData(
            name=model_name or os.path.basename(os.path.abspath(args.output_dir)),
            base_model=config._name_or_path or None,
            base_revision=getattr(config, "_commit_hash", None),
            trained_parameters=sum(offsets.numel() for offsets in self._start.values()),
            task=dataset_name,
            reward=", ".join(self.reward_func_names),
            kl_coefficient=args.kl_coef,
            seeds=(args.seed,),
            steps=self.state.global_step,
            learning_rate=args.learning_rate,
            batch_size=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        )
