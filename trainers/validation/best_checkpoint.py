"""The starting point as a candidate for the best checkpoint, which transformers' `Trainer` never considers."""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput
from trl import GRPOTrainer

from peft_svf.experts.files import replace_file
from peft_svf.trainers import checks
from peft_svf.trainers.checkpoints import checkpoint_files as files
from peft_svf.trainers.distributed import write_parameters
from peft_svf.trainers.statistics import paired_difference_interval
from peft_svf.trainers.validation.reward_metrics import prompt_means


logger = logging.getLogger(__name__)

VALIDATION_REWARDS_NAME = "validation_rewards.safetensors"


@dataclass(frozen=True)
class PairedGain:
    """What training gained on the validation prompts, best checkpoint against start, prompt by prompt.

    The best of several checkpoints is a little better on the prompts that it was chosen by than on others: report an
    expert's success on prompts that training never saw.

    Args:
        start (`float`): Mean at the start: a success rate if all rewards are −1 or +1, else the mean reward.
        best (`float`): The same at the best checkpoint.
        gain (`float`): `best − start`.
        low (`float`): Lower end of the paired 95 % interval of the gain.
        high (`float`): Upper end.
        prompts (`int`): Prompts judged both times.
        is_success (`bool`): Whether the numbers are success rates.
    """

    start: float
    best: float
    gain: float
    low: float
    high: float
    prompts: int
    is_success: bool

    @classmethod
    def of(cls, start: Tensor, best: Tensor) -> PairedGain | None:
        """From mean rewards per prompt, in the same order; None with fewer than two prompts judged both times."""
        judged = ~(start.isnan() | best.isnan())
        if len(start) != len(best) or int(judged.sum()) < 2:
            return None
        before, after = start[judged], best[judged]
        both = torch.cat([before, after])
        is_success = bool(((both.abs() - 1.0).abs() < 1e-6).all())
        if is_success:
            before, after = (before + 1.0) / 2.0, (after + 1.0) / 2.0
        gain, low, high = paired_difference_interval(before.tolist(), after.tolist())
        return cls(before.mean().item(), after.mean().item(), gain, low, high, len(before), is_success)

    def __str__(self) -> str:
        """`"62.0 % vs 50.0 % at the start: +12.0 points [+4.1, +19.9], paired over 250 prompts"`."""
        if not self.is_success:
            return (
                f"mean reward {self.best:.4g} vs {self.start:.4g} at the start: {self.gain:+.4g} "
                f"[{self.low:+.4g}, {self.high:+.4g}], paired over {self.prompts} prompts"
            )
        return (
            f"{100 * self.best:.1f} % vs {100 * self.start:.1f} % at the start: {100 * self.gain:+.1f} points "
            f"[{100 * self.low:+.1f}, {100 * self.high:+.1f}], paired over {self.prompts} prompts"
        )


class ValidationRewards:
    """Mean reward of every validation prompt at every evaluation of a run, kept in a file so that it can be resumed.

    Args:
        folder (`str`): Where the file `validation_rewards.safetensors` is: one tensor for each step.
        resumes (`bool`): Whether the run continues an earlier one, whose file is then read.
    """

    def __init__(self, folder: str, resumes: bool) -> None:
        self.path = Path(folder) / VALIDATION_REWARDS_NAME
        self.by_step = self.load(self.path) if resumes else {}

    def record(self, step: int, rewards: Tensor, write: bool) -> None:
        """Keep `rewards`, `(prompts,)`, of the evaluation at `step`; `write` is true on the main process only."""
        earlier = {at: kept for at, kept in self.by_step.items() if at < step}  # a resumed run repeats later ones
        self.by_step = {**earlier, step: rewards}
        if write:
            content = save({str(at): kept.contiguous() for at, kept in self.by_step.items()})
            replace_file(self.path, lambda partial: partial.write_bytes(content))

    @staticmethod
    def load(path: Path) -> dict[int, Tensor]:
        """Mean rewards of the prompts by step; empty if there is no readable file."""
        try:
            return {int(step): rewards for step, rewards in load_file(path).items()}
        except (FileNotFoundError, SafetensorError):
            return {}


class StartIsACandidate(GRPOTrainer):
    """Mixin: with `load_best_model_at_end=True` a checkpoint has to beat the evaluation at step 0.

    If none does, training ends where it started and says so. `_start` has copies of what is trainable, by name: the
    class that uses it sets them when it is made, every new run sets its own. That class also calls
    `_keep_validation_rewards` after every evaluation of a dataset.
    """

    _start: dict[str, Tensor]
    _validation_rewards: ValidationRewards | None = None
    _best_is_base = False

    gain_over_base: PairedGain | None = None
    """Best checkpoint against start on the validation prompts, after `train`; None where they cannot be compared."""

    @property
    def best_is_base(self) -> bool:
        """Whether the last training that chose a best checkpoint found none better than its start.

        True means that there is nothing worth saving: with `load_best_model_at_end=True` the model is what it was
        before training, and `save_model` would save the offsets it started from. False as long as `train` has not
        ended, without an evaluation before the first step, and where no best checkpoint is asked for.
        """
        return self._best_is_base

    @property
    def base_eval_reward(self) -> float | None:
        """Validation score before the first step, of the base model unless training started from an expert.

        `eval_reward`, or `metric_for_best_model` where it is set; None without an evaluation at step 0.
        """
        return self._eval_history().get(0)

    @property
    def _best_metric_name(self) -> str:
        return f"eval_{(self.args.metric_for_best_model or 'eval_reward').removeprefix('eval_')}"

    def _eval_history(self) -> dict[int, float]:
        name = self._best_metric_name
        scores = {entry["step"]: entry[name] for entry in self.state.log_history if entry.get(name) is not None}
        return {step: score for step, score in scores.items() if score == score}  # NaN: nothing could be judged

    # -- during training ---------------------------------------------------------------------------------------------
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if self.is_in_train and self.state.global_step == 0 and self._best_metric_name in metrics:
            score = metrics[self._best_metric_name]
            if score == score:  # nothing is greater than NaN: no checkpoint could win
                self.state.best_metric = score  # what a checkpoint has to beat
        return metrics

    def _evaluate(self, *args: Any, skip_scheduler: bool = False, **kwargs: Any) -> dict[str, float]:
        """Skip the evaluation "on start" of a resumed run: it is not the start, and early stopping would count it."""
        if skip_scheduler and self.state.global_step > 0:
            return {}
        metrics: dict[str, float] = super()._evaluate(*args, skip_scheduler=skip_scheduler, **kwargs)
        return metrics

    def _keep_validation_rewards(self, prefix: str, totals: Tensor) -> None:
        """Remember the rewards of one evaluation if the best checkpoint is chosen by them."""
        chosen_by_reward = self._best_metric_name in (f"{prefix}_reward", f"{prefix}_success")
        if self._validation_rewards is not None and self.is_in_train and chosen_by_reward:
            means = prompt_means(totals.cpu(), self.num_generations_eval)
            self._validation_rewards.record(self.state.global_step, means, self.is_world_process_zero())

    # -- the verdict -------------------------------------------------------------------------------------------------
    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As [`~transformers.Trainer.train`]; ends at the start if no checkpoint of the run is better."""
        checks.check_trainable(self.model)
        self._best_is_base, self.gain_over_base = False, None
        if not resume_from_checkpoint:  # a second `train` goes on from what the first one left
            self._start = checks.trainable_snapshot(self.model)
        self._validation_rewards = ValidationRewards(self.args.output_dir, bool(resume_from_checkpoint))
        output: TrainOutput = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.args.load_best_model_at_end or self.args.save_strategy == SaveStrategy.BEST:
            self._judge(output)
        return output

    def _judge(self, output: TrainOutput) -> None:
        """Compare the best checkpoint with the start, tell the user, and return to the start if that is better."""
        scores = self._eval_history()
        trained = {step: score for step, score in scores.items() if step > 0}
        if not trained:
            logger.warning("No evaluation took place after the first step: the offsets of the last step are kept.")
            return
        best = (max if self.args.greater_is_better else min)(trained, key=lambda step: trained[step])
        if 0 in scores:
            is_better = operator.gt if self.args.greater_is_better else operator.lt
            self._best_is_base = not is_better(trained[best], scores[0])
            self._compare_with_start(best, output)
        if self._best_is_base:
            self._report_base(scores[0], trained[best], best)
            if self.args.load_best_model_at_end:
                self._return_to_start()
        elif self.args.load_best_model_at_end and self.state.best_model_checkpoint is None:
            self._find_best_checkpoint(best)

    def _compare_with_start(self, best: int, output: TrainOutput) -> None:
        kept = self._validation_rewards.by_step if self._validation_rewards is not None else {}
        if 0 in kept and best in kept:
            self.gain_over_base = PairedGain.of(kept[0], kept[best])
        if (gain := self.gain_over_base) is not None:
            output.metrics.update(best_gain=gain.gain, best_gain_low=gain.low, best_gain_high=gain.high)
            if self.is_world_process_zero():
                logger.info(f"Best checkpoint (step {best}) on the validation prompts: {gain}.")

    def _report_base(self, start: float, score: float, step: int) -> None:
        if self.is_world_process_zero():
            restored = "The starting offsets are restored. " if self.args.load_best_model_at_end else ""
            gain = "" if self.gain_over_base is None else f" ({self.gain_over_base})"
            rate = "higher" if score == start else "lower"
            logger.warning(
                f"No checkpoint is better than the start by `{self._best_metric_name}`: {start:.4g} at step 0, at "
                f"best {score:.4g} at step {step}{gain}. {restored}Try a {rate} `learning_rate`, a larger batch or "
                "another `baseline`."
            )

    def _return_to_start(self) -> None:
        write_parameters(self.model, self._start)

    def _find_best_checkpoint(self, step: int) -> None:
        """Load the best checkpoint of a resumed run that began without `load_best_model_at_end`, or was moved."""
        path = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if files.why_unusable(path, with_optimizer=False) is None:
            self.state.best_model_checkpoint = str(path)
            self._load_best_model()
        else:
            logger.warning(
                f"The best checkpoint ({path}) does not exist any more, or is not whole: the offsets of the last step "
                "are kept. Resume from an earlier checkpoint to get it back."
            )
