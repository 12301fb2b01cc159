"""Checkpoints that survive anything: kill -9, full disks and half-written folders."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from torch import nn
from transformers.trainer_utils import TrainOutput

from peft_svf.trainers.checkpoints import checkpoint_files as files
from peft_svf.trainers.checkpoints.exact_resume import ExactResume
from peft_svf.trainers.distributed import is_sharded


logger = logging.getLogger(__name__)


class AtomicCheckpoints(ExactResume):
    """Mixin: a checkpoint, and a model saved by `save_model`, appears complete or not at all.

    Everything is written into a folder `_saving`, brought to the disk and renamed; old checkpoints go the same way
    back. What a killed process left in `_saving` is removed at the next save or start of training. If the disk is
    full, `_saving` is removed, the last checkpoint is as it was, and an `OSError` says how to go on.
    """

    _staging: Path | None = None  # while a checkpoint or model is written

    # -- resuming ----------------------------------------------------------------------------------------------------
    def train(
        self, resume_from_checkpoint: str | os.PathLike | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As [`~transformers.Trainer.train`], but knows complete checkpoints from incomplete ones."""
        self._clean(Path(self.args.output_dir))
        self._resumed_from = self._find_checkpoint(resume_from_checkpoint)
        output: TrainOutput = super().train(self._resumed_from, *args, **kwargs)
        return output

    def _find_checkpoint(self, wanted: str | os.PathLike | bool | None) -> str | None:
        """The checkpoint to resume from, found by the main process for all."""
        found: list[tuple[str | None, str]] = [(None, "")]
        if self.accelerator.is_main_process and wanted is not None and wanted is not False:
            found = [self._newest_checkpoint() if wanted is True else self._named_checkpoint(Path(wanted))]
        (path, error) = broadcast_object_list(found)[0]
        if error:
            raise ValueError(error)
        return path

    def _newest_checkpoint(self) -> tuple[str | None, str]:
        run = Path(self.args.output_dir)
        newest, skipped = files.newest_usable(run, with_optimizer=not self.args.save_only_model)
        for checkpoint, reason in skipped.items():
            logger.warning(f"{checkpoint} is incomplete and passed over: {reason}.")
        if newest is not None:
            return str(newest), ""
        if not skipped:
            logger.warning(f"There is no checkpoint in {run} to resume from: training starts from zero.")
            return None, ""
        reasons = "; ".join(f"{checkpoint.name}: {reason}" for checkpoint, reason in skipped.items())
        return None, (
            f"No checkpoint in {run} is complete ({reasons}). Delete or move them to start from zero, or pass the "
            "path of a complete checkpoint as `resume_from_checkpoint`."
        )

    def _named_checkpoint(self, checkpoint: Path) -> tuple[str | None, str]:
        reason = files.why_unusable(checkpoint, with_optimizer=not self.args.save_only_model)
        if reason is None:
            return str(checkpoint), ""
        newest, _ = files.newest_usable(checkpoint.parent, with_optimizer=not self.args.save_only_model)
        remedy = "none beside it is complete" if newest is None else f"the newest complete one beside it is {newest}"
        return None, f"Training cannot resume from {checkpoint}: {reason}; {remedy}."

    # -- checkpoints -------------------------------------------------------------------------------------------------
    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run = Path(self._get_output_dir(trial))
        final = run / f"checkpoint-{self.state.global_step}"
        self._clean(run)
        with self._writing(run / files.STAGING, final):
            staged = run / files.STAGING / final.name
            self._save_staged(model, trial, staged, final)
            if self.args.should_save:
                files.publish_folder(staged, final)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_local_main_process and staged.is_dir():  # a node with a disk of its own
                files.publish_folder(staged, final)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            files.rotate(run, self.args.save_total_limit, [final, *([Path(best)] if best else [])])
            files.clean(run)

    def _save_staged(self, model: nn.Module, trial: Any, staged: Path, final: Path) -> None:
        super()._save_checkpoint(model, trial)
        self._save_progress(staged)
        if self.state.best_global_step == self.state.global_step:  # transformers looked for it in its staging folder
            self.state.best_model_checkpoint = str(final)
        if self.args.should_save:
            self.state.save_to_json(str(staged / "trainer_state.json"))
        self.accelerator.wait_for_everyone()  # every process writes its random state, with FSDP its shards too
        if self.accelerator.is_local_main_process:
            files.sync(staged)
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None:  # the upload runs in the background and needs the folder to stay where it is
            super()._push_from_checkpoint(checkpoint_folder)

    # -- the model ---------------------------------------------------------------------------------------------------
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As [`~transformers.Trainer.save_model`]; a model that `from_pretrained` finds is complete."""
        if self._staging is not None:  # part of a checkpoint
            super().save_model(output_dir, _internal_call)
            return
        final = Path(output_dir or self.args.output_dir)
        sharded = is_sharded(self)  # elsewhere the main process may be here alone
        if self.args.should_save:
            shutil.rmtree(final / files.STAGING / "model", ignore_errors=True)
        if sharded:
            self.accelerator.wait_for_everyone()
        with self._writing(final / files.STAGING, final):
            staged = final / files.STAGING / "model"
            super().save_model(str(staged), _internal_call=True)
            if sharded:
                self.accelerator.wait_for_everyone()
            if self.args.should_save:
                files.sync(staged)
                files.publish_model(staged, final)
                files.clean(final)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    # -- staging -----------------------------------------------------------------------------------------------------
    def _clean(self, run: Path) -> None:
        if self.accelerator.is_local_main_process:
            files.clean(run)
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def _writing(self, staging: Path, final: Path) -> Iterator[None]:
        """Whatever is written meanwhile goes to `staging`; after an error nothing of it stays."""
        best = self.state.best_model_checkpoint
        self._staging = staging
        try:
            yield
        except BaseException as error:
            self.state.best_model_checkpoint = best
            number = getattr(error, "errno", None) or (errno.ENOSPC if files.is_full(staging) else errno.EIO)
            message = self._describe(error, staging, final) if files.is_storage_error(error, staging) else ""
            files.clean(staging.parent)
            if not message:
                raise
            raise OSError(number, message) from error
        finally:
            self._staging = None

    def _describe(self, error: BaseException, staging: Path, final: Path) -> str:
        """What could not be written, and how to go on."""
        problem = (
            f"{final} could not be saved: {error} (at {files.last_written(staging)}, with "
            f"{files.free_bytes(staging) / 2**20:.1f} MiB left on that disk)."
        )
        newest, _ = files.newest_usable(Path(self.args.output_dir), with_optimizer=not self.args.save_only_model)
        if newest is None:
            return (
                f"{problem} There is no complete checkpoint in {self.args.output_dir}. Free some space and try again."
            )
        return (
            f"{problem} The last usable checkpoint is {newest}. Free some space, or lower `save_total_limit` to keep "
            "fewer checkpoints, and go on with `trainer.train(resume_from_checkpoint=True)`."
        )
