"""Evaluation with means over answers instead of over batches, and one name for each eval dataset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput
from trl import GRPOTrainer

from peft_svf.trainers.distributed import check_can_evaluate
from peft_svf.trainers.validation.answer_metrics import EvalAnswers, lengths_and_ends
from peft_svf.trainers.validation.reward_metrics import exact_reward_metrics, mean_of_batches, total_rewards


class ExactEvaluation(GRPOTrainer):
    """Mixin: every answer of an evaluation counts once, whatever the batches and the number of processes.

    The class that uses it calls `_note_eval_batch` with every generated batch, adds the parts of the loss of each
    answer to `_eval_answers`, and has the method `_keep_validation_rewards`.
    """

    _keep_validation_rewards: Callable[[str, Tensor], None]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._eval_rewards: list[Tensor] = []  # gathered (answers, reward functions), in the order of the sampler
        self._eval_answers = EvalAnswers()

    def _note_eval_batch(self, output: dict[str, Any], rewards_per_func: Tensor) -> None:
        """Remember a batch that `_generate_and_score_completions` made, and its gathered rewards."""
        self._eval_rewards.append(rewards_per_func)
        tokenizer: Any = getattr(self.processing_class, "tokenizer", self.processing_class)
        lengths = lengths_and_ends(output, [*self.eos_token_ids, tokenizer.pad_token_id])
        self._eval_answers.add({name: self.accelerator.gather(values) for name, values in lengths.items()})

    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """As [`~transformers.Trainer.evaluation_loop`], with exact metrics."""
        check_can_evaluate(self)
        self._eval_rewards.clear()
        self._eval_answers.clear()
        self._metrics["eval"].clear()
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        sizes = [len(rewards) for rewards in self._eval_rewards]
        per_func = torch.cat(self._eval_rewards)
        if hasattr(dataloader.dataset, "__len__"):  # the last distributed batch is filled up with scored samples
            per_func = per_func[: len(dataloader.dataset) * self.num_generations_eval]
        exact = self._exact_metrics(per_func)
        self._keep_validation_rewards(metric_key_prefix, total_rewards(per_func, self.reward_weights))
        metrics = self._metrics["eval"]
        dataset_name = metric_key_prefix.removeprefix("eval").removeprefix("_")  # GRPO logs each as `eval_reward`
        for key in list(metrics):
            values = metrics.pop(key)
            if key in exact:
                values = [exact[key]]
            elif len(values) == len(sizes) and "/min" not in key and "/max" not in key:
                values = mean_of_batches(values, sizes)
            metrics[f"{dataset_name}_{key}" if dataset_name else key] = values
        named = {f"{metric_key_prefix}_{key}": value for key, value in exact.items()}
        return output._replace(metrics={**(output.metrics or {}), **named})

    def _exact_metrics(self, per_func: Tensor) -> dict[str, float]:
        """Metrics of the evaluation that ran last, from its rewards, `(answers, reward functions)`."""
        n = self.num_generations_eval
        exact = exact_reward_metrics(per_func, self.reward_weights, self.reward_func_names, n)
        exact |= self._eval_answers.metrics(len(per_func))
        penalty = exact.get("kl_sequence", 0.0) if self.args.kl_estimator != "k1_reward" else 0.0
        exact["loss"] = exact["policy_loss"] + self.args.kl_coef * penalty
        return exact
