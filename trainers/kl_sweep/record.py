"""What a sweep over `kl_coef` found: results of the runs, the choice between them, and their file `kl_sweep.json`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft_svf.experts.files import replace_file


SWEEP_NAME = "kl_sweep.json"


@dataclass(frozen=True)
class KLRun:
    """What training with one coefficient gave on validation.

    Args:
        kl_coef (`float`): The coefficient.
        score (`float`): Score of the best checkpoint, or of the start if none is better.
        low (`float`, *optional*): Lower end of the 95 % interval of `score`, where the metric has one.
        high (`float`, *optional*): Upper end.
        base_score (`float`): Score before the first step.
        best_step (`int`): Step of the best checkpoint; 0 if none is better than the start.
        seconds (`float`): Duration of the run, `train_runtime`.
    """

    kl_coef: float
    score: float
    low: float | None
    high: float | None
    base_score: float
    best_step: int
    seconds: float


@dataclass(frozen=True)
class KLSweepResult:
    """Results of [`KLSweep.sweep_kl`]; prints as a table.

    Args:
        metric (`str`): Validation metric that decided, e.g. `eval_reward`.
        runs (`tuple[KLRun, ...]`): One entry a coefficient, in ascending order.
        winner (`float`, *optional*): Coefficient of the expert that was kept; None if none is better than the base.
    """

    metric: str
    runs: tuple[KLRun, ...]
    winner: float | None

    def __str__(self) -> str:
        base = self.runs[0].base_score
        lines = [f"{'kl_coef':>9}  {self.metric:>14}  {'95 % interval':>18}  {'best step':>9}  {'seconds':>7}"]
        lines.append(f"{'base':>9}  {base:>14.4f}  {'':>18}  {'':>9}  {'':>7}" + " *" * (self.winner is None))
        for run in self.runs:
            interval = "" if run.low is None or run.high is None else f"[{run.low:.4f}, {run.high:.4f}]"
            line = f"{run.kl_coef:>9g}  {run.score:>14.4f}  {interval:>18}  {run.best_step:>9}  {run.seconds:>7.0f}"
            lines.append(line + " *" * (run.kl_coef == self.winner))
        return "\n".join(lines)


def choose(runs: Sequence[KLRun], greater_is_better: bool) -> KLRun | None:
    """The run with the best score, of equals the one with the larger coefficient; None if the base is as good."""
    better = [run for run in runs if run.best_step > 0]
    sign = 1.0 if greater_is_better else -1.0
    return max(better, key=lambda run: (sign * run.score, run.kl_coef), default=None)


def read_sweep(text: str, path: Path) -> tuple[dict[float, KLRun], dict[str, Any]]:
    """Finished runs by coefficient, and the settings they were made with, from the content of `path`."""
    try:
        content = json.loads(text)
        return {run["kl_coef"]: KLRun(**run) for run in content["runs"]}, content["settings"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a record of a KL sweep ({error}): delete it to start over.") from error


def write_sweep(
    path: Path, settings: dict[str, Any], runs: dict[float, KLRun], chosen: bool = False, winner: float | None = None
) -> None:
    """Replace `path` as a whole. `winner` counts once `chosen` is true; it is None where the base model won."""
    content = {
        "settings": settings,
        "runs": [asdict(runs[value]) for value in sorted(runs)],
        "chosen": chosen,
        "winner": winner,
    }
    text = json.dumps(content, indent=2) + "\n"
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))
