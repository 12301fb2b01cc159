"""TRL's tables of completions (`log_completions=True`): complete, and training and evaluation apart."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput
from trl import GRPOTrainer


class CompletionTables(GRPOTrainer):
    """
    Mixin for what `GRPOTrainer` (1.16) does with `log_completions=True`: print a table of prompts, completions,
    rewards and advantages, and write it to `output_dir/completions/completions_<step>.parquet`.

    There, an evaluation overwrites the table of the training step, shows at most as many rows as a training batch has,
    and fills up with rows of that batch. Here:

    - an evaluation has a file of its own, `completions_<step>_eval.parquet`, or `_eval_<name>` with several eval
      datasets, with one row for each answer; at most as many as a training batch has are printed;
    - the summary at the end of the run does not print and write the table of the last step again;
    - a column of `log_extra` may come from several reward functions (`reward_reason`, `reward_reason_2`), and may be
      missing in some batches.
    """

    _logs: Any  # of GRPO, like the two below
    log_completions: bool
    num_completions_to_print: int | None
    _evaluation: str | None = None  # metric prefix of the running evaluation
    _step_of_table: int | None = None
    _completions_in_batch = 0

    # -- columns -----------------------------------------------------------------------------------------------------
    def _calculate_rewards(self, inputs: Any, prompts: list[Any], *args: Any, **kwargs: Any) -> Tensor:
        self._completions_in_batch = n = len(prompts)
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, *args, **kwargs)
        for column, values in self._pending_extra_logs.items():
            if len(values) != n:
                raise ValueError(
                    f"A reward function gave `log_extra` {len(values)} values for the column {column!r} and {n} "
                    "completions: pass one value for each."
                )
        for column in self._logs["extra"]:  # as TRL does for processes that did not log it
            if column not in self._pending_extra_logs:
                self._pending_extra_logs[column] = [None] * n
        return rewards

    def _log_completion_extra(self, column: str, values: list[Any]) -> None:
        name, number = column, 1
        while len(self._pending_extra_logs.get(name, ())) >= self._completions_in_batch > 0:
            number += 1
            name = f"{column}_{number}"
        super()._log_completion_extra(name, values)

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(*args, **kwargs)
        for values in self._logs["extra"].values():  # a column that is new in this batch
            values.extendleft([None] * (len(self._logs["prompt"]) - len(values)))
        return output

    # -- tables ------------------------------------------------------------------------------------------------------
    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._evaluation is None:
            return output
        self._evaluation = metric_key_prefix
        if hasattr(dataloader.dataset, "__len__"):
            for values in _columns(self._logs):  # the last distributed batch is filled up with scored samples
                while len(values) > len(dataloader.dataset) * self.num_generations_eval:
                    values.pop()
        return output

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As [`~transformers.Trainer.evaluate`]."""
        metrics: dict[str, float]
        if not self.log_completions:  # the bound of GRPO then keeps a large evaluation out of memory
            metrics = super().evaluate(*args, **kwargs)
            return metrics
        of_training = self._logs
        self._logs, self._evaluation = _unbounded(of_training), "eval"
        try:
            metrics = super().evaluate(*args, **kwargs)
            return metrics
        finally:
            self._logs, self._evaluation = of_training, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As [`~trl.GRPOTrainer.log`]."""
        step, known = self.state.global_step, bool(self._logs["prompt"])
        again = "train_runtime" in logs and step == self._step_of_table
        with contextlib.ExitStack() as stack:
            if self._evaluation:
                stack.enter_context(self._table_of_evaluation())
            if again or not known:
                stack.enter_context(self._without_tables())
            super().log(logs, start_time)
        if known and not self._evaluation:
            self._step_of_table = step

    @contextlib.contextmanager
    def _without_tables(self) -> Iterator[None]:
        wanted, self.log_completions = self.log_completions, False
        try:
            yield
        finally:
            self.log_completions = wanted

    @contextlib.contextmanager
    def _table_of_evaluation(self) -> Iterator[None]:
        """Give the file that TRL writes the name of the evaluation, and leave that of the training step as it is."""
        rows, folder = self.num_completions_to_print, Path(str(self.args.output_dir), "completions")
        table = folder / f"completions_{self.state.global_step:05d}.parquet"  # TRL's name
        aside = table.with_suffix(".train")
        writes = self.log_completions and self.accelerator.is_main_process
        if writes and table.exists():
            os.replace(table, aside)
        self.num_completions_to_print = self.args.generation_batch_size if rows is None else rows
        try:
            yield
        finally:
            self.num_completions_to_print = rows
            if writes and table.exists():
                os.replace(table, table.with_stem(f"{table.stem}_{self._evaluation}"))
            if writes and aside.exists():
                os.replace(aside, table)


def _columns(logs: dict[str, Any]) -> Iterator[deque[Any]]:
    for value in logs.values():
        yield from value.values() if isinstance(value, dict) else [value]


def _unbounded(logs: dict[str, Any]) -> dict[str, Any]:
    """Empty logs of the same shape without a bound."""
    return {name: defaultdict(deque) if isinstance(value, dict) else deque() for name, value in logs.items()}
