"""One generation of few-shot search in one mixed batch, beside recomposing the weights once for each candidate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from report import Report, Row
from timing import Spread, ratios, time_rounds

from adapting.random_bank import QUICK_SHAPE, SHAPE, describe, prompts, random_bank
from adapting.setting import Setting
from peft_svf import ExpertBank
from peft_svf.answering import AnswerGenerator, judge_answers
from peft_svf.dispatch import Route
from peft_svf.dispatch.few_shot.mixture_space import MixtureSpace
from peft_svf.dispatch.few_shot.optimizer import Fitness
from peft_svf.dispatch.few_shot.population import Outcomes, Population
from peft_svf.dispatch.few_shot.search_settings import SearchSettings
from peft_svf.playground import BANK_FOLDER
from peft_svf.trainers.tasks.playground import PLAYGROUND_TASKS


EXAMPLES = 10
TIMES_FASTER = 6.0
MOST_ROUNDS = 2  # the slow ways take a minute
PLAYGROUND_TASK = "math-hard"
RANDOM_EXPERTS = ("math", "code", "reasoning")
RANDOM_ANSWER = 24  # tokens
WHY_MISSED = "ten rows keep this processor busy already, and merged weights spare every token the singular basis"
NAME = "candidate"  # of the adapter that is composed anew


@dataclass(frozen=True)
class Contest:
    """What the candidates of one generation answer."""

    name: str
    bank: ExpertBank
    examples: Dataset
    reward: Callable[..., list[float | None]]
    max_new_tokens: int
    candidates: Route

    def generator(self) -> AnswerGenerator:
        return AnswerGenerator(self.bank.model, self.bank.tokenizer, self.max_new_tokens, 0.0, {}, self.bank)

    def in_one_batch(self) -> list[Fitness]:
        rows = len(self.candidates) * len(self.examples)
        return Population(self.generator(), self.examples, self.reward, rows).outcomes(self.candidates).fitness()

    def one_by_one(self, merge: bool) -> list[Fitness]:
        """Each candidate's mixture becomes an adapter, or is merged into the weights; then it answers all examples."""
        generator = self.generator()
        fitness: list[Fitness] = []
        asked = list(self.examples["prompt"])
        texts = [generator.render(prompt) for prompt in asked]
        for weights in self.candidates.weights.tolist():
            with composed(self.bank.model, self.candidates, weights, merge), generator.ready(seed=0):
                found = generator.scored_answers(texts, asked)
            answers = [answer.text for answer in found]
            rewards, _ = judge_answers(self.reward, self.examples, [[text] for text in answers], len(asked))
            right = [reward is not None and reward > 0 for reward in rewards]
            likelihoods = torch.tensor([[answer.log_likelihood for answer in found]], dtype=torch.float64)
            fitness += Outcomes([answers], torch.tensor([right]), likelihoods).fitness()
        return fitness


@contextmanager
def composed(model: Any, route: Route, weights: list[float], merge: bool) -> Iterator[None]:
    """Within: `model` computes under one mixture, as PEFT's own methods make it."""
    before = model.active_adapter
    model.add_weighted_adapter(list(route.experts), weights, NAME, residual=route.residual)
    try:
        model.set_adapter(NAME)
        if merge:
            model.merge_adapter([NAME])
        yield
    finally:
        if merge:
            model.unmerge_adapter()
        model.set_adapter(before)
        model.delete_adapter(NAME)


def measure(setting: Setting) -> Iterator[str]:
    """On the playground, whose matrices are small, and on the random Llama."""
    yield compare(playground(setting.quick), setting)
    yield compare(random_llama(setting.quick), setting)


def compare(contest: Contest, setting: Setting) -> str:
    """All three ways in the same rounds, as a table.

    Raises:
        RuntimeError: The scores are not the same.
    """
    found: dict[str, list[Fitness]] = {}
    candidates = {
        "batch": lambda: found.update(batch=contest.in_one_batch()),
        "merged": lambda: found.update(merged=contest.one_by_one(merge=True)),
        "adapter": lambda: found.update(adapter=contest.one_by_one(merge=False)),
    }
    seconds = time_rounds(candidates, min(setting.rounds, MOST_ROUNDS), setting.clock, warm_up=False)
    for way in ("merged", "adapter"):
        check_same(contest.name, found["batch"], found[way])
    slower = ratios(seconds, "batch")
    scores = {one.success for one in found["batch"]}
    note = f"the same scores ({min(scores):.1f} to {max(scores):.1f})"
    spent = f"the batch takes {Spread.of(seconds['batch']).median:.3g} s"
    ways = (
        ("merged", "merging each mixture into the weights", spent),
        ("adapter", "an adapter of each mixture", note),
    )
    rows = [
        Row(f"{what}, × of one mixed batch", contest.name, {"SVF": slower[way]}, None, WHY_MISSED, words, TIMES_FASTER)
        for way, what, words in ways
    ]
    return Report(setting.environment, rows, columns=("SVF",)).markdown()


def check_same(name: str, one: list[Fitness], other: list[Fitness]) -> None:
    """Raise unless both give every candidate the same success, and nearly the same log-likelihood."""
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        near = a.log_likelihood == b.log_likelihood or math.isclose(a.log_likelihood, b.log_likelihood, abs_tol=1e-2)
        if a.success != b.success or not near:
            raise RuntimeError(f"{name}: candidate {index} scores {a} in a mixed batch and {b} on its own.")


def first_generation(bank: ExpertBank, quick: bool) -> Route:
    """The candidates that a search with the paper's settings begins with: global, normalized weights."""
    space = MixtureSpace(tuple(bank.experts))
    population = 4 if quick else SearchSettings.paper().population
    settings = SearchSettings.paper(population=population, elite_ratio=0.5 if quick else 0.2)
    return space.to_route(settings.make_optimizer(space.start).ask())


def playground(quick: bool) -> Contest:
    bank = ExpertBank.from_pretrained(BANK_FOLDER)
    task = PLAYGROUND_TASKS[PLAYGROUND_TASK]
    candidates = first_generation(bank, quick)
    examples = task.load("validation", 2 if quick else EXAMPLES)
    name = f"playground, {len(candidates)} candidates, {len(examples)} examples of {task.name}"
    return Contest(name, bank, examples, task.reward, task.max_new_tokens, candidates)


def random_llama(quick: bool) -> Contest:
    """Answers without meaning; those of an even number of characters count as right."""
    bank = random_bank(RANDOM_EXPERTS, quick)
    candidates = first_generation(bank, quick)
    examples = Dataset.from_dict({"prompt": prompts(2 if quick else EXAMPLES)})
    answer = 4 if quick else RANDOM_ANSWER
    shape = describe(QUICK_SHAPE if quick else SHAPE)
    name = f"{shape}; {len(candidates)} candidates, {len(examples)} examples, answers of {answer} tokens"
    return Contest(name, bank, examples, even_length, answer, candidates)


def even_length(completions: list[str], **kwargs: Any) -> list[float | None]:
    """+1 for a text of an even number of characters, −1 for any other."""
    return [1.0 if len(text) % 2 == 0 else -1.0 for text in completions]
