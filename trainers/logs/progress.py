"""A progress bar for one training run that shows what matters: the reward of the rollouts and of the validation."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments


class RewardProgressCallback(TrainerCallback):
    """One bar in place of transformers' bar and its printed log lines.

    Args:
        description (`str`): Text before the bar, e.g. the name of the expert.
    """

    def __init__(self, description: str) -> None:
        self.description = description
        self.rewards: dict[str, str] = {}
        self.bar: tqdm | None = None

    @classmethod
    def attach(cls, trainer: Trainer, description: str) -> None:
        """Give `trainer` this bar and take away transformers' bar and printer."""
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(cls(description))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            kl_coef = getattr(args, "kl_coef", 0.0)  # which tells the runs of a sweep apart
            description = f"{self.description}, kl_coef {kl_coef:g}" if kl_coef else self.description
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=description, leave=False)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        shown = {"reward": "reward", "eval_reward": "validation"}
        self.rewards |= {shown[name]: f"{value:+.2f}" for name, value in (logs or {}).items() if name in shown}
        if self.bar is not None:
            self.bar.set_postfix(self.rewards, refresh=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
