"""What transformers and TRL forget in a checkpoint, so that a resumed run gives the numbers of a whole one."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput
from trl import GRPOTrainer

from peft_svf.trainers.checkpoints import checkpoint_files as files


PROGRESS = "training_progress.json"
START = "start.safetensors"


class ExactResume(GRPOTrainer):
    """Mixin: a resumed run logs, selects and stops as if it had never been interrupted.

    Saved in addition, and restored: loss and metrics since the last log, the counters of callbacks, the seconds spent
    and the starting offsets. Repaired: from the second epoch on, TRL's sampler would
    deal the prompts of the first one again; a run that had reached its last step or had been stopped early would train
    on. `train_runtime` and `train_loss` are those of the whole run.
    """

    _start: dict[str, Tensor]
    _resumed_from: str | None = None
    _train_sampler: Sampler | None = None
    _seconds_before = 0.0  # spent in training before this process
    _train_began = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_RestoreProgress(self))

    # -- saving ------------------------------------------------------------------------------------------------------
    def _save_progress(self, checkpoint: Path) -> None:
        """Write what transformers leaves out into the folder of a checkpoint; called by all processes."""
        since_log = getattr(self, "_tr_loss", None)  # a local variable before transformers 5.3
        if since_log is not None:
            since_log = self.accelerator.gather(since_log.detach().reshape(1)).mean().item()
        if not self.args.should_save:
            return
        progress = {
            "first_step": getattr(self, "_initial_global_step", 0),
            "last_logged_step": self._globalstep_last_logged,
            "loss_since_log": since_log,
            "loss_before": self._total_loss_scalar,
            "metrics": self._metrics["train"],
            "seconds": self._seconds_before + time.time() - self._train_began,
            "training": self.model.training,  # GRPO logs other metrics after an evaluation than after a step
        }
        (checkpoint / PROGRESS).write_text(json.dumps(progress, default=float), encoding="utf-8")
        if self._start:  # the best checkpoint has to beat it, a collapsed run may return to it
            save_file({name: tensor.contiguous() for name, tensor in self._start.items()}, checkpoint / START)

    # -- restoring ---------------------------------------------------------------------------------------------------
    def _restore_progress(self) -> None:
        self._seconds_before, self._train_began = 0.0, time.time()
        if self._resumed_from is None:
            return
        for _ in range(int(self.state.epoch or 0)):  # one permutation for each finished epoch
            if self._train_sampler is not None:
                next(iter(self._train_sampler), None)
        self._locate_best_checkpoint()
        checkpoint = Path(self._resumed_from)
        if (checkpoint / START).is_file():
            saved = load_file(checkpoint / START)
            self._start = {name: saved.get(name, own).to(own.device) for name, own in self._start.items()}
        if not (checkpoint / PROGRESS).is_file():  # written by another trainer
            return
        progress = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
        self._seconds_before = progress["seconds"]
        self._initial_global_step = progress["first_step"]
        self._globalstep_last_logged = progress["last_logged_step"]
        self._total_loss_scalar = progress["loss_before"]
        if progress["loss_since_log"] is not None and hasattr(self, "_tr_loss"):
            self._tr_loss += progress["loss_since_log"]
        self.model.train(progress["training"])
        self._metrics["train"].clear()
        self._metrics["train"].update(progress["metrics"])

    def _locate_best_checkpoint(self) -> None:
        """The best checkpoint is stored with its path, which changes when a run moves to another folder."""
        step = self.state.best_global_step
        if step and not os.path.isdir(self.state.best_model_checkpoint or ""):
            moved = Path(self.args.output_dir) / f"checkpoint-{step}"
            self.state.best_model_checkpoint = None if files.why_unusable(moved, False) else str(moved)

    def _load_callback_state(self) -> None:
        """Restore the counters of callbacks in place; transformers does so only on request, and in copies of them.

        Two more faults of transformers (5.23): of several callbacks of a class every save appends the states to those
        of earlier saves, and a callback that the checkpoint does not know could not be saved.
        """
        super()._load_callback_state()
        stored: Any = self.state.stateful_callbacks
        of_class: dict[str, list[Any]] = {}
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                of_class.setdefault(type(callback).__name__, []).append(callback)
        for name, callbacks in of_class.items():
            saved = stored.get(name, [])
            newest = saved[-len(callbacks) :] if isinstance(saved, list) else [saved]
            for callback, state in zip(callbacks, newest, strict=False):
                for attribute, value in state.get("attributes", {}).items():
                    setattr(callback, attribute, value)
            states = [callback.state() for callback in callbacks]
            stored[name] = states if len(states) > 1 else states[0]

    def _stopped_early(self) -> bool:
        return self._resumed_from is not None and any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
        )

    # -- the seams of transformers -----------------------------------------------------------------------------------
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        self._train_sampler = super()._get_train_sampler(*args, **kwargs)
        return self._train_sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """No step after the last one: transformers looks only when it has made one more."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: float, start_time: float) -> TrainOutput:
        output: TrainOutput = super()._finalize_training(trial, num_train_samples, start_time - self._seconds_before)
        return output


class _RestoreProgress(TrainerCallback):
    """Calls the trainer when its counters are set to zero and nothing has been done with them."""

    def __init__(self, trainer: ExactResume) -> None:
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer._restore_progress()
        if self.trainer._stopped_early():
            control.should_training_stop = True
