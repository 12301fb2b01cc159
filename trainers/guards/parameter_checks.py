"""Refusal to train what would get lost: offsets that are not float32, or processes that do not train together."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from peft_svf.trainers import checks
from peft_svf.trainers.distributed import check_processes_train_together


class ParameterChecks(TrainerCallback):
    """Checks that everything trainable is float32 before every step, and that several processes share gradients.

    Something may have cast the model after the trainer was made, such as `model.to(torch.bfloat16)` or a callback.

    Args:
        trainer ([`~peft_svf.trainers.SVFPolicyGradientTrainer`]): The trainer that this callback belongs to.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        check_processes_train_together(self._trainer)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        checks.check_trainable(kwargs["model"])

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        checks.check_trainable(kwargs["model"])
