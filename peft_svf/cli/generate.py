"""`peft-svf generate`: answers to prompts, each by the expert it needs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from accelerate import PartialState
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerBase, TextStreamer

from peft_svf.answering import Processes
from peft_svf.cli.banks import load_bank
from peft_svf.cli.dispatchers import build_dispatcher
from peft_svf.cli.questions import Question, read_questions
from peft_svf.cli.terminal import indented, one_line, visible
from peft_svf.experts import ExpertBank
from peft_svf.pipelines import Transformer2Pipeline
from peft_svf.pipelines.requests import check_pinned


def run_generate(arguments: argparse.Namespace) -> None:
    """
    Answer all prompts and print the answers as they come.

    Raises:
        ValueError: For prompts or arguments that cannot work, where possible before a model is loaded.
        ExpertBankError: If bank or experts cannot be loaded.
        OSError: If the file cannot be read.
    """
    state = PartialState(cpu=arguments.use_cpu)
    questions = read_questions(arguments.prompts, arguments.file)
    bank = load_bank(arguments, state)
    check_experts(bank, questions, arguments)
    pipe: Any = Transformer2Pipeline(bank, dispatcher=build_dispatcher(bank, arguments))
    set_seed(arguments.seed + state.process_index)
    alone = len(questions) == 1
    if alone and sys.stdout.isatty() and not arguments.json:
        if state.is_main_process:
            stream(pipe, questions[0], arguments)
        return
    records = answers(pipe, questions, arguments, Processes.launched())
    for question, record in zip(questions, records, strict=True):
        if state.is_main_process:
            report(question, record, bank, arguments, alone)


def check_experts(bank: ExpertBank, questions: Sequence[Question], arguments: argparse.Namespace) -> None:
    """Raise a `ValueError` for an expert or a mixture that the bank cannot give, before anything is answered."""
    if (pinned := pinned_to(arguments)) is not None:
        check_pinned(bank, pinned)
    for i, question in enumerate(questions, 1):
        if question.expert is not None:
            try:
                check_pinned(bank, question.expert)
            except ValueError as error:
                raise ValueError(f"`expert` in row {i} of {arguments.file}: {error}") from error


def pinned_to(arguments: argparse.Namespace) -> str | dict[str, float] | None:
    """What `--expert` or `--mix` says; they exclude each other."""
    return arguments.expert if arguments.mix is None else arguments.mix


def pipeline_input(question: Question, arguments: argparse.Namespace) -> dict[str, Any]:
    """A prompt as the pipeline takes it; its own expert wins over that of the command line."""
    key = "text" if isinstance(question.prompt, str) else "messages"
    return {key: question.prompt, "expert": question.expert or pinned_to(arguments)}


def generation_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of one call of the pipeline."""
    options: dict[str, Any] = {"return_full_text": False}
    if arguments.max_new_tokens is not None:
        options["max_new_tokens"] = arguments.max_new_tokens
    if arguments.temperature > 0:
        options |= {"do_sample": True, "temperature": arguments.temperature}
    return options


def answers(
    pipe: Any, questions: Sequence[Question], arguments: argparse.Namespace, processes: Processes
) -> Iterator[dict[str, Any]]:
    """A record for each prompt, in order, as they come; processes share the prompts."""
    inputs = (pipeline_input(question, arguments) for question in processes.own(questions))
    found = (record for (record,) in pipe(inputs, batch_size=arguments.batch_size, **generation_options(arguments)))
    if processes.count == 1:
        yield from found
        return
    rows = processes.own(range(len(questions)))
    by_row = dict(processes.gather(list(zip(rows, found, strict=True))))
    yield from (by_row[row] for row in range(len(questions)))


def report(
    question: Question, record: dict[str, Any], bank: ExpertBank, arguments: argparse.Namespace, alone: bool
) -> None:
    """Print one answer: as JSON, alone, or under its prompt beside who gave it."""
    answer, by = record["generated_text"], {k: value for k, value in record.items() if k != "generated_text"}
    shows_scores = arguments.show_scores and record["scores"]
    if arguments.json:  # which escapes whatever a terminal would act on
        print(json.dumps({"prompt": question.prompt, "answer": answer, **by}))
    elif alone:
        print(visible(answer).strip())
        print(f"({scores_line(record) if shows_scores else who(record, bank)})")
    else:
        print(one_line(question.text, 100))
        print(indented(f"    {who(record, bank)}", answer, 24))
        if shows_scores:
            print(f"    {scores_line(record)}")
    sys.stdout.flush()


def who(record: dict[str, Any], bank: ExpertBank) -> str:
    """`"math 0.98"`: the expert with the probability it was chosen by, if it was; or the mixture."""
    if "weights" in record:
        return " + ".join(f"{weight:g} {name}" for name, weight in record["weights"].items())
    name = record["expert"]
    entry = bank.experts.get(name)
    score = (record["scores"] or {}).get(name if entry is None else entry.label)
    return name if score is None else f"{name} {score:.2f}"


def scores_line(record: dict[str, Any]) -> str:
    """`"math 0.980  code 0.011"`."""
    return "  ".join(f"{visible(label)} {score:.3f}" for label, score in record["scores"].items())


def stream(pipe: Any, question: Question, arguments: argparse.Namespace) -> None:
    """Answer one prompt on the terminal, word by word."""
    streamer = VisibleStreamer(pipe.tokenizer)
    (record,) = pipe(pipeline_input(question, arguments), streamer=streamer, **generation_options(arguments))
    scores = arguments.show_scores and record["scores"]
    print(f"({scores_line(record) if scores else who(record, pipe.bank)})")


class VisibleStreamer(TextStreamer):
    """Prints an answer while it is generated; whatever the terminal would act on is shown, not obeyed."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by `TextStreamer` with each piece of the answer."""
        print(visible(text), flush=True, end="\n" if stream_end else "")
