"""How often the dispatchers A (prompt) and B (classification expert) are right, and what they confuse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from adapting.setting import Setting
from adapting.trained_banks import BARE_LIST, classifier_dispatcher
from peft_svf import ExpertBank
from peft_svf.dispatch import Dispatcher, PromptDispatcher
from peft_svf.experts.bank import BASE_LABEL
from peft_svf.playground import BANK_FOLDER, generate_problems
from peft_svf.trainers.statistics import paired_difference_interval, wilson_interval


FAMILIES = ("math", "code", "reasoning", BASE_LABEL)
HARD = ("math-hard", "code-hard", "reasoning-hard")  # no expert was trained on these
MOST_OTHERS = 50  # there are few more distinct ones


@dataclass(frozen=True)
class Labelled:
    """Held-out prompts of one family and the label that they should get."""

    family: str
    prompts: list[str]

    @property
    def label(self) -> str:
        return self.family.removesuffix("-hard")


def measure(setting: Setting) -> Iterator[str]:
    """One table and the confusion matrices for each of two instructions."""
    bank = ExpertBank.from_pretrained(BANK_FOLDER)
    labelled = [Labelled(family, held_out(family, setting.test_prompts)) for family in (*FAMILIES, *HARD)]
    assert bank.instruction is not None  # of the embedded bank
    for instruction in (bank.instruction, BARE_LIST):
        yield compare(bank, instruction, labelled, setting)


def held_out(family: str, n: int) -> list[str]:
    n = min(n, MOST_OTHERS) if family == BASE_LABEL else n
    return [problem.prompt for problem in generate_problems(family, "test", n)]


def compare(bank: ExpertBank, instruction: str, labelled: Sequence[Labelled], setting: Setting) -> str:
    """Accuracy by family, for A and for B with every seed of training."""
    chosen = {"A": route_all(PromptDispatcher(bank, instruction=instruction), labelled)}
    same: list[str] = []
    for seed in range(setting.seeds):
        dispatcher = classifier_dispatcher(bank, instruction, seed, setting.work, setting.quick)
        name = f"B, seed {seed}"
        chosen[name] = route_all(dispatcher, labelled)
        if type(dispatcher) is PromptDispatcher:
            same.append(name)
    families = " | ".join(f"{one.family} ({len(one.prompts)})" for one in labelled)
    lines = [
        f"**Routing with the instruction {instruction!r}**, % of held-out prompts with Wilson's 95 % interval",
        "",
    ]
    lines += [f"| dispatcher | all | {families} |", "| --- " * (len(labelled) + 2) + "|"]
    for name, answers in chosen.items():
        hits = [[answer == one.label for answer in own] for one, own in zip(labelled, answers, strict=True)]
        cells = [share([hit for own in hits for hit in own]), *map(share, hits)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", verdict(chosen, labelled), ""]
    if same:
        lines += [f"{', '.join(same)}: no checkpoint was better than the base model, so B is A.", ""]
    for name in list(chosen)[:2]:
        lines += [
            f"{name}: rows are right labels, columns what was chosen",
            "",
            *confusion(chosen[name], labelled),
            "",
        ]
    return "\n".join(lines)


def route_all(dispatcher: Dispatcher, labelled: Sequence[Labelled]) -> list[list[str]]:
    """The choice for every prompt: names of experts, which in the playground are their labels."""
    return [dispatcher.route(one.prompts).chosen() for one in labelled]


def share(hits: Sequence[bool]) -> str:
    low, high = wilson_interval(sum(hits), len(hits))
    return f"{100 * sum(hits) / len(hits):.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def verdict(chosen: dict[str, list[list[str]]], labelled: Sequence[Labelled]) -> str:
    """B, averaged over seeds, against A on the same prompts. Goal: B is not worse."""
    hits = {
        name: [float(answer == one.label) for one, own in zip(labelled, answers, strict=True) for answer in own]
        for name, answers in chosen.items()
    }
    of_b = [own for name, own in hits.items() if name != "A"]
    mean = [sum(column) / len(of_b) for column in zip(*of_b, strict=True)]
    gain, low, high = paired_difference_interval(hits["A"], mean)
    goal = "met" if gain >= 0 else "missed" if high < 0 else "missed by less than the interval"
    return f"B − A: {100 * gain:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] points; goal ≥ 0: {goal}."


def confusion(chosen: Sequence[Sequence[str]], labelled: Sequence[Labelled]) -> list[str]:
    """A matrix of shares in %, a row for each family, as in Figure 6 of the paper."""
    lines = [f"| | {' | '.join(FAMILIES)} |", "| --- " * (len(FAMILIES) + 1) + "|"]
    for one, own in zip(labelled, chosen, strict=True):
        counts = Counter(own)
        lines.append(f"| {one.family} | {' | '.join(f'{100 * counts[name] / len(own):.1f}' for name in FAMILIES)} |")
    return lines
