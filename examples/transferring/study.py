"""One target of the study: every expert and control in one bank, answered in mixed batches, cell by cell."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from peft_svf.answering import AnswerGenerator
from peft_svf.dispatch import Route
from peft_svf.dispatch.few_shot import FewShotDispatcher, MixtureSpace, SearchSettings
from peft_svf.dispatch.few_shot.population import Population
from peft_svf.experts import BASE_LABEL, ExpertBank, ExpertEntry
from peft_svf.experts.transfer import transfer
from peft_svf.playground import BANK_FOLDER
from peft_svf.trainers.tasks import Task
from peft_svf.trainers.tasks.playground import PLAYGROUND_TASKS
from transferring.cells import Cell, Cells
from transferring.setting import Setting, Target
from transferring.trained_experts import own_expert, source_expert


BASE, ORDERED, OWN = "base model", "ordered", "the target's own expert"
CONTROLS = ("shuffled", "reversed", "random")
FEW_SHOT = "few-shot over transferred experts"
FEW_SHOT_SHUFFLED = "few-shot over shuffled experts"
FEW_SHOT_OWN = "few-shot over the target's own experts"
FEW_SHOT_BOTH = "few-shot over both models' experts"
METHODS = (BASE, ORDERED, *CONTROLS, FEW_SHOT, FEW_SHOT_SHUFFLED, OWN, FEW_SHOT_OWN, FEW_SHOT_BOTH)
BATCH_SIZE = 640  # answers at once
OWN_SEED = 0


@dataclass(frozen=True)
class Candidate:
    """An expert in the bank: how it was made, and which cell it fills."""

    family: str
    method: str
    seed: int
    draw: int = 0

    @property
    def name(self) -> str:
        """Of its adapter."""
        return f"{self.family}_{METHODS.index(self.method)}_{self.seed}_{self.draw}"


def candidates_of(setting: Setting) -> list[Candidate]:
    """All experts of a target's bank."""
    found = []
    for family in setting.families:
        for seed in range(setting.seeds):
            found += [Candidate(family, ORDERED, seed), Candidate(family, "reversed", seed)]
            found += [Candidate(family, c, seed, d) for c in ("shuffled", "random") for d in range(setting.draws)]
        if setting.own_steps:
            found.append(Candidate(family, OWN, OWN_SEED))
    return found


def tasks_of(setting: Setting) -> list[Task]:
    """The trained tasks, then their harder variants."""
    return [PLAYGROUND_TASKS[f"{family}{ending}"] for ending in ("", "-hard") for family in setting.families]


def study_target(setting: Setting, target: Target, cells: Cells) -> None:
    """Measure what is missing of one target, and say what took how long."""
    started = time.perf_counter()
    bank = make_bank(setting, target, report=not cells.of(target=target.name))
    print(f"  {len(bank.experts)} experts in the bank after {time.perf_counter() - started:.0f} s", flush=True)
    for task in tasks_of(setting):
        rows = task.load("test", setting.test_prompts)
        for cell in [*single_experts(setting, target, bank, task, rows, cells)]:
            cells.add(cell)
        if setting.examples and task.name.endswith("-hard"):
            for cell in few_shot(setting, target, bank, task, rows, cells):
                cells.add(cell)
        spent = sum(cell.seconds for cell in cells.of(target=target.name, task=task.name))
        print(f"  {task.name}: {spent:.0f} s for its cells", flush=True)
    print(f"  {time.perf_counter() - started:.0f} s for {target.name}", flush=True)


def make_bank(setting: Setting, target: Target, report: bool) -> ExpertBank:
    """The target with everything that was transferred to it, and its own experts."""
    model: Any = AutoModelForCausalLM.from_pretrained(target.folder).eval()
    source_model = AutoModelForCausalLM.from_pretrained(BANK_FOLDER / "base")
    for candidate in candidates_of(setting):
        if candidate.method == OWN:
            expert = own_expert(setting, target, candidate.family, candidate.seed)
        else:
            control: Any = None if candidate.method == ORDERED else candidate.method
            made = transfer(
                source_expert(setting, candidate.family, candidate.seed),
                model,
                control=control,
                seed=1000 * candidate.seed + candidate.draw,
                source_model=source_model if report else None,
            )
            expert = made.expert
            if report:  # the same for all experts: they adapt the same matrices
                print("\n".join(f"  {line}" for line in made.report.to_text().splitlines()[-3:]))
                report = False
        model = expert.put_into(model, candidate.name)
    return ExpertBank(model, AutoTokenizer.from_pretrained(target.folder))


def population(bank: ExpertBank, task: Task, rows: Dataset) -> Population:
    """What answers `rows` under many routes in one batch, greedily, and judges equal answers once."""
    generator = AnswerGenerator(bank.model, bank.tokenizer, task.max_new_tokens, 0.0, {}, bank)
    return Population(generator, rows, task.reward, BATCH_SIZE)


def single_experts(
    setting: Setting, target: Target, bank: ExpertBank, task: Task, rows: Dataset, cells: Cells
) -> Iterator[Cell]:
    """Base model, transferred experts, controls and own expert of the task's family, all in the same batches."""
    wanted = [Candidate(task.label, BASE, 0), *(c for c in candidates_of(setting) if c.family == task.label)]
    missing = [c for c in wanted if (target.name, task.name, c.method, c.seed, c.draw) not in cells]
    if not missing:
        return
    started = time.perf_counter()
    names = [BASE_LABEL if candidate.method == BASE else candidate.name for candidate in missing]
    right = population(bank, task, rows).outcomes(Route.one_hot(names, list(bank.experts))).right  # (N, prompts)
    seconds = (time.perf_counter() - started) / len(missing)
    for candidate, row in zip(missing, right.int().tolist(), strict=True):
        yield Cell(
            target.name, task.name, candidate.method, candidate.seed, candidate.draw, tuple(row), round(seconds, 3)
        )


def few_shot(
    setting: Setting, target: Target, bank: ExpertBank, task: Task, rows: Dataset, cells: Cells
) -> Iterator[Cell]:
    """A mixture of transferred experts that ten examples choose; of both models' experts, as the paper's last row."""
    own = [Candidate(family, OWN, OWN_SEED) for family in setting.families] if setting.own_steps else []
    for seed in range(setting.seeds):
        ordered = [Candidate(family, ORDERED, seed) for family in setting.families]
        shuffled = [Candidate(family, "shuffled", seed) for family in setting.families]
        groups = {FEW_SHOT: ordered, FEW_SHOT_SHUFFLED: shuffled}
        if own:
            groups |= {FEW_SHOT_OWN: own, FEW_SHOT_BOTH: [*ordered, *own]}
        for method, mixed in groups.items():
            if (target.name, task.name, method, seed, 0) in cells:
                continue
            started = time.perf_counter()
            part = ExpertBank(bank.model, bank.tokenizer, {c.name: ExpertEntry(c.name) for c in mixed})
            route, details = search(setting, part, task, seed)
            (right,) = population(part, task, rows).outcomes(route).right.int().tolist()
            seconds = round(time.perf_counter() - started, 3)
            yield Cell(target.name, task.name, method, seed, 0, tuple(right), seconds, details)


def search(setting: Setting, bank: ExpertBank, task: Task, seed: int) -> tuple[Route, dict[str, Any]]:
    """
    Free weights, of which the base model keeps the rest, so that it and every expert alone are candidates, too.

    The paper mixes experts of which each helps; of transferred ones none may, and normalized weights would have to
    take one. The examples are validation prompts, drawn anew with every seed.
    """
    settings = SearchSettings.paper(
        examples=setting.examples,
        iterations=setting.iterations,
        population=setting.population,
        elite_ratio=max(0.2, 2.0 / setting.population),
        seed=seed,
        include_experts=True,
    )
    dispatcher = FewShotDispatcher(
        bank,
        task.load("validation", setting.examples, seed),
        task=task,
        settings=settings,
        configurations=[MixtureSpace(tuple(bank.experts), normalized=False, residual=True)],
        batch_size=BATCH_SIZE,
    )
    found = dispatcher.adapt(progress=False)
    details = {
        "weights": {name: round(weight, 4) for name, weight in found.search.route().row_weights()[0].items()},
        "right_on_examples": found.fitness.success,
        "base_on_examples": found.references[BASE_LABEL].success,
        "generations": len(found.search.history),
    }
    return found.search.route(), details


def check_targets(targets: Sequence[Target]) -> None:
    """Raise a `ValueError` for a folder without a checkpoint, before hours have passed."""
    for target in targets:
        if not (target.folder / "config.json").is_file() or not any(target.folder.glob("*.safetensors")):
            raise ValueError(f"{target.folder} holds no checkpoint: examples/tiny_lab/pretrain.py makes one")
    if twice := [one.folder.name for one in targets if [t.name for t in targets].count(one.name) > 1]:
        raise ValueError(f"--to names {twice[0]} twice")


def quiet() -> None:
    """Nothing of the libraries' own between the results; one thread, as small models gain nothing from more."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
