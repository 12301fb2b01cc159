"""Results of an expert beside its base model: checked, in words and tables, and as entries that the Hub reads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry

from peft_svf.hub_cards.text import NOT_RECORDED, inline


Interval = tuple[float, float]

# Benchmarks whose data set on the Hub keeps a leaderboard, by data set: the id of the task there. No others are known
# to: a wrong id is an error on the Hub, or a score on a strange board.
LEADERBOARDS = {"openai/gsm8k": "gsm8k"}


@dataclass(frozen=True)
class Benchmark:
    """
    The rows on the Hub that a result was measured on.

    Args:
        dataset (`str`): Id of the data set, e.g. `"openai/gsm8k"`.
        split (`str`): The official split.
        config (`str`, *optional*), revision (`str`, *optional*): Configuration and commit.
        complete (`bool`, *optional*, defaults to `False`): Whether all rows of the split were answered.
    """

    dataset: str
    split: str
    config: str | None = None
    revision: str | None = None
    complete: bool = False


@dataclass(frozen=True)
class ExpertResult:
    """
    Success of the base model and of the expert on the same prompts, as shares in [0, 1].

    Args:
        task (`str`): What was evaluated, with its split, e.g. `"playground-math, test"`.
        n (`int`): Number of prompts.
        base (`float`, *optional*), expert (`float`): Share of prompts answered right.
        base_interval, expert_interval (`tuple[float, float]`, *optional*): Their 95 % intervals.
        gain (`float`, *optional*), gain_interval (`tuple[float, float]`, *optional*):
            Mean difference, prompt by prompt, and its 95 % interval.
        chosen_on (`bool`, *optional*, defaults to `False`): Whether the expert was chosen by these very prompts.
        benchmark ([`Benchmark`], *optional*): The rows on the Hub, if they are a benchmark's own test rows.
        notes (`str`, *optional*): How it was measured, e.g. `"greedy answers"`.
    """

    task: str
    n: int
    base: float | None
    base_interval: Interval | None
    expert: float
    expert_interval: Interval | None
    gain: float | None = None
    gain_interval: Interval | None = None
    chosen_on: bool = False
    benchmark: Benchmark | None = None
    notes: str | None = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"result on {self.task!r}: n must be at least 1, got {self.n}")
        for name, share, interval, least in (
            ("base", self.base, self.base_interval, 0.0),
            ("expert", self.expert, self.expert_interval, 0.0),
            ("gain", self.gain, self.gain_interval, -1.0),
        ):
            if share is None:
                continue
            low, high = interval or (share, share)
            if not (least <= share <= 1 and low <= share <= high):
                raise ValueError(
                    f"result on {self.task!r}: {name} must be a share in [{least:g}, 1] within its interval, "
                    f"got {share} in ({low}, {high})"
                )

    @property
    def unproven(self) -> bool:
        """Whether the interval of the gain includes 0."""
        return self.gain_interval is not None and self.gain_interval[0] <= 0 <= self.gain_interval[1]

    @property
    def worse(self) -> bool:
        """Whether the whole interval of the gain lies below 0."""
        return self.gain_interval is not None and self.gain_interval[1] < 0


def result_from_json(entry: Any) -> ExpertResult:
    """A result as `expert.json` holds it; a `ValueError` says what is wrong with it."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("task"), str):
        raise ValueError(f"a result is an object with a task, n, base and expert, not {entry!r:.80}")
    task = entry["task"]
    if not isinstance(entry.get("n"), int) or isinstance(entry.get("n"), bool):
        raise ValueError(f"result on {task!r:.80}: n must be a whole number, not {entry.get('n')!r:.80}")
    expert = _number(entry, "expert")
    if expert is None:
        raise ValueError(f"result on {task!r:.80}: the success of the expert is missing")
    return ExpertResult(
        task=task,
        n=entry["n"],
        base=_number(entry, "base"),
        base_interval=_interval(entry, "base_interval"),
        expert=expert,
        expert_interval=_interval(entry, "expert_interval"),
        gain=_number(entry, "gain"),
        gain_interval=_interval(entry, "gain_interval"),
        chosen_on=entry.get("chosen_on") is True,
        benchmark=_benchmark(entry.get("benchmark"), task),
        notes=entry["notes"] if isinstance(entry.get("notes"), str) else None,
    )


def _number(entry: Mapping[str, Any], name: str) -> float | None:
    value = entry.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"result on {entry['task']!r:.80}: {name} must be a number, not {value!r:.80}")
    return float(value)


def _interval(entry: Mapping[str, Any], name: str) -> Interval | None:
    value = entry.get(name)
    if value is None:
        return None
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ValueError(f"result on {entry['task']!r:.80}: {name} must be two numbers, not {value!r:.80}")
    ends = {"task": entry["task"], "low": value[0], "high": value[1]}
    low, high = _number(ends, "low"), _number(ends, "high")
    return None if low is None or high is None else (low, high)


def _benchmark(value: Any, task: str) -> Benchmark | None:
    if value is None:
        return None
    texts = {} if not isinstance(value, Mapping) else {k: v for k, v in value.items() if isinstance(v, str)}
    if not {"dataset", "split"} <= set(texts):
        raise ValueError(f"result on {task!r:.80}: benchmark must have a dataset and a split, not {value!r:.80}")
    return Benchmark(
        texts["dataset"], texts["split"], texts.get("config"), texts.get("revision"), value.get("complete") is True
    )


# -- for people ------------------------------------------------------------------------------------------------------
def result_cells(result: ExpertResult) -> dict[str, str]:
    """The cells of a result's row in a table."""
    return {
        "task": inline(result.task),
        "n": str(result.n),
        "base": percent(result.base, result.base_interval),
        "expert": percent(result.expert, result.expert_interval),
        "gain": _points(result),
        "notes": inline(result.notes) if result.notes else "",
    }


def percent(share: float | None, interval: Interval | None) -> str:
    """`"50.1 % (47.4 to 52.8)"`."""
    if share is None:
        return NOT_RECORDED
    between = NOT_RECORDED if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
    return f"{100 * share:.1f} % ({between})"


def _points(result: ExpertResult) -> str:
    gain = result.gain
    if gain is None and result.base is not None:
        gain = result.expert - result.base
    if gain is None:
        return NOT_RECORDED
    low_high = result.gain_interval
    between = NOT_RECORDED if low_high is None else f"{100 * low_high[0]:+.1f} to {100 * low_high[1]:+.1f}"
    return f"{100 * gain:+.1f} ({between})"


def cautions(results: Sequence[ExpertResult]) -> list[str]:
    """What the numbers do not prove, in sentences."""
    found = []
    for result in results:
        where = f"On {inline(result.task)}"
        if result.chosen_on:
            found.append(
                f"{where}, the expert was chosen by the very prompts that it is measured on: the number is too good "
                "as an estimate for other prompts."
            )
        elif result.unproven:
            found.append(
                f"{where}, the interval of the gain includes 0: these prompts do not show that the expert is better "
                "than the base model."
            )
        elif result.worse:
            found.append(f"{where}, the expert is worse than the base model.")
    return found


# -- for the Hub -----------------------------------------------------------------------------------------------------
def leaderboard_entries(results: Sequence[ExpertResult]) -> dict[str, list[EvalResultEntry]]:
    """
    Entries for `.eval_results/<task>.yaml`, by task: of benchmarks whose data set keeps a leaderboard.

    The value is in percent. n, interval and whose reward has judged are in the notes.
    """
    entries: dict[str, list[EvalResultEntry]] = {}
    for result in results:
        benchmark = result.benchmark
        if benchmark is None or result.chosen_on or benchmark.dataset not in LEADERBOARDS:
            continue
        task = LEADERBOARDS[benchmark.dataset]
        entry = EvalResultEntry(
            benchmark.dataset,
            task,
            round(100 * result.expert, 2),
            dataset_revision=benchmark.revision,
            notes="; ".join(_notes(result, benchmark)),
        )
        entries.setdefault(task, []).append(entry)
    return entries


def index_entries(results: Sequence[ExpertResult]) -> list[EvalResult]:
    """
    Entries for `model-index` in the card's metadata: of benchmarks on the Hub without a leaderboard.

    Results on prompts that are on no Hub (the playground, files of one's own) have none: an entry names a data set.
    """
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=result.benchmark.dataset,
            dataset_name=result.benchmark.dataset,
            dataset_config=result.benchmark.config,
            dataset_split=result.benchmark.split,
            dataset_revision=result.benchmark.revision,
            metric_type="accuracy",
            metric_name="; ".join(["success", *_notes(result, result.benchmark)]),
            metric_value=round(100 * result.expert, 2),
        )
        for result in results
        if result.benchmark and not result.chosen_on and result.benchmark.dataset not in LEADERBOARDS
    ]


def _notes(result: ExpertResult, benchmark: Benchmark) -> list[str]:
    rows = "all" if benchmark.complete else "not all"
    notes = [f"n = {result.n}, {rows} rows of the split {benchmark.split}"]
    if result.expert_interval is not None:
        notes.append("95 % interval {:.1f} to {:.1f}".format(*(100 * end for end in result.expert_interval)))
    if result.base is not None:
        notes.append(f"base model {100 * result.base:.1f}")
    return [*notes, *([result.notes] if result.notes else []), "prompt and reward of peft-svf"]
