"""A callback that measures how many tokens a second the training steps get through."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments


class ThroughputCallback(TrainerCallback):
    """
    Logs `tokens_per_second` with every training log: prompt and completion tokens of all processes, as TRL's
    `num_tokens` counts them, for each second of the optimizer steps since the log before. A second of a step is spent
    on generation, rewards, loss or update; evaluation and saving do not count.

    TRL's `step_time` is another measure: it has no update in it, and on an accelerator it stops before the last
    backward pass has run.

    Args:
        metrics (`dict[str, list[float]]`): The trainer's metrics for the next training log; it empties them there.
    """

    name = "tokens_per_second"

    def __init__(self, metrics: dict[str, list[float]]) -> None:
        self.metrics = metrics
        self.tokens = self.tokens_before = 0.0
        self.seconds = self.began = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tokens_before = state.num_input_tokens_seen
        self.began = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.device.type == "cuda" and (control.should_log or control.should_evaluate or control.should_save):
            torch.cuda.synchronize(args.device)  # the loss is about to be read anyway
        if self.name not in self.metrics:  # logged, so a new stretch begins
            self.tokens = self.seconds = 0.0
        self.tokens += state.num_input_tokens_seen - self.tokens_before
        self.seconds += time.perf_counter() - self.began
        self.metrics[self.name] = [self.tokens / self.seconds]
