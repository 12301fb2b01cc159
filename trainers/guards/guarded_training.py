"""The guards that watch every optimizer step of a trainer, and the way back after a collapse."""

from __future__ import annotations

import logging
import os
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import EarlyStoppingCallback
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer

from peft_svf.trainers.distributed import write_parameters
from peft_svf.trainers.guards.collapse import CollapseCallback
from peft_svf.trainers.guards.reward_variance import RewardVarianceCallback
from peft_svf.trainers.guards.rollout_guard import RolloutGuard


logger = logging.getLogger(__name__)


class GuardsRollouts(GRPOTrainer):
    """Mixin: warns about rewards without spread, stops a collapsing run and restores what was sound.

    The class that uses it keeps in `_start` copies of what is trainable, by name, as this run found it.
    """

    _start: dict[str, Tensor]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(RewardVarianceCallback())
        self.add_callback(CollapseCallback())
        if self.args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        newest = {name: values[-1] for name, values in self._metrics["train"].items() if values}
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, RolloutGuard):
                callback.observe(newest)
        return loss

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As [`~transformers.Trainer.train`]; a run that collapsed ends at the best or newest sound offsets."""
        output: TrainOutput = super().train(*args, **kwargs)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, CollapseCallback) and callback.has_collapsed and not self._has_returned_to_best():
                self._return_to_sound_offsets(callback.sound_checkpoints)
        return output

    def _has_returned_to_best(self) -> bool:
        """Whether an evaluation after the first step has decided what training ends with, the start included."""
        names = {name for entry in self.state.log_history if entry["step"] > 0 for name in entry}
        evaluated = any(name.startswith("eval_") and name.endswith("_runtime") for name in names)
        return bool(self.args.load_best_model_at_end) and evaluated

    def _return_to_sound_offsets(self, steps: list[int]) -> None:
        """Load the first of these checkpoints that is still there, or the start."""
        folders = [os.path.join(self.args.output_dir, f"checkpoint-{step}") for step in steps]
        # The main process decides: others may not see its files.
        [sound] = broadcast_object_list([next((folder for folder in folders if os.path.isdir(folder)), None)])
        if sound is None:
            write_parameters(self.model, self._start)
            logger.warning(
                "No better checkpoint from before the collapse: the starting offsets are restored. With "
                '`load_best_model_at_end=True`, or `save_strategy="steps"` and fewer `save_steps`, less is lost.'
            )
            return
        best, self.state.best_model_checkpoint = self.state.best_model_checkpoint, sound
        try:
            self._load_best_model()  # knows how to load under FSDP and DeepSpeed too
        finally:
            self.state.best_model_checkpoint = best
        logger.warning(
            f"The offsets of {sound} are restored: from before the collapse, with the best training reward."
        )
