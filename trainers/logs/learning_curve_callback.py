"""A callback that keeps `learning_curve.csv` and `learning_curve.png` of a training run up to date."""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from peft_svf.trainers.logs.learning_curve import rows_by_step, write_learning_curve
from peft_svf.trainers.logs.learning_curve_plot import plot_learning_curve, validation_rewards


logger = logging.getLogger(__name__)

CSV_NAME, PNG_NAME = "learning_curve.csv", "learning_curve.png"
SHARE_OF_TIME = 0.05  # to be spent on each file; a table of 2,000 steps takes 0.1 s, a picture 0.3 s


class LearningCurveCallback(TrainerCallback):
    """
    Writes `output_dir/learning_curve.csv` at every log and evaluation, and `learning_curve.png` at evaluations and at
    the end. Both follow from `state.log_history` alone, so a resumed run writes what an uninterrupted one does.

    Where steps are so quick that this would take more than a twentieth of the time, it waits; at the end of the run
    both files are complete. The picture needs matplotlib (`pip install peft-svf[plots]`). A folder that cannot be
    written to is a warning, not the end of the training.
    """

    def __init__(self) -> None:
        self.can_plot = importlib.util.find_spec("matplotlib") is not None
        self.due = {CSV_NAME: 0.0, PNG_NAME: 0.0}  # when the next one may be written
        self.warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and not self.can_plot:
            logger.info(f"No {PNG_NAME} without matplotlib: `pip install peft-svf[plots]`.")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._keep(CSV_NAME, write_csv, args, state)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and self.can_plot and state.global_step > 0:
            self._keep(PNG_NAME, write_png, args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.due = dict.fromkeys(self.due, 0.0)
        self.on_log(args, state, control)
        self.on_evaluate(args, state, control)

    def _keep(self, name: str, write: Callable[..., None], args: TrainingArguments, state: TrainerState) -> None:
        began = time.monotonic()
        if began < self.due[name]:
            return
        try:
            write(args, state, os.path.join(str(args.output_dir), name))
        except OSError as error:
            if not self.warned:
                logger.warning(f"The learning curve cannot be written, the training goes on: {error}")
            self.warned = True
        now = time.monotonic()
        self.due[name] = now + (now - began) / SHARE_OF_TIME


def write_csv(args: TrainingArguments, state: TrainerState, path: str) -> None:
    write_learning_curve(state.log_history, path)


def write_png(args: TrainingArguments, state: TrainerState, path: str) -> None:
    rows = rows_by_step(state.log_history)
    if validation_rewards(rows) or any("reward" in row for row in rows):
        metric = args.metric_for_best_model and f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        plot_learning_curve(rows, path, metric, args.greater_is_better is not False)
