"""Success on tasks that no expert was trained for, and on the trained ones: Tables 1, 2, 8 and 10 in miniature.

Every trained bank answers the same test prompts; intervals are bootstrapped over banks and prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from datasets import Dataset

from adapting.setting import Setting
from adapting.trained_banks import BARE_LIST, classifier_dispatcher, trained_bank
from peft_svf import ExpertBank
from peft_svf.answering import AnswerGenerator
from peft_svf.dispatch import Dispatcher, FixedDispatcher, PromptDispatcher
from peft_svf.dispatch.few_shot.dispatcher import FewShotDispatcher
from peft_svf.dispatch.few_shot.mixture_space import MixtureSpace
from peft_svf.dispatch.few_shot.search_settings import SearchSettings
from peft_svf.experts.bank import BASE_LABEL
from peft_svf.trainers.evaluation import evaluate
from peft_svf.trainers.statistics import bootstrap_interval
from peft_svf.trainers.tasks import Task
from peft_svf.trainers.tasks.playground import PLAYGROUND_TASKS


UNSEEN = ("math-hard", "code-hard", "reasoning-hard")
TRAINED = ("math", "code", "reasoning")
SHOTS = (3, 5, 10, 20)
LIGHT = "C, 3 examples, light"
REFERENCE = "C, 10 examples"  # its examples also choose the single expert
RESULTS = {
    "base": "base model",
    "examples": "single expert, best on the 10 examples",
    "oracle": "single expert, best on the test prompts (no method: it has seen them)",
}


@dataclass
class Cell:
    """One method on one task: a row of verdicts for each seed."""

    successes: list[list[float]] = field(default_factory=list)

    def __str__(self) -> str:
        center, low, high = bootstrap_interval(self.successes)
        return f"{100 * center:.1f} [{100 * low:.1f}, {100 * high:.1f}]"

    @property
    def mean(self) -> float:
        return mean(map(mean, self.successes))


@dataclass(frozen=True)
class Search:
    """What one few-shot search cost and found."""

    task: str
    method: str
    seed: int
    seconds: float
    answers: int
    generations: int
    configuration: str
    weights: dict[str, float]
    on_examples: float


@dataclass
class Findings:
    """All of one task."""

    task: Task
    cells: dict[str, Cell] = field(default_factory=dict)
    searches: list[Search] = field(default_factory=list)

    def add(self, method: str, successes: Sequence[float]) -> None:
        self.cells.setdefault(method, Cell()).successes.append(list(successes))


def measure(setting: Setting) -> Iterator[str]:
    """A table of the unseen tasks after each of them, then those of the searches, then the trained families."""
    findings: list[Findings] = []
    for name in UNSEEN[:1] if setting.quick else UNSEEN:
        findings.append(measure_task(PLAYGROUND_TASKS[name], setting, few_shot=True))
        yield f"**{name}**, done: " + ", ".join(f"{method} {cell}" for method, cell in findings[-1].cells.items())
    yield table("Unseen tasks", findings)
    yield searches(findings)
    if not setting.quick:
        trained = [measure_task(PLAYGROUND_TASKS[name], setting, few_shot=False) for name in TRAINED]
        yield table("The trained tasks, for reference", trained)


def measure_task(task: Task, setting: Setting, few_shot: bool) -> Findings:
    found = Findings(task)
    test = task.load("test", setting.test_prompts)
    for seed in range(setting.seeds):
        bank = trained_bank(seed, setting.work)
        single = {name: answer(bank, task, test, FixedDispatcher(bank, name)) for name in (BASE_LABEL, *bank.experts)}
        found.add(RESULTS["base"], single.pop(BASE_LABEL))
        if few_shot:
            chosen = adapt_all(bank, task, test, seed, setting, found)
            found.add(RESULTS["examples"], single[chosen])
        found.add(RESULTS["oracle"], max(single.values(), key=mean))
        for name, successes in single.items():
            found.add(f"expert {name}", successes)
        for name, dispatcher in dispatchers(bank, seed, setting):
            found.add(name, answer(bank, task, test, dispatcher))
    return found


def dispatchers(bank: ExpertBank, seed: int, setting: Setting) -> Iterator[tuple[str, Dispatcher]]:
    assert bank.instruction is not None
    yield "A, the bank's instruction", PromptDispatcher(bank)
    yield "A, a bare list of labels", PromptDispatcher(bank, instruction=BARE_LIST)
    yield "B, a bare list of labels", classifier_dispatcher(bank, BARE_LIST, seed, setting.work, setting.quick)


def answer(bank: ExpertBank, task: Task, test: Dataset, dispatcher: Dispatcher) -> list[float]:
    return [float(success) for success in evaluate(bank, bank.tokenizer, task, test, dispatcher=dispatcher).successes]


def adapt_all(bank: ExpertBank, task: Task, test: Dataset, seed: int, setting: Setting, found: Findings) -> str:
    """Strategy C with every number of examples; returns the single expert that is best on the reference examples."""
    examples = task.load("validation", max(SHOTS), seed)  # no prompt of the test split, whatever its wording
    best = ""
    for method, shots, settings in searches_of(seed, setting.quick):
        dispatcher = few_shot_dispatcher(bank, task, examples.select(range(shots)), settings, setting)
        with counted_answers() as count:
            start = setting.clock()
            adaptation = dispatcher.adapt(progress=False)
            seconds = setting.clock() - start
        found.add(method, answer(bank, task, test, dispatcher))
        found.searches.append(
            Search(
                task.name.removeprefix("playground-"),
                method,
                seed,
                seconds,
                count[0],
                len(adaptation.search.history),
                adaptation.search.space.name,
                adaptation.search.route().row_weights()[0],
                adaptation.fitness.success,
            )
        )
        if method == REFERENCE or not best:
            best = max(bank.experts, key=lambda name: adaptation.references[name])
    return best


def searches_of(seed: int, quick: bool) -> Iterator[tuple[str, int, SearchSettings]]:
    """The name of each search, the number of its examples, and its settings."""
    if quick:
        yield LIGHT, 3, SearchSettings.light(iterations=1, population=4, elite_ratio=0.5, seed=seed)
        return
    yield LIGHT, 3, SearchSettings.light(seed=seed)
    for shots in SHOTS:
        yield f"C, {shots} examples", shots, SearchSettings.paper(examples=shots, seed=seed)


def few_shot_dispatcher(
    bank: ExpertBank, task: Task, examples: Dataset, settings: SearchSettings, setting: Setting
) -> FewShotDispatcher:
    """Global, normalized weights, decided upon beforehand; or cross-validation among the paper's configurations."""
    fixed = [MixtureSpace(tuple(bank.experts))]
    return FewShotDispatcher(
        bank,
        examples,
        task=task,
        settings=settings,
        configurations=None if setting.cross_validation else fixed,
        batch_size=640,
    )


@contextmanager
def counted_answers() -> Iterator[list[int]]:
    """Within: counts the answers that are generated with their likelihoods, as a search does."""
    count, original = [0], AnswerGenerator.scored_answers

    def counting(self: AnswerGenerator, texts: Any, *arguments: Any, **options: Any) -> Any:
        count[0] += len(texts)
        return original(self, texts, *arguments, **options)

    AnswerGenerator.scored_answers = counting  # type: ignore[method-assign]
    try:
        yield count
    finally:
        AnswerGenerator.scored_answers = original  # type: ignore[method-assign]


def table(title: str, findings: Sequence[Findings]) -> str:
    """Methods by tasks, with the winner of each task among those that have not seen the test prompts."""
    names = [one.task.name.removeprefix("playground-") for one in findings]
    successes = findings[0].cells[RESULTS["base"]].successes
    lines = [
        f"**{title}**: greedy success in %, mean over {len(successes)} banks on the same {len(successes[0])} test "
        "prompts of each task [95 % interval over banks and prompts]",
        "",
        f"| method | {' | '.join(names)} |",
        "| --- " * (len(names) + 1) + "|",
    ]
    order = [*RESULTS.values(), *(name for name in findings[0].cells if name not in RESULTS.values())]
    for method in order:
        if method in findings[0].cells:
            lines.append(f"| {method} | {' | '.join(str(one.cells[method]) for one in findings)} |")
    return "\n".join([*lines, "", *(f"{name}: {winner(one)}." for name, one in zip(names, findings, strict=True)), ""])


def winner(found: Findings) -> str:
    """Who is best in the mean, of what can be done without the test prompts."""
    methods = {
        name: cell
        for name, cell in found.cells.items()
        if name != RESULTS["oracle"] and not name.startswith("expert ")
    }
    best = max(cell.mean for cell in methods.values())
    return f"best in the mean, with {100 * best:.1f} %: " + ", ".join(
        name for name, cell in methods.items() if cell.mean == best
    )


def searches(findings: Sequence[Findings]) -> str:
    """What few-shot adaptation cost and found, as the mean over seeds (Figure 7 and Table 10 in numbers)."""
    experts = list(TRAINED)
    lines = [
        "**Few-shot searches**, means over seeds; weights in % are means over layers where they differ",
        "",
        f"| task | method | {' | '.join(experts)} | right on its examples, % | generations | answers | seconds "
        "| configurations |",
        "| --- " * (len(experts) + 7) + "|",
    ]
    for one in findings:
        for method in dict.fromkeys(search.method for search in one.searches):
            own = [search for search in one.searches if search.method == method]
            weights = [f"{100 * mean(search.weights.get(name, 0.0) for search in own):.0f}" for name in experts]
            numbers = [
                f"{100 * mean(search.on_examples for search in own):.0f}",
                *(
                    f"{mean(getattr(search, key) for search in own):.0f}"
                    for key in ("generations", "answers", "seconds")
                ),
            ]
            chosen = ", ".join(dict.fromkeys(search.configuration for search in own))
            lines.append(f"| {own[0].task} | {method} | {' | '.join([*weights, *numbers])} | {chosen} |")
    return "\n".join([*lines, ""])
