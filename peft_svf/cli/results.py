"""What an evaluation found, as a table for people and as JSON for cards and later comparisons."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from datasets import Dataset

from peft_svf.cli.terminal import table, with_interval
from peft_svf.hub_cards import Benchmark, ExpertResult
from peft_svf.trainers.evaluation import Evaluation


PACKAGES = ("peft-svf", "peft", "transformers", "trl", "accelerate", "torch", "datasets", "bitsandbytes")


def print_results(base: Evaluation, experts: Mapping[str, Evaluation]) -> None:
    """Success of the base model and of each expert, with the paired difference to the base model."""
    rows = [("model", "prompts", "success", "gain in points"), ("base", str(base.prompts), format_success(base), "")]
    for name, expert in experts.items():
        rows.append((name, str(expert.prompts), format_success(expert), format_gain(expert.gain_over(base))))
    print(table(rows))
    unjudged = {name: e.unjudged for name, e in {"base": base, **experts}.items() if e.unjudged}
    if unjudged:
        counts = ", ".join(f"{count} of {name}" for name, count in unjudged.items())
        print(f"  Answers that could not be judged count as failures: {counts}")


def format_success(evaluation: Evaluation) -> str:
    """`"47.3 % [41.7, 53.0]"`."""
    return with_interval(evaluation.success, *evaluation.interval)


def format_gain(gain: tuple[float, float, float]) -> str:
    """`"+12.0 [+4.1, +19.9]"`, in percentage points."""
    mean, low, high = (100 * value for value in gain)
    return f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"


def result_entry(evaluation: Evaluation, base: Evaluation | None = None) -> dict[str, Any]:
    """One model's part of the JSON file; with `base`, the paired difference too."""
    entry: dict[str, Any] = {
        "success": evaluation.success,
        "interval": list(evaluation.interval),
        "unjudged": evaluation.unjudged,
        "success_per_prompt": evaluation.shares(),
    }
    if base is not None:
        mean, low, high = evaluation.gain_over(base)
        entry["gain_over_base"] = {"mean": mean, "interval": [low, high]}
    return entry


def compared(
    task: str, base: Evaluation, expert: Evaluation, notes: str, benchmark: Benchmark | None = None
) -> ExpertResult:
    """Base model and expert on the same prompts, for a card."""
    gain, low, high = expert.gain_over(base)
    return ExpertResult(
        task=task,
        n=base.prompts,
        base=base.success,
        base_interval=base.interval,
        expert=expert.success,
        expert_interval=expert.interval,
        gain=gain,
        gain_interval=(low, high),
        benchmark=benchmark,
        notes=notes,
    )


def evaluated_on(rows: Dataset, split: str, seed: int, max_new_tokens: int) -> dict[str, Any]:
    """The prompts of an evaluation, by their ids, for the JSON file."""
    ids: Sequence[str] = rows["id"] if "id" in rows.column_names else [str(i) for i in range(len(rows))]
    return {"split": split, "prompts": len(rows), "seed": seed, "max_new_tokens": max_new_tokens, "ids": list(ids)}


def environment() -> dict[str, Any]:
    """Versions and hardware, for the JSON file."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"versions": versions, "hardware": accelerator or f"{platform.machine()} processor"}
