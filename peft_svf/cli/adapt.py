"""`peft-svf adapt`: the mixture of a bank's experts that answers a few examples of a task best, saved as an expert."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import shutil
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset

from peft_svf.cli import results
from peft_svf.cli.banks import check_bank_arguments, load_bank
from peft_svf.cli.data import find_task, parse_data_files
from peft_svf.cli.output_files import check_output_file
from peft_svf.cli.run_folder import RESULTS_FILE, write_json
from peft_svf.cli.terminal import table
from peft_svf.dispatch import FixedDispatcher
from peft_svf.dispatch.few_shot import Adaptation, FewShotDispatcher, Fitness, MixtureSpace, SearchSettings
from peft_svf.dispatch.few_shot.examples import ADAPTATION_FILE, row_hashes
from peft_svf.experts import BASE_LABEL, ExpertBank
from peft_svf.experts.adapter_files import read_facts
from peft_svf.hub_cards import ExpertCardData, write_expert_card
from peft_svf.plots import check_picture, plot_mixture_weights
from peft_svf.trainers.evaluation import Evaluation, evaluate
from peft_svf.trainers.tasks import Task


OPTIMIZERS = {"cem": "cross_entropy", "cma-es": "covariance_adaptation"}
TEST_SEED = 0  # of drawing unseen prompts: the same ones whatever the examples
MIN_TEST_PROMPTS = 2  # a paired difference has no interval below
INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it


@dataclass(frozen=True)
class Rows:
    """Rows to search on, and others to compare on."""

    examples: Dataset
    unseen: Dataset | None


def run_adapt(arguments: argparse.Namespace) -> None:
    """
    Search, save the expert, compare it on unseen prompts, and report.

    Raises:
        ValueError: For arguments that cannot work, where possible before a model is loaded; if no example was answered
            right by any mixture.
        ExpertBankError: If bank or experts cannot be loaded.
        OSError: If data or folders cannot be read or written.
        SystemExit: After Ctrl-C in the search, which the same command goes on with.
    """
    check_arguments(arguments)
    settings = search_settings(arguments)
    check_bank_arguments(arguments)
    task = find_task(arguments.task or str(arguments.examples))
    if arguments.max_new_tokens is not None:
        task = dataclasses.replace(task, max_new_tokens=arguments.max_new_tokens)
    rows = load_rows(arguments, task, settings.examples)
    state = PartialState(cpu=arguments.use_cpu)
    bank = load_bank(arguments, state)
    dispatcher = FewShotDispatcher(
        bank,
        rows.examples,
        task=task,
        settings=settings,
        configurations=configurations(arguments, bank),
        batch_size=arguments.batch_size,
    )
    if state.is_main_process:
        print(f"Searching a mixture of {', '.join(bank.experts)} on {len(rows.examples)} examples of {task.name}")
    found = search_and_save(dispatcher, arguments)
    if rows.unseen is not None:
        evaluations = compare(dispatcher, task, rows.unseen, arguments.batch_size, state)
        if state.is_main_process:
            report(evaluations, best_expert(found), task, rows.unseen, arguments)


def search_settings(arguments: argparse.Namespace) -> SearchSettings:
    """What the arguments change of the paper's settings, or of the light ones; raises if an optimizer refuses them."""
    asked = {
        "examples": arguments.prompts,
        "population": arguments.population,
        "iterations": arguments.iterations,
        "optimizer": OPTIMIZERS[arguments.optimizer],
        "seed": arguments.seed,
    }
    preset = SearchSettings.light if arguments.light else SearchSettings.paper
    settings = preset(**{name: value for name, value in asked.items() if value is not None})
    settings.make_optimizer(MixtureSpace(("one", "other")).start)  # of any space: it checks the numbers
    return settings


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise a `ValueError` for what can be known to be wrong at once; nothing was loaded."""
    output: Path = arguments.output
    fresh = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not fresh and not (output / ADAPTATION_FILE).is_file():
        raise ValueError(f"{output} exists and is no expert of `peft-svf adapt`: choose another --output")
    check_output_file(output / ADAPTATION_FILE, "--output")
    if arguments.plot is not None:
        check_output_file(arguments.plot, "--plot")
        check_picture(arguments.plot)
    if arguments.optimizer == "cma-es" and importlib.util.find_spec("cmaes") is None:
        raise ValueError("--optimizer cma-es needs cmaes, which is not installed: pip install 'peft-svf[cma]'")
    if arguments.cross_validate and (arguments.per_layer or arguments.free):
        raise ValueError("--cross-validate tries --per-layer and --free itself: remove them, or --cross-validate")
    if arguments.test_prompts is not None and arguments.test_prompts < MIN_TEST_PROMPTS:
        raise ValueError(f"--test-prompts must be at least {MIN_TEST_PROMPTS}, for a paired comparison")
    if arguments.examples is not None and not arguments.examples.is_file():
        raise ValueError(f"there is no file {arguments.examples}: --examples takes a table with prompts and answers")


def load_rows(arguments: argparse.Namespace, task: Task, n: int) -> Rows:
    """
    The examples and the unseen prompts, which share no prompt.

    The examples of `--task` come from the split of `--split`; those of `--examples` from the file, which may have
    fewer. The unseen prompts are test rows, or the other rows of the file.
    """
    files = parse_data_files(arguments.data_files)
    if arguments.examples is None:
        examples = task.load(arguments.split, n, arguments.seed, data_files=files)
        pool = None if arguments.test_prompts is None else _drawn(task, files, arguments.test_prompts + len(examples))
    else:
        pool = task.load("test", data_files=str(arguments.examples))
        examples = pool
        if len(pool) > n:
            examples = task.load("test", n, arguments.seed, data_files=str(arguments.examples))
        if files is not None:
            pool = _drawn(task, files, (arguments.test_prompts or 0) + len(examples))
    if arguments.test_prompts is None or pool is None:
        return Rows(examples, None)
    known = set(row_hashes(examples))
    unseen = [row for row, own in enumerate(row_hashes(pool)) if own not in known]
    if len(unseen) < arguments.test_prompts:
        where = "the test rows" if arguments.examples is None or files is not None else str(arguments.examples)
        raise ValueError(
            f"--test-prompts {arguments.test_prompts}: besides the {len(examples)} examples, {where} have "
            f"{len(unseen)} prompts; ask for at most so many"
        )
    return Rows(examples, pool.select(unseen[: arguments.test_prompts]))


def _drawn(task: Task, files: Any, most: int) -> Dataset:
    """Test rows in an order that depends on `TEST_SEED` only; fewer than `most` if there are no more."""
    rows = task.load("test", data_files=files)
    return task.load("test", min(most, len(rows)), TEST_SEED, data_files=files)


def configurations(arguments: argparse.Namespace, bank: ExpertBank) -> list[MixtureSpace] | None:
    """The configuration that is asked for; `None` lets cross-validation choose among the paper's four."""
    if arguments.cross_validate:
        return None
    groups = bank.layer_groups() if arguments.per_layer else ()
    return [MixtureSpace(tuple(bank.experts), groups, normalized=not arguments.free)]


def search_and_save(dispatcher: FewShotDispatcher, arguments: argparse.Namespace) -> Adaptation:
    """Search, save the expert and print what it is; raises a `ValueError` if there was nothing to adapt to."""
    folder = arguments.state or default_state(arguments.output)
    found = search(dispatcher, folder)
    if not found.adapted:
        if PartialState().is_main_process and arguments.state is None:
            remove_search(folder)  # better examples are another search
        raise ValueError(f"{found.statement} Nothing was saved.")
    dispatcher.save_pretrained(arguments.output)
    if PartialState().is_main_process:
        write_expert_card(arguments.output)
        print_mixture(found, len(dispatcher.examples))
        print(f"The expert is in {arguments.output}")
        if arguments.plot is not None:
            plot_mixture_weights(found.weights, arguments.plot, arguments.output.name)
            print(f"Picture: {arguments.plot}")
        if arguments.state is None:
            remove_search(folder)
    return found


def search(dispatcher: FewShotDispatcher, folder: Path) -> Adaptation:
    """The search, which goes on from `folder`; Ctrl-C ends it with what to do next instead of a traceback."""
    if PartialState().is_main_process and any(folder.glob("*/search.json")):
        print(f"Going on with the search in {folder}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No candidate answered")  # it becomes an error
            return dispatcher.adapt(folder, progress=sys.stderr.isatty())
    except KeyboardInterrupt:
        if PartialState().is_main_process:
            print(f"\nInterrupted; the same command goes on from {folder}", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


def default_state(output: Path) -> Path:
    """Beside the output: it is moved into place as a whole."""
    return output.with_name(output.name + ".search")


def remove_search(folder: Path) -> None:
    """Remove the searches in a folder, and the folder unless there is something else in it."""
    for own in folder.glob("*/search.json"):
        shutil.rmtree(own.parent)
    with contextlib.suppress(OSError):
        folder.rmdir()


def best_expert(found: Adaptation) -> str:
    """The single expert that is best on the examples: chosen like the mixture, without the unseen prompts."""
    alone = {name: fitness for name, fitness in found.references.items() if name != BASE_LABEL}
    return max(alone, key=lambda name: alone[name])


def print_mixture(found: Adaptation, examples: int) -> None:
    """What was found, beside what the experts do alone."""

    def right(fitness: Fitness) -> str:
        return f"{round(fitness.success * examples)} of {examples}"

    history = found.search.history
    print(f"{len(history)} generations; {found.search.stopped.value}")
    weights = expert_weights(found)
    rows = [("expert", "weight", "examples right")]
    rows += [(name, weights[name], right(found.references[name])) for name in weights]
    rows += [("base model", "", right(found.references[BASE_LABEL])), ("mixture", "", right(found.fitness))]
    print(table(rows))
    print(found.statement)


def expert_weights(found: Adaptation) -> dict[str, str]:
    """The weight of each expert; for weights per layer their mean and range."""
    route = found.search.route()
    shown = {}
    for column, name in enumerate(route.experts):
        weights = route.weights[0].reshape(-1, len(route.experts))[:, column]  # (G or 1,)
        shown[name] = f"{weights.mean():.3f}"
        if route.groups:
            shown[name] += f" ({weights.min():.3f} to {weights.max():.3f} in {len(weights)} layers)"
    return shown


def compare(
    dispatcher: FewShotDispatcher, task: Task, rows: Dataset, batch_size: int, state: PartialState
) -> list[Evaluation]:
    """Base model, best single expert and mixture on the same rows, which the processes share."""
    bank, alone = dispatcher.bank, best_expert(dispatcher.result)
    candidates: list[tuple[str, Any]] = [
        ("the base model", FixedDispatcher(bank, BASE_LABEL)),
        (alone, FixedDispatcher(bank, alone)),
        ("the mixture", dispatcher),
    ]
    shows = state.is_main_process and sys.stderr.isatty()
    return [
        evaluate(
            bank,
            bank.tokenizer,
            task,
            rows,
            batch_size,
            dispatcher=candidate,
            description=f"evaluating {name}" if shows else None,
            split_over_processes=True,
        )
        for name, candidate in candidates
    ]


def report(evaluations: list[Evaluation], name: str, task: Task, rows: Dataset, arguments: argparse.Namespace) -> None:
    """The comparison, as a table and beside the expert as JSON."""
    base, alone, mixture = evaluations
    print(f"Greedy success on unseen prompts of {task.name} [95 % interval]")
    results.print_results(base, {f"{name} (best on the examples)": alone, "mixture": mixture})
    gain = results.format_gain(mixture.gain_over(alone))
    print(f"  The mixture against {name}: {gain} points, on the same prompts")
    found = {
        "task": task.name,
        "model": arguments.model or "playground",
        "evaluation": results.evaluated_on(rows, "test", TEST_SEED, task.max_new_tokens),
        "base": results.result_entry(base),
        "best_expert": {"name": name, **results.result_entry(alone, base)},
        "mixture": results.result_entry(mixture, base),
        **results.environment(),
    }
    write_json(arguments.output / RESULTS_FILE, found)
    write_card(arguments.output, task, base, mixture)


def write_card(output: Path, task: Task, base: Evaluation, mixture: Evaluation) -> None:
    """The expert's card, with the success on unseen prompts before that on the examples."""
    unseen = results.compared(f"{task.name}, unseen prompts", base, mixture, "greedy answers")
    facts = ExpertCardData.from_metadata(read_facts(output, str(output)))
    environment = results.environment()
    known = dataclasses.replace(
        facts,
        results=(unseen, *(result for result in facts.results if result.chosen_on)),
        hardware=environment["hardware"],
        versions=environment["versions"],
    )
    write_expert_card(output, known)
