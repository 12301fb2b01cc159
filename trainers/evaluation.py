"""Success of a model on a task: answers to every prompt, judged by the task's own reward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm

from peft_svf.answering import AnswerGenerator, Processes, Processor, Prompt, image_column, judge_answers
from peft_svf.dispatch import Dispatcher, Route
from peft_svf.dispatch.few_shot.examples import refuse_adaptation_examples
from peft_svf.experts import ExpertBank
from peft_svf.trainers.statistics import grouped_success_interval, paired_difference_interval
from peft_svf.trainers.tasks.task import Task


@dataclass(frozen=True)
class Evaluation:
    """
    Answers of one model and what the task's reward says about them, in the order of the prompts.

    Args:
        answers (`list[str]`): `samples` answers to the first prompt, then those to the second, and so on.
        rewards (`list[float | None]`): Reward of each answer; None for one that cannot be judged.
        reasons (`list[str]`): Why, in the reward's words; empty where it gives none.
        samples (`int`, *optional*, defaults to 1): Answers for each prompt.
        route ([`~peft_svf.dispatch.Route`], *optional*):
            Under a dispatcher, one row a prompt: the weights it was answered under, and the dispatcher's scores.
    """

    answers: list[str]
    rewards: list[float | None]
    reasons: list[str]
    samples: int = 1
    route: Route | None = field(default=None, compare=False)

    @property
    def experts(self) -> list[str] | None:
        """Under a dispatcher, what answered each prompt: an expert's name, `"others"` for the base, or `"mixture"`."""
        return None if self.route is None else self.route.names()

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return len(self.answers) // self.samples

    @property
    def successes(self) -> list[bool]:
        """Whether each answer earned a positive reward. One that cannot be judged counts as a failure."""
        return [reward is not None and reward > 0 for reward in self.rewards]

    @property
    def unjudged(self) -> int:
        """Number of answers that the reward could not judge."""
        return self.rewards.count(None)

    @property
    def success(self) -> float:
        """Share of successes, in [0, 1]."""
        return sum(self.successes) / len(self.rewards)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `success`; several answers to one prompt are not taken as independent."""
        _, low, high = grouped_success_interval(self._per_prompt())
        return low, high

    def gain_over(self, base: Evaluation) -> tuple[float, float, float]:
        """
        Mean difference to another model's success on the same prompts, with its 95 % interval: (mean, low, high).

        Raises:
            ValueError: If the prompts are not equally many, or fewer than two.
        """
        return paired_difference_interval(base.shares(), self.shares())

    def shares(self) -> list[float]:
        """Share of successful answers to each prompt."""
        return [sum(successes) / self.samples for successes in self._per_prompt()]

    def _per_prompt(self) -> list[list[bool]]:
        successes = self.successes
        return [successes[i : i + self.samples] for i in range(0, len(successes), self.samples)]

    @classmethod
    def interleaved(cls, parts: Sequence[Evaluation]) -> Evaluation:
        """One evaluation of those that K processes made of rows 0, K, 2K, ..., of rows 1, K + 1, ..., and so on."""
        samples = parts[0].samples

        def merge(columns: list[list[Any]]) -> list[Any]:
            blocks = [[column[i : i + samples] for i in range(0, len(column), samples)] for column in columns]
            turns = (blocks[j % len(blocks)][j // len(blocks)] for j in range(sum(map(len, blocks))))
            return [value for block in turns for value in block]

        return cls(
            answers=merge([part.answers for part in parts]),
            rewards=merge([part.rewards for part in parts]),
            reasons=merge([part.reasons for part in parts]),
            samples=samples,
        )


@torch.inference_mode()
def evaluate(
    model: Any,
    processing_class: Processor,
    task: Task,
    dataset: Dataset,
    batch_size: int = 128,
    *,
    dispatcher: Dispatcher | None = None,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    description: str | None = None,
    split_over_processes: bool = False,
) -> Evaluation:
    """
    Answer every row of `dataset` and judge the answers.

    Chats are rendered by the chat template, and without one as the text that
    [`~peft_svf.answering.plain_prompt`] gives; a text is taken as it is. Sampling options that the model was
    saved with (`top_p`, `repetition_penalty`, ...) are not used. A batch that does not fit into memory is halved. The
    order of the answers is that of the rows, however they are batched.

    Args:
        model (`PreTrainedModel`, `PeftModel` or `ExpertBank`):
            The model, under the adapter to be judged; with a `dispatcher`, the bank of its experts. Not sharded.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            Its tokenizer, or its processor, which rows with a column `image` or `images` need.
        task ([`Task`]): Gives the reward and the number of new tokens.
        dataset (`Dataset`): Rows as `task.load` returns them.
        batch_size (`int`, *optional*, defaults to 128): Answers generated at once.
        dispatcher ([`~peft_svf.dispatch.Dispatcher`], *optional*):
            Routes each batch, whose rows are then answered at once, each under its own weights. One that was adapted
            on some of the rows is refused.
        temperature (`float`, *optional*, defaults to 0.0): 0 is greedy; above it, sampling from the whole vocabulary.
        samples (`int`, *optional*, defaults to 1): Answers for each prompt; several need a `temperature`.
        seed (`int`, *optional*, defaults to 0): Seed of the sampling. Samples also depend on `batch_size`.
        chat_template_kwargs (`Mapping`, *optional*): For the chat template, e.g. `{"enable_thinking": False}`.
        description (`str`, *optional*): Text of the progress bar; no bar without it.
        split_over_processes (`bool`, *optional*, defaults to `False`):
            Under `accelerate launch`, share the batches and their judging between the processes, which must all make
            this call. Each gets the whole result, the one that a single process computes.

    Returns:
        [`Evaluation`]

    Raises:
        ValueError: If there are no rows, if `batch_size`, `temperature` and `samples` do not fit, if the dispatcher
            was adapted on some of the rows, or if it comes without a bank.
    """
    _check_arguments(dataset, batch_size, temperature, samples)
    bank = _check_dispatcher(model, dispatcher, dataset)
    generator = AnswerGenerator(
        model if bank is None else bank.model,
        processing_class,
        task.max_new_tokens,
        temperature,
        dict(chat_template_kwargs or {}),
        bank,
    )
    processes = Processes.launched() if split_over_processes else Processes()
    run = _Run(generator, dataset, dispatcher, samples, seed, processes)
    answers, route = run.answer(batch_size, description)
    return replace(_judge(task, dataset, answers, batch_size, processes), route=route)


@dataclass
class _Run:
    """One evaluation up to its answers; processes share its batches."""

    generator: AnswerGenerator
    dataset: Dataset
    dispatcher: Dispatcher | None
    samples: int
    seed: int
    processes: Processes

    def __post_init__(self) -> None:
        self.prompts: list[Prompt] = list(self.dataset["prompt"])
        self.texts = [self.generator.render(prompt) for prompt in self.prompts]
        self.images = image_column(self.dataset.column_names)

    def answer(self, batch_size: int, description: str | None) -> tuple[list[list[str]], Route | None]:
        """The answers to each prompt, and the routes that the prompts took."""
        order = sorted(range(len(self.texts)), key=lambda i: -len(self.texts[i][0]))  # similar lengths, longest first
        jobs = [row for row in order for _ in range(self.samples)]
        batches = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
        own = self.processes.own(list(enumerate(batches)))
        found: list[tuple[int, list[int], list[str], Route | None]] = []
        total = sum(len(rows) for _, rows in own)
        with self.generator.ready(self.seed), tqdm(
            total=total, desc=description, disable=not description, leave=False
        ) as bar:  # fmt: skip
            for number, rows in own:
                torch.manual_seed(self.seed + number)  # whichever process has the batch
                found.append((number, rows, *self._answer_batch(rows)))
                bar.update(len(rows))
        found = sorted(self.processes.gather(found), key=lambda batch: batch[0])
        answers: list[list[str]] = [[] for _ in self.texts]
        answered = [(row, text) for _, rows, texts, _ in found for row, text in zip(rows, texts, strict=True)]
        for row, text in answered:
            answers[row].append(text)
        routes = [route for *_, route in found if route is not None]
        if not routes:
            return answers, None
        position = {row: place for place, (row, _) in enumerate(answered)}
        return answers, Route.concatenate(routes)[[position[row] for row in range(len(answers))]]

    def _answer_batch(self, rows: list[int]) -> tuple[list[str], Route | None]:
        route = self._route(rows)
        pictures = None if self.images is None else [self.dataset[row][self.images] for row in rows]
        texts = self.generator.answers([self.texts[i] for i in rows], [self.prompts[i] for i in rows], pictures, route)
        return texts, route

    def _route(self, rows: list[int]) -> Route | None:
        """The dispatcher is asked about each prompt of a batch once, however many samples it has there."""
        if self.dispatcher is None:
            return None
        asked = list(dict.fromkeys(rows))
        # What a dispatcher caches must serve it outside of this evaluation, too
        with torch.inference_mode(False), torch.no_grad():
            route = self.dispatcher.route([self.prompts[row] for row in asked])
        if len(route) != len(asked):
            raise ValueError(f"The dispatcher was given {len(asked)} prompts and routed {len(route)}.")
        return route[[asked.index(row) for row in rows]]


def _judge(
    task: Task, dataset: Dataset, answers: list[list[str]], batch_size: int, processes: Processes
) -> Evaluation:
    """What the reward says; each process judges the answers to every `count`-th row."""
    own = range(processes.index, len(dataset), processes.count)
    samples = len(answers[0])
    part = Evaluation([], [], [], samples)
    if len(own):
        chosen = [answers[row] for row in own]
        rows = dataset if processes.count == 1 else dataset.select(own)
        rewards, reasons = judge_answers(task.reward, rows, chosen, batch_size)
        part = Evaluation([text for of_prompt in chosen for text in of_prompt], rewards, reasons, samples)
    return Evaluation.interleaved(processes.gather([part]))


def evaluate_success(
    model: Any,
    tokenizer: Processor,
    task: Task,
    dataset: Dataset,
    batch_size: int = 128,
    description: str | None = None,
) -> list[bool]:
    """Whether the model's greedy answer to each row of `dataset` earns a positive reward: see [`evaluate`].

    Returns:
        `list[bool]`: One entry a row, in order. An answer that cannot be judged counts as a failure.
    """
    return evaluate(model, tokenizer, task, dataset, batch_size, description=description).successes


@torch.inference_mode()
def greedy_answers(model: Any, tokenizer: Processor, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
    """Greedy answers to one batch of texts or chats, without images."""
    generator = AnswerGenerator(model, tokenizer, max_new_tokens, 0.0, {})
    with generator.ready(seed=0):
        return generator.answers([generator.render(prompt) for prompt in prompts], prompts)


def _check_arguments(dataset: Dataset, batch_size: int, temperature: float, samples: int) -> None:
    if len(dataset) == 0:
        raise ValueError("The dataset is empty: pass rows to evaluate on.")
    if batch_size < 1 or samples < 1:
        raise ValueError(f"`batch_size` and `samples` are at least 1, not {batch_size} and {samples}.")
    if temperature < 0 or not math.isfinite(temperature):
        raise ValueError(f"`temperature` is 0 (greedy) or positive, not {temperature}.")
    if samples > 1 and temperature == 0:
        raise ValueError(f"Greedy answers to one prompt are all the same: set a `temperature` for {samples} samples.")


def _check_dispatcher(model: Any, dispatcher: Dispatcher | None, dataset: Dataset) -> ExpertBank | None:
    """The bank, if that is the model; raises if bank, dispatcher and rows do not belong together."""
    bank = model if isinstance(model, ExpertBank) else None
    if dispatcher is None:
        if bank is not None:
            raise ValueError(
                "A bank is evaluated under a `dispatcher`: pass one, or `bank.model` within `bank.routed(expert)`."
            )
        return None
    if bank is None:
        raise ValueError("A `dispatcher` routes to the experts of a bank: pass the `ExpertBank` as the model.")
    refuse_adaptation_examples(dataset, getattr(dispatcher, "example_hashes", ()), "The dispatcher")
    return bank
