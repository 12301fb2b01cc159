"""The cards of a bank of playground experts that was just trained: the demo's, and the embedded one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from peft_svf.cli.playground_experts import VALIDATION_PROMPTS, training_config
from peft_svf.cli.results import environment
from peft_svf.experts.expert import write_facts
from peft_svf.hub_cards import ExpertCardData, ExpertResult, write_bank_card
from peft_svf.trainers.checkpoints.expert_cards import METHOD
from peft_svf.trainers.statistics import paired_difference_interval, wilson_interval
from peft_svf.trainers.tasks.playground import PLAYGROUND_TASKS


if TYPE_CHECKING:
    from peft_svf.cli.demo import FamilyResult


def write_cards(output: Path, results: Mapping[str, FamilyResult], steps: int, seed: int, license: str = "") -> None:
    """
    Write the cards of a bank and of its experts, with what was measured.

    Args:
        output (`Path`): Where the bank was saved.
        results (`Mapping[str, FamilyResult]`): By name of the expert, which is that of its family.
        steps (`int`), seed (`int`): Of the training.
        license (`str`, *optional*): The Hub's identifier; not recorded without.
    """
    for family, result in results.items():
        write_facts(output / family, expert_facts(family, result, steps, seed, license).to_metadata())
    write_bank_card(output, {"name": "Playground bank", **({"license": license} if license else {})})


def expert_facts(family: str, result: FamilyResult, steps: int, seed: int, license: str = "") -> ExpertCardData:
    """What is known of one expert; its adapter says the rest."""
    task, training, found = PLAYGROUND_TASKS[family], result.training, environment()
    config = training_config("unused", task, steps, seed)
    return ExpertCardData(
        name=f"Playground expert: {family}",
        label=task.label,
        task=task.name,
        description=task.description or None,
        method=METHOD,
        reward="+1 for a right answer, −1 for any other",
        baseline=config.baseline,
        kl_coefficient=config.kl_coef,
        seeds=(seed,),
        steps=steps,
        learning_rate=config.learning_rate,
        batch_size=config.per_device_train_batch_size * config.gradient_accumulation_steps,
        validation={
            "metric": "validation reward",
            "start": training.base_validation_reward,
            "best": training.validation_reward,
            "prompts": VALIDATION_PROMPTS,
        },
        hardware=f"{found['hardware']}, {torch.get_num_threads()} threads",
        training_seconds=training.seconds,
        versions=found["versions"],
        results=(measured(f"{task.name}, held-out prompts", result),),
        language=("en",),
        license=license or None,
    )


def measured(name: str, result: FamilyResult) -> ExpertResult:
    """Greedy success of base model and expert on the same prompts, which training never saw."""
    n, (gain, low, high) = len(result.base), paired_difference_interval(result.base, result.expert)
    return ExpertResult(
        task=name,
        n=n,
        base=sum(result.base) / n,
        base_interval=wilson_interval(sum(result.base), n),
        expert=sum(result.expert) / n,
        expert_interval=wilson_interval(sum(result.expert), n),
        gain=gain,
        gain_interval=(low, high),
        notes="greedy answers",
    )
