"""The last look before an optimizer step: gradients that are NaN or infinite although every loss was finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments


class FiniteGradientsCallback(TrainerCallback):
    """Calls `stop` on every process if a gradient is not finite on any.

    With float16 an infinite gradient is how the loss scaler learns its scale, and it skips the step itself; so only a
    gradient that overflows without being scaled up counts. Under DeepSpeed, which keeps gradients to itself, nothing
    is seen here.

    Args:
        accelerator (`Accelerator`): Of the trainer.
        stop (`Callable[[], None]`): Saves what there is to save and raises.
    """

    def __init__(self, accelerator: Accelerator, stop: Callable[[], None]) -> None:
        self.accelerator = accelerator
        self.stop = stop
        self.micro_batches: list[dict[str, Any]] = []  # of the optimizer step in progress, added by the trainer

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.micro_batches.clear()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() >= 1.0:
            return
        flag = (~are_finite(kwargs["model"], self.accelerator.device)).float().view(1)
        if self.accelerator.gather(flag).any():  # sharded gradients differ between processes
            self.stop()


def are_finite(model: nn.Module, device: torch.device) -> Tensor:
    """Whether all gradients that this process holds are finite, as a tensor on `device`."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    shards = [gradient.to_local() if hasattr(gradient, "to_local") else gradient for gradient in gradients]
    largest = [torch.linalg.vector_norm(shard, torch.inf).to(device) for shard in shards if shard.numel()]
    return torch.stack(largest).isfinite().all() if largest else torch.tensor(True, device=device)
