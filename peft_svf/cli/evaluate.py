"""`peft-svf evaluate`: success of a base model and of experts on the same prompts of a task."""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel

from peft_svf.answering import Processor, answer_text
from peft_svf.cli import results
from peft_svf.cli.data import find_task, parse_data_files
from peft_svf.cli.models import BaseModel, check_adapter, for_rows
from peft_svf.cli.output_files import check_output_file
from peft_svf.cli.run_folder import write_json
from peft_svf.cli.terminal import indented
from peft_svf.dispatch.few_shot.examples import refuse_adaptation_examples, saved_hashes
from peft_svf.experts.bank_loading import expert_folder
from peft_svf.trainers.evaluation import Evaluation, evaluate
from peft_svf.trainers.tasks import Task


MIN_PROMPTS = 2  # a paired difference has no interval below


def run_evaluate(arguments: argparse.Namespace) -> None:
    """
    Evaluate and print; with `--output`, write the numbers and every prompt's outcome as JSON.

    Raises:
        ValueError: For arguments that cannot work, before a model is loaded.
        OSError: If model, adapter, data or output cannot be read or written.
    """
    template_kwargs = _check(arguments)
    for adapter in arguments.adapter:
        check_adapter(adapter)
    warnings.filterwarnings("ignore", category=FutureWarning)  # PEFT's and transformers' own
    task = find_task(arguments.task)
    if arguments.max_new_tokens is not None:
        task = dataclasses.replace(task, max_new_tokens=arguments.max_new_tokens)
    base = BaseModel(
        arguments.model,
        arguments.revision,
        arguments.dtype,
        arguments.load_in_4bit,
        arguments.load_in_8bit,
        arguments.trust_remote_code,
    )
    base.check()
    files = parse_data_files(arguments.data_files)
    rows = task.load(arguments.split, arguments.prompts, arguments.seed, data_files=files)
    if len(rows) < MIN_PROMPTS:
        raise ValueError(f"{task.name} has {len(rows)} prompt here: bring at least {MIN_PROMPTS}, for an interval")
    for adapter in arguments.adapter:
        refuse_adaptation_examples(rows, saved_hashes(adapter), adapter)
    state = PartialState(cpu=arguments.use_cpu)
    model, names = load_adapters(base, arguments.adapter, state)
    processor = for_rows(base.load_processor(), rows.column_names)
    evaluations = evaluate_all(model, processor, task, rows, names, arguments, template_kwargs)
    if state.is_main_process:
        report(evaluations, task, rows, arguments)


def _check(arguments: argparse.Namespace) -> dict[str, Any]:
    """Raise for what can be known to be wrong at once; returns the options of the chat template."""
    if arguments.output is not None:
        check_output_file(arguments.output, "--output")
    if arguments.samples > 1 and arguments.temperature == 0:
        raise ValueError("greedy answers to one prompt are all the same: --samples needs a --temperature above 0")
    if arguments.temperature < 0:
        raise ValueError(f"--temperature is 0 (greedy) or positive, not {arguments.temperature}")
    if arguments.load_in_4bit and arguments.load_in_8bit:
        raise ValueError("--load-in-4bit and --load-in-8bit exclude each other: choose one")
    if arguments.prompts is not None and arguments.prompts < MIN_PROMPTS:
        raise ValueError(f"--prompts must be at least {MIN_PROMPTS}, for an interval")
    try:
        options = json.loads(arguments.chat_template_kwargs or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"--chat-template-kwargs is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise ValueError(f"--chat-template-kwargs must be a JSON object, not {arguments.chat_template_kwargs}")
    return options


def load_adapters(base: BaseModel, adapters: list[str], state: PartialState) -> tuple[Any, dict[str, str]]:
    """The base model with every adapter on it, and their names: printed name to adapter name."""
    model: Any = base.load()
    if not base.is_quantized:
        model = model.to(state.device)
    names: dict[str, str] = {}
    for i, adapter in enumerate(adapters):
        internal, folder = f"expert_{i}", str(expert_folder(adapter, None, None))
        if i == 0:
            model = PeftModel.from_pretrained(model, folder, adapter_name=internal)
        else:
            model.load_adapter(folder, adapter_name=internal)
        short = Path(adapter).name or adapter
        names[adapter if short in names else short] = internal
    return model.eval(), names


def evaluate_all(
    model: Any,
    processor: Processor,
    task: Task,
    rows: Dataset,
    names: Mapping[str, str],
    arguments: argparse.Namespace,
    chat_template_kwargs: Mapping[str, Any],
) -> dict[str, Evaluation]:
    """The base model under the name `base`, then every adapter; processes share the rows."""

    def of(name: str) -> Evaluation:
        return evaluate(
            model,
            processor,
            task,
            rows,
            arguments.batch_size,
            temperature=arguments.temperature,
            samples=arguments.samples,
            seed=arguments.seed,
            chat_template_kwargs=chat_template_kwargs,
            description=f"evaluating {name}" if PartialState().is_main_process else None,
            split_over_processes=True,
        )

    if not names:
        return {"base": of("base")}
    with model.disable_adapter():
        evaluations = {"base": of("base")}
    for name, internal in names.items():
        model.set_adapter(internal)
        evaluations[name] = of(name)
    return evaluations


def report(evaluations: Mapping[str, Evaluation], task: Task, rows: Dataset, arguments: argparse.Namespace) -> None:
    """Print answers and table, write the JSON file."""
    for row in range(min(arguments.show or 0, len(rows))):
        show(row, rows, evaluations)
    base, *_ = evaluations.values()
    experts = {name: evaluation for name, evaluation in evaluations.items() if name != "base"}
    decoding = "greedy" if arguments.temperature == 0 else f"temperature {arguments.temperature:g}"
    if arguments.samples > 1:
        decoding += f", {arguments.samples} answers for each prompt"
    print(f"Success on {task.name}, {arguments.split} ({decoding}) [95 % interval]")
    results.print_results(base, experts)
    if arguments.output is not None:
        found = {
            "task": task.name,
            "model": arguments.model,
            "revision": arguments.revision,
            "evaluation": {
                **results.evaluated_on(rows, arguments.split, arguments.seed, task.max_new_tokens),
                "temperature": arguments.temperature,
                "samples": arguments.samples,
            },
            "base": results.result_entry(base),
            "experts": {name: results.result_entry(expert, base) for name, expert in experts.items()},
            **results.environment(),
        }
        write_json(arguments.output, found)


def show(row: int, rows: Dataset, evaluations: Mapping[str, Evaluation]) -> None:
    """One prompt with every model's first answer and what the reward says about it."""
    prompt = rows[row]["prompt"]
    print(indented("prompt", prompt if isinstance(prompt, str) else answer_text(prompt)))
    for name, evaluation in evaluations.items():
        i = row * evaluation.samples
        print(indented(f"  {name}", evaluation.answers[i]))
        reward = evaluation.rewards[i]
        verdict = evaluation.reasons[i] or ("not judged" if reward is None else f"reward {reward:+g}")
        print(indented("", f"-> {verdict}"))
    print()
