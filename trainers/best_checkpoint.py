"""The starting point as a candidate for the best checkpoint, which transformers' `Trainer` never considers."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer

from peft_svf.trainers import checks


logger = logging.getLogger(__name__)


class StartIsACandidate(GRPOTrainer):
    """Mixin: with `load_best_model_at_end=True` a checkpoint has to beat the evaluation at step 0.

    If none does, training ends where it started and says so. The class that uses it sets `_start`, copies of what is
    trainable by name, when it is made.
    """

    _start: dict[str, Tensor]

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if self.is_in_train and self.state.global_step == 0 and self._best_metric_name in metrics:
            self.state.best_metric = metrics[self._best_metric_name]  # what a checkpoint has to beat
        return metrics

    @property
    def _best_metric_name(self) -> str:
        return f"eval_{(self.args.metric_for_best_model or 'eval_reward').removeprefix('eval_')}"

    @property
    def base_eval_reward(self) -> float | None:
        """Validation score before the first step, of the base model unless training started from an expert.

        `eval_reward`, or `metric_for_best_model` where it is set; None without an evaluation at step 0.
        """
        return self._eval_history().get(0)

    def _eval_history(self) -> dict[int, float]:
        name = self._best_metric_name
        return {entry["step"]: entry[name] for entry in self.state.log_history if entry.get(name) is not None}

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As [`~transformers.Trainer.train`]; ends at the start if no checkpoint of the run is better."""
        checks.check_trainable(self.model)
        output: TrainOutput = super().train(*args, **kwargs)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is None:
            self._return_to_start()
        return output

    def _return_to_start(self) -> None:
        scores = self._eval_history()
        trained = {step: score for step, score in scores.items() if step > 0}
        if not trained:
            logger.warning("No evaluation took place after the first step: the offsets of the last step are kept.")
            return
        step = (max if self.args.greater_is_better else min)(trained, key=lambda step: trained[step])
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in self._start:
                    parameter.copy_(self._start[name])
        logger.warning(
            f"No checkpoint is better than the start by `{self._best_metric_name}`: {scores.get(0, float('nan')):.4g} "
            f"at step 0, at best {trained[step]:.4g} at step {step}. The starting offsets are restored. Try a lower "
            "`learning_rate`, a larger batch or another `baseline`."
        )
