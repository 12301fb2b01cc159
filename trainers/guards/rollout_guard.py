"""Base of the guards that look at the answers of every optimizer step, however often the run logs."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments


Metrics = dict[str, float]


class RolloutGuard(TrainerCallback, ExportableState):
    """Is told the newest training metrics after every micro-batch and judges their means at the end of the step.

    The metrics are those that the trainer logs, gathered over processes: every process takes the same decision. A
    metric that is NaN, such as the reward of a batch in which nothing could be judged, is left out.

    What it has seen, `seen()`, travels in `trainer_state.json`; thresholds are read from the arguments of the run, so
    that they can be changed on resuming.
    """

    def __init__(self) -> None:
        self.micro_batches: list[Metrics] = []
        self.reset()

    def observe(self, metrics: Metrics) -> None:
        """Take note of the newest values of the training metrics, by their name in the log."""
        self.micro_batches.append({name: value for name, value in metrics.items() if not math.isnan(value)})

    def judge(self, args: Any, state: TrainerState, control: TrainerControl, step: Metrics, model: Any) -> None:
        """Draw conclusions from the mean metrics of one optimizer step."""
        raise NotImplementedError

    def seen(self) -> dict[str, Any]:
        """What to remember in checkpoints, as plain JSON, by the name of the attribute."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything: a new run begins."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": self.seen()}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.micro_batches = []
        if state.global_step == 0:
            self.reset()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        observed, self.micro_batches = self.micro_batches, []
        columns: dict[str, list[float]] = {}
        for metrics in observed:
            for name, value in metrics.items():
                columns.setdefault(name, []).append(value)
        step = {name: sum(values) / len(values) for name, values in columns.items()}
        self.judge(args, state, control, step, kwargs.get("model"))
