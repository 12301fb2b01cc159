"""The card of an expert that `peft-svf train` has trained: what was measured, and its way to the Hub."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_svf.cli import results
from peft_svf.cli.train_arguments import TrainArguments
from peft_svf.experts import Expert
from peft_svf.hub_cards import Benchmark, ExpertResult, write_expert_card
from peft_svf.plots.learning_curve_rows import rows_by_step
from peft_svf.trainers import SVFPolicyGradientTrainer
from peft_svf.trainers.checkpoints.expert_cards import METHOD
from peft_svf.trainers.checkpoints.hub_push import check_base_is_on_hub
from peft_svf.trainers.evaluation import Evaluation
from peft_svf.trainers.tasks import Task
from peft_svf.trainers.tasks.benchmark import BenchmarkLoader


CURVE = ("step", "reward", "eval_reward", "eval_reward_low", "eval_reward_high", "kl_sequence", "kl")


def task_facts(task: Task, arguments: TrainArguments) -> dict[str, Any]:
    """
    What the trainer's cards cannot know: the task, and what the expert goes on from.

    Rows from files at hand may be anything, so that only rows from the Hub name their data set.
    """
    loader = task.load
    hub = [loader.source.path] if arguments.data_files is None and isinstance(loader, BenchmarkLoader) else []
    return {
        "task": task.name,
        "label": task.label,
        "description": task.description or None,
        "datasets": hub,
        "method": METHOD if arguments.adapter is None else f"{METHOD}, going on from another expert",
    }


def write_card(
    trainer: SVFPolicyGradientTrainer,
    task: Task,
    arguments: TrainArguments,
    evaluations: tuple[Evaluation, Evaluation] | None,
) -> None:
    """Write the expert's card with all that is known of it, what was measured included."""
    runtime = [entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry]
    environment = results.environment()
    facts = replace(
        trainer.expert_facts(),
        training_seconds=runtime[-1] if runtime else None,
        hardware=environment["hardware"],
        versions=environment["versions"],
        learning_curve=tuple(curve_rows(trainer)),
        results=() if evaluations is None else (measured(task, arguments, *evaluations),),
    )
    write_expert_card(arguments.output, facts, expert=live_expert(trainer))


def measured(task: Task, arguments: TrainArguments, base: Evaluation, expert: Evaluation) -> ExpertResult:
    """The comparison on the test prompts."""
    unjudged = f", {expert.unjudged} of the expert's could not be judged" if expert.unjudged else ""
    notes = f"greedy answers{unjudged}"
    return results.compared(f"{task.name}, test", base, expert, notes, benchmark(task, arguments))


def benchmark(task: Task, arguments: TrainArguments) -> Benchmark | None:
    """The official test rows on the Hub; `None` for rows from files at hand and for tasks without a data set there."""
    loader = task.load
    if arguments.data_files is not None or not isinstance(loader, BenchmarkLoader):
        return None
    source = loader.source
    return Benchmark(source.path, loader.test, source.config, source.revision, arguments.test_prompts is None)


def curve_rows(trainer: SVFPolicyGradientTrainer) -> list[dict[str, float]]:
    """What the picture of the learning curve is drawn from."""
    rows = [{name: row[name] for name in CURVE if name in row} for row in rows_by_step(trainer.state.log_history)]
    return [row for row in rows if len(row) > 1 and all(map(math.isfinite, row.values()))]


def live_expert(trainer: SVFPolicyGradientTrainer) -> Expert | None:
    """The trained expert as z − 1, which its file does not hold if it was trained in the parametrization "sigmoid"."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    is_sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if is_sharded or model.peft_config[model.active_adapter].parametrization == "offset":
        return None
    return Expert.from_model(model, model.active_adapter)


# -- publishing ------------------------------------------------------------------------------------------------------
def check_can_publish(model: str, given: Mapping[str, Any]) -> None:
    """Raise a `ValueError` before anything is trained if `--push_to_hub` cannot work."""
    check_base_is_on_hub(
        model,
        "--push_to_hub",
        "train without it, push the base model, then `peft-svf push` the expert with --base-model",
    )
    if given.get("hub_strategy", "end") != "end":
        raise ValueError("--hub_strategy: `peft-svf train` uploads the expert once, in the end, with its results")


def publish(trainer: SVFPolicyGradientTrainer, output: Path, improved: bool) -> None:
    """
    Put the expert on the Hub, with its results on the card, and say where.

    Raises:
        HubError: The Hub refused, or cannot be reached; the expert is in `output`, and `peft-svf push` tries again.
    """
    repo_id = str(trainer.hub_model_id)
    if not improved:
        print(f"Nothing was uploaded: {repo_id} is as it was")
        return
    message = f"Expert of {trainer.card_facts['task']}, {trainer.state.global_step} steps"
    pushed = trainer.push_saved_expert(output, commit_message=message)
    print(f"The expert is on the Hub: {pushed.url}")
