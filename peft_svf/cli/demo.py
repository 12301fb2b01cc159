"""`peft-svf demo`: the whole path on the playground, from rollouts to a pipeline that picks its own expert."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers.utils import logging

from peft_svf.cli.demo_cards import write_cards
from peft_svf.cli.generate import who
from peft_svf.cli.playground_experts import BASE_FOLDER, TrainingReport, assemble_bank, train_expert
from peft_svf.cli.results import format_gain
from peft_svf.cli.terminal import indented, table, with_interval
from peft_svf.experts import BASE_LABEL, ExpertBank
from peft_svf.experts.bank_config import check_replaceable
from peft_svf.pipelines import Transformer2Pipeline
from peft_svf.playground import BANK_FOLDER, generate_problems
from peft_svf.playground.families import FAMILIES
from peft_svf.trainers.evaluation import evaluate_success
from peft_svf.trainers.sandbox import check_isolation
from peft_svf.trainers.statistics import paired_difference_interval, wilson_interval
from peft_svf.trainers.tasks.playground import PLAYGROUND_TASKS


@dataclass(frozen=True)
class FamilyResult:
    """Success of base and expert on the same held-out prompts of one family."""

    base: list[bool]
    expert: list[bool]
    training: TrainingReport


def run_demo(output: Path, steps: int, seed: int, test_prompts: int) -> None:
    """Train, evaluate and answer; prints everything it finds and writes the bank to `output`.

    Raises:
        ExpertBankError: `output` holds something that is not a bank. Nothing was trained.
        IsolationError: This machine cannot isolate the programs that the code expert writes. Nothing was trained.
    """
    check_replaceable(output)
    check_isolation()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # of loading and saving weights: milliseconds here
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL's and transformers' own, nothing a user can mend
    started = time.perf_counter()
    embedded = ExpertBank.from_pretrained(BANK_FOLDER)
    size = sum(p.numel() for name, p in embedded.model.named_parameters() if "svf_" not in name)
    print(
        f"The base model has {size} parameters. Training {len(FAMILIES)} experts of it, {steps} steps each.",
        flush=True,
    )
    with TemporaryDirectory() as folder:
        reports = train_experts(Path(folder), steps, seed)
        bank = assemble_bank(Path(folder), embedded.experts, embedded.instruction)
        results = {family: evaluate_family(bank, family, test_prompts, reports[family]) for family in FAMILIES}
        bank.save_pretrained(output, include_base=True)
    write_cards(output, results, steps, seed)
    print_answers(bank)
    print_results(results)
    print(f"\n{time.perf_counter() - started:.0f} s in all. The bank is in {output}:")
    print(f'  import peft_svf; from transformers import pipeline; pipeline("transformer2-generation", "{output}")')


def train_experts(folder: Path, steps: int, seed: int, base: Path = BASE_FOLDER) -> dict[str, TrainingReport]:
    """Train one expert a family into sub-folders of `folder`."""
    reports = {}
    for family in FAMILIES:
        report = train_expert(PLAYGROUND_TASKS[family], folder / family, steps, seed, base)
        reports[family] = report
        print(
            f"{family:9}  {steps} steps, {report.parameters} parameters, {report.seconds:.0f} s; greedy validation "
            f"reward {report.base_validation_reward:+.2f} -> {report.validation_reward:+.2f}",
            flush=True,
        )
    return reports


def evaluate_family(bank: ExpertBank, family: str, n: int, training: TrainingReport) -> FamilyResult:
    """Greedy answers of base and expert to `n` held-out prompts."""
    task = PLAYGROUND_TASKS[family]
    dataset = task.load("test", n)
    with bank.base_only() as model:
        base = evaluate_success(model, bank.tokenizer, task, dataset, description=f"{family}: base")
    bank.model.set_adapter(family)
    expert = evaluate_success(bank.model, bank.tokenizer, task, dataset, description=f"{family}: expert")
    return FamilyResult(base, expert, training)


def mixed_prompts() -> list[str]:
    """Held-out prompts of every family, all with an occasion for the family's slip, and one that no expert is for."""
    drawn = [[p.prompt for p in generate_problems(family, "test", 20, seed=1) if p.has_slip] for family in FAMILIES]
    prompts = [prompts[i] for i in range(2) for prompts in drawn]
    return [
        "Tom has 23 apples and buys 18 more. How many apples does Tom have?",
        *prompts,
        "Tell me a story about a king.",
    ]


def print_answers(bank: ExpertBank) -> None:
    """Answer the mixed prompts in one batch, each routed by the first pass, and again with the base model alone."""
    prompts = mixed_prompts()
    pipe = Transformer2Pipeline(bank)
    settings = {"batch_size": len(prompts), "max_new_tokens": 30}
    print(
        "\nTransformer2Pipeline on mixed prompts: chosen expert, its score, its answer; below, the base model's answer"
    )
    for prompt, (routed,), (base,) in zip(
        prompts, pipe(prompts, **settings), pipe(prompts, expert=BASE_LABEL, **settings), strict=True
    ):
        print(f"\n  {prompt}")
        print(indented(f"    {who(routed, bank)}", routed["generated_text"], 20))
        if routed["expert"] != BASE_LABEL:
            print(indented("    base", base["generated_text"], 20))


def print_results(results: dict[str, FamilyResult]) -> None:
    """Base against expert on the same held-out prompts, greedy decoding."""
    print("\nGreedy success on held-out prompts [95 % interval]")
    rows = [("family", "n", "base", "expert", "gain in points", "parameters", "seconds")]
    for family, result in results.items():
        rows.append(
            (
                family,
                str(len(result.base)),
                format_share(result.base),
                format_share(result.expert),
                format_gain(paired_difference_interval(result.base, result.expert)),
                str(result.training.parameters),
                f"{result.training.seconds:.0f}",
            )
        )
    print(table(rows))


def format_share(successes: Sequence[bool]) -> str:
    """`"47.3 % [41.7, 53.0]"`."""
    right, n = sum(successes), len(successes)
    return with_interval(right / n, *wilson_interval(right, n))
