"""A sweep over `kl_coef` on one trainer: every coefficient from the same start, the best on validation is kept."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from peft_svf.experts.files import replace_file
from peft_svf.trainers.checkpoints import checkpoint_files as files
from peft_svf.trainers.distributed import is_sharded
from peft_svf.trainers.kl_sweep.fresh_trainer import FreshTrainer
from peft_svf.trainers.kl_sweep.record import SWEEP_NAME, KLRun, KLSweepResult, choose, read_sweep, write_sweep
from peft_svf.trainers.validation.best_checkpoint import (
    VALIDATION_REWARDS_NAME,
    PairedGain,
    StartIsACandidate,
    ValidationRewards,
)


logger = logging.getLogger(__name__)

# What decides the numbers of a run: results made with other values are not continued.
SETTINGS_OF_A_RUN = (
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "steps_per_generation",
    "world_size",
    "baseline",
    "kl_estimator",
    "num_generations",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "generation_kwargs",
    "mask_truncated_completions",
    "max_completion_length",
    "eval_temperature",
    "num_generations_eval",
    "eval_steps",
    "early_stopping_patience",
    "collapse_patience",
    "collapse_kl",
    "metric_for_best_model",
    "greater_is_better",
)


class KLSweep(StartIsACandidate):
    """Mixin: `sweep_kl` trains with several KL coefficients and keeps the expert that is best on validation."""

    _fresh: FreshTrainer | None = None

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        self._remember_fresh()
        return super().train(*args, **kwargs)

    def _remember_fresh(self) -> FreshTrainer:
        if self._fresh is None:
            self._fresh = FreshTrainer(self)
        return self._fresh

    def sweep_kl(self, coefficients: Sequence[float] = (0.0, 0.1, 0.2, 0.3), resume: bool = True) -> KLSweepResult:
        """Train once with each KL coefficient and keep the expert with the best validation score.

        The paper chooses its coefficient so (arXiv 2501.06252, appendix A.1). Every run starts from the offsets that
        the trainer was given, with a new optimizer, schedule, order of the data and random numbers: it is what a new
        trainer with that `kl_coef` would do. Runs go to `<output_dir>/kl-<coefficient>`, results to
        `<output_dir>/kl_sweep.json` after each run. The base model is a candidate; of equal experts the one with the
        larger coefficient is kept, which is closer to it.

        Afterwards the winner is loaded and saved in `output_dir`, `args.kl_coef` is its coefficient, and the
        checkpoints of the other runs are deleted. If no expert is better than the base, the model is what it was,
        `best_is_base` is true and nothing is saved. Nothing is uploaded: `push_to_hub` does, if there is a winner.

        Called again, also in a new process after an interruption, it skips the coefficients that are finished and
        continues the one that was interrupted from its last checkpoint, to the same numbers. Coefficients that an
        earlier call finished in the same folder stay candidates.

        What user code keeps between calls (a reward function that counts, a callback's own objects, a tracker's run,
        the engine of vLLM) is shared by the runs.

        Args:
            coefficients (`Sequence[float]`, *optional*, defaults to `(0.0, 0.1, 0.2, 0.3)`):
                Values of `kl_coef`, each once; the paper's by default.
            resume (`bool`, *optional*, defaults to `True`):
                Whether to continue what `output_dir` holds; otherwise the runs recorded there are deleted first.

        Returns:
            [`KLSweepResult`]: Scores of all coefficients; prints as a table.

        Raises:
            ValueError: For coefficients, arguments or a folder that cannot work, before anything is trained.
        """
        values = _checked_coefficients(coefficients)
        fresh = self._remember_fresh()
        self._check_can_sweep(fresh)
        folder = Path(self.args.output_dir)
        settings = self._settings_of_sweep(fresh.start)
        runs = self._open_sweep(folder, settings, resume)
        with self._arguments_of_runs():
            for value in values:
                if value not in runs:
                    runs[value] = self._run_of_sweep(fresh, value, folder / _run_name(value))
                    self._on_main(lambda: write_sweep(folder / SWEEP_NAME, settings, runs))
        ordered = tuple(runs[value] for value in sorted(runs))
        winner = choose(ordered, bool(self.args.greater_is_better))
        result = KLSweepResult(self._best_metric_name, ordered, None if winner is None else winner.kl_coef)
        self._on_main(lambda: write_sweep(folder / SWEEP_NAME, settings, runs, True, result.winner))
        fresh.restore(self)
        self._keep_winner(folder, result, winner)
        losers = [folder / _run_name(run.kl_coef) for run in ordered if run is not winner]
        self._on_main(lambda: _delete_checkpoints(*losers))  # now that the choice is recorded
        return result

    # -- before ------------------------------------------------------------------------------------------------------
    def _check_can_sweep(self, fresh: FreshTrainer) -> None:
        if not self.args.load_best_model_at_end or self.eval_dataset is None:
            raise ValueError(
                "`sweep_kl` chooses by validation score: set `load_best_model_at_end=True` and an `eval_strategy`, "
                "and pass an `eval_dataset`."
            )
        if is_sharded(self):
            raise ValueError(
                "`sweep_kl` cannot start a sharded model (DeepSpeed, FSDP) afresh: make a new trainer with its own "
                "`output_dir` for each `kl_coef` and compare their validation scores."
            )
        if fresh.brings_optimizer:
            raise ValueError(
                "`sweep_kl` needs a new optimizer for every run: pass `optimizer_cls_and_kwargs` or options of the "
                "configuration instead of `optimizers`."
            )

    def _settings_of_sweep(self, start: dict[str, Tensor]) -> dict[str, Any]:
        """What has to agree for results to be comparable, as plain JSON."""
        sketches = [getattr(layer, "svf_sketch", None) for layer in getattr(self, "_adapter_layers", [])]
        weights = [[f"{number:.6g}" for number in sketch] for sketch in sketches if sketch]
        starts = [start[name].contiguous().view(torch.uint8).numpy().tobytes() for name in sorted(start)]
        sets = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        settings = {
            "model": self.model.config._name_or_path,
            "base_weights": hashlib.sha256(json.dumps(weights).encode()).hexdigest(),
            "start": hashlib.sha256(b"".join(starts)).hexdigest(),
            "reward_functions": self.reward_func_names,
            "reward_weights": self.reward_weights.tolist(),
            "train_prompts": _length(self.train_dataset),
            "eval_prompts": {name: _length(dataset) for name, dataset in sets.items()},
            **{name: getattr(self.args, name, None) for name in SETTINGS_OF_A_RUN},
        }
        return dict(json.loads(json.dumps(settings, default=str)))

    def _open_sweep(self, folder: Path, settings: dict[str, Any], resume: bool) -> dict[float, KLRun]:
        """Finished runs recorded in `folder`; raises if they were made with other settings."""
        path = folder / SWEEP_NAME
        text = self._from_main(lambda: path.read_text(encoding="utf-8") if path.exists() else None)
        if text is not None and not resume:
            self._on_main(lambda: _forget(folder))
            text = None
        if text is None:
            strangers = self._from_main(lambda: [run.name for run in folder.glob("kl-*") if files.checkpoints(run)])
            if strangers:
                raise ValueError(
                    f"{folder} has checkpoints in {', '.join(sorted(strangers))} but no {SWEEP_NAME} that says how "
                    "they were made: delete these folders or choose another `output_dir`."
                )
            self._on_main(lambda: write_sweep(path, settings, {}))
            return {}
        runs, recorded = read_sweep(text, path)
        for name, value in settings.items():
            if recorded.get(name) != value:
                raise ValueError(
                    f"{path} was made with `{name}` = {recorded.get(name)!r}, now it is {value!r}: choose another "
                    "`output_dir`, or pass `resume=False` to delete those runs and start over."
                )
        return runs

    # -- one run -----------------------------------------------------------------------------------------------------
    @contextmanager
    def _arguments_of_runs(self) -> Iterator[None]:
        """Let runs change the arguments that belong to one run; checkpoints of a sweep are not pushed."""
        saved = {name: getattr(self.args, name) for name in ("kl_coef", "output_dir", "push_to_hub")}
        try:
            self.args.push_to_hub = False
            yield
        finally:
            for name, value in saved.items():
                setattr(self.args, name, value)

    def _run_of_sweep(self, fresh: FreshTrainer, kl_coef: float, folder: Path) -> KLRun:
        last = self._from_main(lambda: files.newest_usable(folder)[0])
        if last is None:
            self._on_main(lambda: _delete_checkpoints(folder))  # what is there is of no use to continue from
        fresh.restore(self)
        self.args.kl_coef, self.args.output_dir = kl_coef, str(folder)
        output = self.train(resume_from_checkpoint=None if last is None else str(last))
        self._on_main(
            lambda: replace_file(folder / TRAINER_STATE_NAME, lambda path: self.state.save_to_json(str(path)))
        )
        scores = self._eval_history()
        if 0 not in scores or max(scores) == 0:
            raise ValueError(
                f"The run with kl_coef={kl_coef:g} was not evaluated before and after its first step: lower "
                "`eval_steps` and `eval_delay`."
            )
        step = 0 if self.best_is_base else int(self.state.best_global_step or 0)
        (entry,) = [e for e in self.state.log_history if e["step"] == step and self._best_metric_name in e][-1:]
        stem = self._best_metric_name
        low, high = entry.get(f"{stem}_low"), entry.get(f"{stem}_high")
        return KLRun(kl_coef, scores[step], low, high, scores[0], step, output.metrics["train_runtime"])

    # -- after -------------------------------------------------------------------------------------------------------
    def _keep_winner(self, folder: Path, result: KLSweepResult, winner: KLRun | None) -> None:
        """Leave the trainer with the winner, saved, or where it started."""
        run_folder = folder / _run_name((winner or result.runs[-1]).kl_coef)
        state = run_folder / TRAINER_STATE_NAME
        best = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{winner.best_step if winner else 0}"
        if not self._from_main(lambda: state.is_file() and (winner is None or best.is_dir())):
            raise ValueError(
                f"{best if winner else state} of the sweep does not exist anymore: pass `resume=False` to train "
                "again, or choose another `output_dir`."
            )
        self.state = TrainerState.load_from_json(str(state))
        self.state.is_local_process_zero = self.is_local_process_zero()
        self.state.is_world_process_zero = self.is_world_process_zero()
        self._best_is_base = winner is None
        if winner is not None:
            self.args.kl_coef = winner.kl_coef
            self.state.best_model_checkpoint = str(best)
            self._load_best_model()
            kept = ValidationRewards.load(run_folder / VALIDATION_REWARDS_NAME)
            if 0 in kept and winner.best_step in kept:
                self.gain_over_base = PairedGain.of(kept[0], kept[winner.best_step])
            self.save_model(self.args.output_dir, _internal_call=True)  # not pushed
            if self.is_world_process_zero():
                logger.info(f"Best by `{result.metric}`, {self.gain_over_base}:\n{result}")
        elif self.is_world_process_zero():
            logger.warning(
                f"No kl_coef gave an expert that is better than the base by `{result.metric}`; nothing is saved. Try "
                f"a lower `learning_rate`, a larger batch or another `baseline`.\n{result}"
            )

    # -- several processes -------------------------------------------------------------------------------------------
    def _from_main(self, function: Callable[[], Any]) -> Any:
        """What `function` returns on the main process, on every process."""
        value = [function() if self.is_world_process_zero() else None]
        broadcast_object_list(value)
        return value[0]

    def _on_main(self, function: Callable[[], Any]) -> None:
        """Call `function` on the main process while the others wait."""
        if self.is_world_process_zero():
            function()
        self.accelerator.wait_for_everyone()


def _checked_coefficients(coefficients: Sequence[float]) -> list[float]:
    values = [float(value) for value in coefficients]
    if not values:
        raise ValueError("`coefficients` is empty: pass values of `kl_coef` such as `(0.0, 0.1, 0.2, 0.3)`.")
    for value in values:
        if not (math.isfinite(value) and value >= 0.0):
            raise ValueError(f"`kl_coef` is a penalty, finite and not negative: remove {value} from `coefficients`.")
    names = [_run_name(value) for value in values]
    if len(set(names)) < len(names):
        raise ValueError(f"`coefficients` has duplicates: {', '.join(f'{value:g}' for value in values)}.")
    return values


def _run_name(kl_coef: float) -> str:
    return f"kl-{kl_coef:g}"


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def _delete_checkpoints(*folders: Path) -> None:
    for folder in folders:
        for checkpoint in files.checkpoints(folder):
            files.delete(checkpoint)
        files.clean(folder)


def _forget(folder: Path) -> None:
    """Delete the record first: checkpoints without one are refused, never continued by mistake."""
    (folder / SWEEP_NAME).unlink()
    _delete_checkpoints(*folder.glob("kl-*"))
