"""`peft-svf train`: an expert for a task, compared with its base model on held-out prompts."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers.integrations.integration_utils import get_available_reporting_integrations
from trl.import_utils import is_vllm_available

from peft_svf import SVFConfig
from peft_svf.answering import Processor
from peft_svf.cli import results
from peft_svf.cli.data import (
    check_separate_test_files,
    count_shared_prompts,
    find_task,
    for_training,
    load_at_most,
    parse_data_files,
    with_plain_prompts,
)
from peft_svf.cli.models import BaseModel, check_adapter, for_rows
from peft_svf.cli.run_folder import RESULTS_FILE, RUN_FILE, check_output, write_json
from peft_svf.cli.train_arguments import TrainArguments, TrainParser
from peft_svf.cli.train_card import check_can_publish, publish, task_facts, write_card
from peft_svf.trainers import SVFPolicyGradientConfig, SVFPolicyGradientTrainer
from peft_svf.trainers.evaluation import Evaluation, evaluate
from peft_svf.trainers.logs.progress import RewardProgressCallback
from peft_svf.trainers.tasks import Task


TEST_SEED = 0  # of drawing validation and test prompts: the same ones whatever the seed of the training
EVALUATIONS = 10  # of a training run, besides the one before its first step


@dataclass(frozen=True)
class Rows:
    """Rows to train on, to choose the best checkpoint by, and to compare base and expert on."""

    train: Dataset
    validation: Dataset
    test: Dataset | None


def run_train(words: Sequence[str]) -> None:
    """
    Train, evaluate and write the expert.

    Args:
        words (`Sequence[str]`): The command line after `peft-svf train`.

    Raises:
        ValueError: For arguments that cannot work; nothing was loaded or written.
        OSError: If model, data or output folder cannot be read or written.
    """
    arguments, given = TrainParser().parse(words)
    task = find_task(arguments.task)
    output, run = Path(arguments.output), run_identity(arguments)
    check_output(output, run, arguments.resume)
    config = build_config(arguments, given, task)
    check_packages(config)
    if config.push_to_hub:
        check_can_publish(arguments.model, given)
    base = BaseModel(
        arguments.model,
        arguments.revision,
        arguments.dtype,
        arguments.load_in_4bit,
        arguments.load_in_8bit,
        bool(config.trust_remote_code),
    )
    base.check()
    base.check_layers(arguments.layers)
    if arguments.adapter is not None:
        check_adapter(arguments.adapter)
    rows = load_rows(arguments, task, config)
    state = PartialState()
    state.wait_for_everyone()  # every process has looked at the folder before one writes into it
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL's and transformers' own
    logging.getLogger("transformers.trainer_utils").addFilter(is_real_change)
    trainer, processor = build_trainer(arguments, task, config, base, rows)
    if state.is_main_process:
        write_json(output / RUN_FILE, run)
    train_and_report(trainer, processor, arguments, task, rows)


def run_identity(arguments: TrainArguments) -> dict[str, Any]:
    """What makes a run this run: it is not resumed with anything else."""
    return {name: value for name, value in dataclasses.asdict(arguments).items() if name not in ("output", "resume")}


def build_config(arguments: TrainArguments, given: Mapping[str, Any], task: Task) -> SVFPolicyGradientConfig:
    """The trainer's configuration: what the user set, else what suits the task, else the trainer's defaults."""
    chosen = dict(given)
    if chosen.get("eval_strategy") is False:  # YAML's reading of `no`
        chosen["eval_strategy"] = "no"
    defaults = {
        "max_completion_length": task.max_new_tokens,
        "eval_strategy": "steps",
        "eval_steps": 1 / EVALUATIONS,  # a share of all steps
        "load_best_model_at_end": chosen.get("eval_strategy") != "no",
        "per_device_eval_batch_size": 32,
        "save_total_limit": 2,
        "logging_steps": 1,
    }
    options = {**defaults, **chosen}
    if arguments.paper:
        return SVFPolicyGradientConfig.paper(arguments.output, **options)
    return SVFPolicyGradientConfig(arguments.output, **options)


def check_packages(config: SVFPolicyGradientConfig) -> None:
    """Raise a `ValueError` for what is asked for and not installed."""
    available = get_available_reporting_integrations()
    for name in config.report_to:
        if name not in (*available, "flyte"):  # which transformers knows and does not list
            raise ValueError(
                f"--report_to {name}: there is no such package here (installed: {', '.join(available) or 'none'})"
            )
    if config.use_vllm and not is_vllm_available():
        raise ValueError("--use_vllm needs vLLM, which is not installed: pip install 'trl[vllm]'")


def is_real_change(record: logging.LogRecord) -> bool:
    """False for transformers' warning on resuming that a share of all steps is not the number that it came to."""
    header, *changes = record.getMessage().strip().splitlines()
    if "do not match the ones in the `trainer_state.json`" not in header:
        return True
    return not all(re.match(r"\s*(eval|save|logging)_steps: 0?\.\d+ \(from args\)", line) for line in changes)


def load_rows(arguments: TrainArguments, task: Task, config: SVFPolicyGradientConfig) -> Rows:
    """All rows that the run needs, so that a wrong file or too few prompts show before the model is loaded."""
    files = parse_data_files(arguments.data_files)
    if arguments.test_prompts != 0:
        check_separate_test_files(files)
    batch = config.generation_batch_size // config.num_generations
    train = task.load("train", arguments.train_prompts, config.seed, data_files=files, batch_size=batch)
    validation = load_at_most(task, "validation", arguments.validation_prompts, TEST_SEED, files)
    if arguments.test_prompts == 0:
        return Rows(train, validation, None)
    test = task.load("test", arguments.test_prompts, TEST_SEED, data_files=files)
    if shared := count_shared_prompts(test, train):
        say(f"Note: {shared} of {len(test)} test prompts are training prompts too")
    return Rows(train, validation, test)


def build_trainer(
    arguments: TrainArguments, task: Task, config: SVFPolicyGradientConfig, base: BaseModel, rows: Rows
) -> tuple[SVFPolicyGradientTrainer, Processor]:
    """Load the model and make the trainer."""
    processor = for_rows(base.load_processor(), rows.train.column_names)
    if not processor.chat_template:
        say("The model has no chat template: prompts are plain text, without roles")
    model: Any = base.load()
    if arguments.adapter is not None:
        model = PeftModel.from_pretrained(model, arguments.adapter, is_trainable=True)
    trainer = SVFPolicyGradientTrainer(
        model=model,
        reward_funcs=for_training(task).reward,
        args=config,
        train_dataset=with_plain_prompts(rows.train, processor),
        eval_dataset=with_plain_prompts(rows.validation, processor) if config.eval_strategy != "no" else None,
        processing_class=processor,
        peft_config=None if arguments.adapter is not None else svf_config(arguments, base),
    )
    trainer.card_facts = task_facts(task, arguments)
    if not config.disable_tqdm:
        RewardProgressCallback.attach(trainer, f"training the {task.label} expert")
    return trainer, processor


def svf_config(arguments: TrainArguments, base: BaseModel) -> SVFConfig:
    """What is trained; with 4-bit weights the bases come from the checkpoint before it is quantized."""
    options: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "rank": arguments.rank,
        "target_modules": arguments.target_modules or "all-linear",
        "layers_to_transform": arguments.layers,
        "basis_source": base.name if base.load_in_4bit else None,
    }
    return SVFConfig.paper(**options) if arguments.paper else SVFConfig(**options)


def train_and_report(
    trainer: SVFPolicyGradientTrainer,
    processor: Processor,
    arguments: TrainArguments,
    task: Task,
    rows: Rows,
) -> None:
    """Train, save the expert unless it is no better than its start, compare it with the base model, and report."""
    output, config = Path(arguments.output), trainer.args
    is_published, config.push_to_hub = config.push_to_hub, False  # once, in the end: with the results on its card
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    say(f"Training {parameters} parameters on {len(rows.train)} prompts of {task.name}, into {output}")
    sweep = trainer.sweep_kl(arguments.kl_sweep) if arguments.kl_sweep else None
    if sweep is None:
        trainer.train(resume_from_checkpoint=arguments.resume or config.resume_from_checkpoint)
    else:
        say(f"Validation scores, the winner marked:\n{sweep}")
    improved = not trainer.best_is_base
    if improved and sweep is None:  # a sweep has saved its winner
        trainer.save_model(str(output))
    evaluations = compare(trainer, processor, task, rows.test, improved)
    if not trainer.is_world_process_zero():
        return
    found = {
        "task": task.name,
        "model": arguments.model,
        "revision": arguments.revision,
        "adapter": arguments.adapter,
        "improved": improved,
        "training": training_facts(trainer, rows, parameters),
        **results.environment(),
    }
    if sweep is not None:
        found["kl_sweep"] = dataclasses.asdict(sweep)
    if evaluations is not None and rows.test is not None:
        found["evaluation"] = results.evaluated_on(rows.test, "test", TEST_SEED, config.max_completion_length)
        found["base"] = results.result_entry(evaluations[0])
        if improved:
            found["expert"] = results.result_entry(evaluations[1], evaluations[0])
    write_json(output / RESULTS_FILE, found)
    if improved:
        write_card(trainer, task, arguments, evaluations)
    print_outcome(trainer, output, evaluations, improved)
    if is_published:
        publish(trainer, output, improved)


def compare(
    trainer: SVFPolicyGradientTrainer, processor: Processor, task: Task, rows: Dataset | None, improved: bool
) -> tuple[Evaluation, Evaluation] | None:
    """Base and expert on the same rows, which the processes share; the base twice if there is no better expert."""
    if rows is None:
        return None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        say(
            "The model is sharded, so base and expert are not compared here: run `peft-svf evaluate --model ... "
            f"--adapter {trainer.args.output_dir} --task {task.name}`"
        )
        return None
    config, shown = trainer.args, PartialState().is_main_process and not trainer.args.disable_tqdm
    judged = dataclasses.replace(task, max_new_tokens=config.max_completion_length)
    model: Any = trainer.accelerator.unwrap_model(trainer.model)

    def of(name: str) -> Evaluation:
        return evaluate(
            model,
            processor,
            judged,
            rows,
            config.per_device_eval_batch_size,
            chat_template_kwargs=config.chat_template_kwargs,
            description=f"evaluating the {name}" if shown else None,
            split_over_processes=True,
        )

    with model.disable_adapter():
        base = of("base model")
    return base, of("expert") if improved else base


def training_facts(trainer: SVFPolicyGradientTrainer, rows: Rows, parameters: int) -> dict[str, Any]:
    """How the expert was trained, for the JSON file."""
    config, state = trainer.args, trainer.state
    runtime = [entry["train_runtime"] for entry in state.log_history if "train_runtime" in entry]
    return {
        "parameters": parameters,
        "train_prompts": len(rows.train),
        "validation_prompts": len(rows.validation),
        "steps": state.global_step,
        "seconds": runtime[-1] if runtime else None,  # of the last session, if the run was resumed
        "seed": config.seed,
        "answers_per_step": config.per_device_train_batch_size
        * config.gradient_accumulation_steps
        * config.world_size,
        "learning_rate": config.learning_rate,
        "kl_coef": config.kl_coef,
        "baseline": config.baseline,
        "best_checkpoint": Path(state.best_model_checkpoint).name if state.best_model_checkpoint else None,
        "validation_reward": {"start": trainer.base_eval_reward, "best": state.best_metric},
        "config": json.loads(config.to_json_string()),
        "svf": svf_facts(trainer),
    }


def svf_facts(trainer: SVFPolicyGradientTrainer) -> dict[str, Any]:
    """What was adapted, for the JSON file."""
    config = trainer.model.peft_config[trainer.model.active_adapter]
    targets = config.target_modules
    return {
        "parametrization": config.parametrization,
        "rank": config.rank,
        "target_modules": sorted(targets) if isinstance(targets, (set, list)) else targets,
        "layers_to_transform": config.layers_to_transform,
    }


def print_outcome(
    trainer: SVFPolicyGradientTrainer,
    output: Path,
    evaluations: tuple[Evaluation, Evaluation] | None,
    improved: bool,
) -> None:
    """The end of the run, for people."""
    print(validation_summary(trainer))
    if evaluations is not None:
        print("Greedy success on the same held-out prompts [95 % interval]")
        results.print_results(evaluations[0], {"expert": evaluations[1]} if improved else {})
    if improved:
        print(f"The expert is in {output}: PeftModel.from_pretrained(model, {str(output)!r})")
    else:
        print("No checkpoint was better than the start on the validation prompts, so no expert is written")


def validation_summary(trainer: SVFPolicyGradientTrainer) -> str:
    """How many steps were made, and what validation made of them; after a sweep, of its winner or last run."""
    state = trainer.state
    planned = "" if state.global_step >= state.max_steps else f" of {state.max_steps}, stopped early"
    steps = f"{state.global_step} steps{planned}"
    start, best = trainer.base_eval_reward, state.best_metric
    if start is None or best is None:
        return steps
    at = "" if trainer.best_is_base or state.best_global_step is None else f" at step {state.best_global_step}"
    return f"{steps}; validation reward {start:+.2f} -> {best:+.2f}{at}"


def say(text: str) -> None:
    """Print once, however many processes there are."""
    if PartialState().is_main_process:
        print(text, flush=True)
