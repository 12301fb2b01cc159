"""What our trainer logs beside GRPO's metrics: offsets, throughput and the learning curve, to every `report_to`."""

from __future__ import annotations

import math
from typing import Any

from trl import GRPOTrainer

from peft_svf.trainers.logs.learning_curve_callback import LearningCurveCallback
from peft_svf.trainers.logs.offset_statistics import OffsetStatistics
from peft_svf.trainers.logs.throughput import ThroughputCallback


class TrainingLogs(GRPOTrainer):
    """
    Mixin that adds to every log of training and evaluation `z/rms_change` and `z/max_change`, to those of evaluations
    and to the last one `z/layers/<index>` and `z/modules/<name>` (see [`OffsetStatistics`]), to those of training
    `tokens_per_second` (see [`ThroughputCallback`]), and keeps the learning curve (see [`LearningCurveCallback`]).

    A metric without a value, for instance the mean of a reward function that judged nothing, is left out: GRPO logs
    None, which TensorBoard and others refuse.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._offset_statistics = OffsetStatistics(self.model)
        self.add_callback(ThroughputCallback(self._metrics["train"]))
        if self.args.learning_curve:
            self.add_callback(LearningCurveCallback())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As [`~trl.GRPOTrainer.log`]."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in [name for name, values in metrics.items() if all(map(math.isnan, values))]:
            del metrics[name]
        last_or_evaluation = not self.model.training or "train_runtime" in logs
        statistics = self._offset_statistics.collect(by_place=last_or_evaluation)
        logs.update(statistics)
        super().log(logs, start_time)
        for name in statistics:  # in the log, but no result of `evaluate`
            del logs[name]
