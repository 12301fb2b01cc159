"""Success of a model on a task: answers to every prompt, judged by the task's own reward."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm

from peft_svf.answering import AnswerGenerator, Processor, Prompt, judge_answers
from peft_svf.trainers.statistics import grouped_success_interval, paired_difference_interval
from peft_svf.trainers.tasks.task import Task


IMAGE_COLUMNS = ("image", "images")


@dataclass(frozen=True)
class Evaluation:
    """
    Answers of one model and what the task's reward says about them, in the order of the prompts.

    Args:
        answers (`list[str]`): `samples` answers to the first prompt, then those to the second, and so on.
        rewards (`list[float | None]`): Reward of each answer; None for one that cannot be judged.
        reasons (`list[str]`): Why, in the reward's words; empty where it gives none.
        samples (`int`, *optional*, defaults to 1): Answers for each prompt.
    """

    answers: list[str]
    rewards: list[float | None]
    reasons: list[str]
    samples: int = 1

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
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    description: str | None = None,
) -> Evaluation:
    """
    Answer every row of `dataset` and judge the answers.

    Chats are rendered by the chat template, and without one as the text that
    [`~peft_svf.answering.plain_prompt`] gives; a text is taken as it is. Sampling options that the model was
    saved with (`top_p`, `repetition_penalty`, ...) are not used. A batch that does not fit into memory is halved. The
    order of the answers is that of the rows, however they are batched.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model, under the adapter to be judged. Not sharded.
        processing_class (`PreTrainedTokenizerBase` or `ProcessorMixin`):
            Its tokenizer, or its processor, which rows with a column `image` or `images` need.
        task ([`Task`]): Gives the reward and the number of new tokens.
        dataset (`Dataset`): Rows as `task.load` returns them.
        batch_size (`int`, *optional*, defaults to 128): Answers generated at once.
        temperature (`float`, *optional*, defaults to 0.0): 0 is greedy; above it, sampling from the whole vocabulary.
        samples (`int`, *optional*, defaults to 1): Answers for each prompt; several need a `temperature`.
        seed (`int`, *optional*, defaults to 0): Seed of the sampling. Samples also depend on `batch_size`.
        chat_template_kwargs (`Mapping`, *optional*): For the chat template, e.g. `{"enable_thinking": False}`.
        description (`str`, *optional*): Text of the progress bar; no bar without it.

    Returns:
        [`Evaluation`]

    Raises:
        ValueError: If there are no rows, or `batch_size`, `temperature` and `samples` do not fit.
    """
    _check_arguments(dataset, batch_size, temperature, samples)
    generator = AnswerGenerator(
        model, processing_class, task.max_new_tokens, temperature, dict(chat_template_kwargs or {})
    )
    prompts = dataset["prompt"]
    texts = [generator.render(prompt) for prompt in prompts]
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i][0]))  # similar lengths together, the longest first
    jobs = [row for row in order for _ in range(samples)]
    answers: list[list[str]] = [[] for _ in texts]
    images = next((name for name in IMAGE_COLUMNS if name in dataset.column_names), None)
    with generator.ready(seed), tqdm(total=len(jobs), desc=description, disable=not description, leave=False) as bar:
        for start in range(0, len(jobs), batch_size):
            rows = jobs[start : start + batch_size]
            pictures = None if images is None else [dataset[row][images] for row in rows]
            batch = generator.answers([texts[i] for i in rows], [prompts[i] for i in rows], pictures)
            for row, answer in zip(rows, batch, strict=True):
                answers[row].append(answer)
            bar.update(len(rows))
    rewards, reasons = judge_answers(task.reward, dataset, answers, batch_size)
    return Evaluation([text for of_prompt in answers for text in of_prompt], rewards, reasons, samples)


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
