"""`peft-svf route`: which expert each prompt would get, how sure that is, and how often it is right."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState

from peft_svf.answering import Processes
from peft_svf.cli import results
from peft_svf.cli.banks import load_bank
from peft_svf.cli.confusion import MOST_COLUMNS, ConfusionMatrix, check_labels
from peft_svf.cli.dispatchers import build_dispatcher, dispatcher_kind
from peft_svf.cli.output_files import check_output_file
from peft_svf.cli.questions import Question, read_questions
from peft_svf.cli.run_folder import write_json
from peft_svf.cli.terminal import one_line, table, visible
from peft_svf.dispatch import Dispatcher
from peft_svf.experts import BASE_LABEL, ExpertBank
from peft_svf.plots import plot_confusion_matrix


@dataclass(frozen=True)
class Choice:
    """
    What the dispatcher made of one prompt.

    Args:
        chosen (`str`): The label that the prompt was routed to; "others" is the base model.
        scores (`dict[str, float]`): Probability of every label.
    """

    chosen: str
    scores: dict[str, float]

    @property
    def lead(self) -> float:
        """How far the most probable label is ahead of the second; below the margin the base model answers."""
        best, second = sorted(self.scores.values(), reverse=True)[:2]
        return best - second


def run_route(arguments: argparse.Namespace) -> None:
    """
    Route all prompts and print the choices; for prompts with labels, how often they are right.

    Raises:
        ValueError: For prompts or arguments that cannot work, where possible before a model is loaded.
        ExpertBankError: If bank or experts cannot be loaded.
        OSError: If a file cannot be read or written.
    """
    state = PartialState(cpu=arguments.use_cpu)
    questions = read_questions(arguments.prompts, arguments.file)
    is_labelled = any(question.label is not None for question in questions)
    check_files(arguments, is_labelled)
    bank = load_bank(arguments, state)
    if not bank.experts:
        raise ValueError("the model has no experts to route to: pass a bank, or --adapter EXPERT for each expert")
    labels = [*bank.labels, BASE_LABEL]
    true: list[str] | None = None
    if is_labelled:
        names = [*bank.experts, BASE_LABEL]
        true = check_labels([question.label for question in questions], labels, names, str(arguments.file))
    choices = choose(build_dispatcher(bank, arguments), bank, questions, arguments.batch_size)
    if not state.is_main_process:
        return
    matrix = None
    if true is not None:
        matrix = ConfusionMatrix(tuple(labels), tuple(true), tuple(choice.chosen for choice in choices))
    report(questions, choices, matrix, arguments)
    write_files(questions, choices, matrix, bank, arguments)


def check_files(arguments: argparse.Namespace, is_labelled: bool) -> None:
    """Raise a `ValueError` if a file that is asked for cannot be made; nothing was loaded."""
    if arguments.output is not None:
        check_output_file(arguments.output, "--output", (".json",))
    if arguments.plot is None:
        return
    if not is_labelled:
        raise ValueError("--plot draws chosen against true labels: pass --file with a column `label`")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed: pip install 'peft-svf[plots]'")
    from matplotlib.figure import Figure

    formats = Figure().canvas.get_supported_filetypes()
    check_output_file(arguments.plot, "--plot", tuple(f".{kind}" for kind in formats))


def choose(dispatcher: Dispatcher, bank: ExpertBank, questions: Sequence[Question], batch_size: int) -> list[Choice]:
    """The dispatcher's choice for every prompt; processes share the batches."""
    processes = Processes.launched()
    batches = [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]
    label_of = {BASE_LABEL: BASE_LABEL, **{name: entry.label for name, entry in bank.experts.items()}}
    found: list[tuple[int, list[Choice]]] = []
    for number, batch in processes.own(list(enumerate(batches))):
        route = dispatcher.route([question.prompt for question in batch])
        named = zip(route.chosen(), route.scores, strict=True)
        found.append((number, [Choice(label_of[name], dict(scores or {})) for name, scores in named]))
    return [choice for _, choices in sorted(processes.gather(found), key=lambda batch: batch[0]) for choice in choices]


def report(
    questions: Sequence[Question],
    choices: Sequence[Choice],
    matrix: ConfusionMatrix | None,
    arguments: argparse.Namespace,
) -> None:
    """Print the scores of prompts without labels; of prompts with labels, accuracy, confusions and unsure prompts."""
    if matrix is None:
        print(scores_table(questions, choices))
        return
    print(f"Right [95 % interval]: {matrix.summary()}")
    print(matrix.text())
    order = sorted(range(len(questions)), key=lambda i: choices[i].lead)[: arguments.unsure]
    print("\nLeast certain prompts")
    print(scores_table([questions[i] for i in order], [choices[i] for i in order], [matrix.true[i] for i in order]))


def scores_table(questions: Sequence[Question], choices: Sequence[Choice], true: Sequence[str] | None = None) -> str:
    """A row for each prompt: what it got (and has, if known), and the probability of every label or the best ones."""
    labels = list(choices[0].scores)
    is_wide = len(labels) > MOST_COLUMNS
    columns = ["most probable"] if is_wide else ["lead", *map(visible, labels)]
    header = ["prompt", *([] if true is None else ["true"]), "chosen", *columns]
    rows = [header]
    for i, (question, choice) in enumerate(zip(questions, choices, strict=True)):
        known = [] if true is None else [visible(true[i])]
        shown = [f"{value:.3f}" for value in (choice.lead, *(choice.scores[label] for label in labels))]
        if is_wide:
            best = sorted(choice.scores.items(), key=lambda item: -item[1])[:3]
            shown = [", ".join(f"{visible(label)} {score:.3f}" for label, score in best)]
        rows.append([one_line(question.text), *known, visible(choice.chosen), *shown])
    first = len(header) - len(columns)
    return table(rows, right=() if is_wide else range(first, len(header)))


def write_files(
    questions: Sequence[Question],
    choices: Sequence[Choice],
    matrix: ConfusionMatrix | None,
    bank: ExpertBank,
    arguments: argparse.Namespace,
) -> None:
    """The picture and the JSON file."""
    kind = dispatcher_kind(bank, arguments)
    if arguments.plot is not None and matrix is not None:
        title = f"{kind} dispatcher, {100 * matrix.accuracy:.1f} % of {len(questions)} prompts right"
        plot_confusion_matrix(matrix.counts, matrix.rows, matrix.labels, arguments.plot, title)
        print(f"Picture: {arguments.plot}")
    if arguments.output is None:
        return
    found: dict[str, Any] = {
        "model": arguments.model or "playground",
        "adapters": arguments.adapter,
        "dispatcher": kind,
        "margin": arguments.margin,
        "calibrated": arguments.calibrate,
        "prompts": [
            {"prompt": question.prompt, "chosen": choice.chosen, "lead": choice.lead, "scores": choice.scores}
            | ({} if matrix is None else {"label": matrix.true[i]})
            for i, (question, choice) in enumerate(zip(questions, choices, strict=True))
        ],
        **({} if matrix is None else matrix.as_json()),
        **results.environment(),
    }
    write_json(arguments.output, found)
