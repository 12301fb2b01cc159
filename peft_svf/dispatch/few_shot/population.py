"""Fitness of many mixtures on the same examples, in batched generation: each row of a batch under its own mixture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from peft_svf.answering import AnswerGenerator, Processes, ScoredAnswer, image_column, judge_answers
from peft_svf.dispatch.few_shot.optimizer import Fitness
from peft_svf.dispatch.route import Route


@dataclass(frozen=True)
class Outcomes:
    """
    What N candidates answered to M examples.

    Args:
        answers (`list[list[str]]`): N lists of M answers.
        right (`torch.Tensor` of shape `(N, M)`, bool): Whether the reward of an answer is positive.
        log_likelihoods (`torch.Tensor` of shape `(N, M)`, float64): Of each answer under its own candidate.
    """

    answers: list[list[str]]
    right: Tensor
    log_likelihoods: Tensor

    def fitness(self) -> list[Fitness]:
        """
        Share of right answers, and the mean log-likelihood of the candidate's own right answers, which breaks ties.

        As in Transformer² (arXiv 2501.06252, section 3.2). The log-likelihood of an answer is the sum over its tokens;
        -inf for a candidate without a right answer.
        """
        count = self.right.sum(1)  # (N,)
        total = torch.where(self.right, self.log_likelihoods, 0.0).sum(1)
        mean = torch.where(count > 0, total / count.clamp(min=1), -torch.inf)
        shares = [right / self.right.shape[1] for right in count.tolist()]
        return [Fitness(share, own) for share, own in zip(shares, mean.tolist(), strict=True)]


class Population:
    """
    Lets candidates answer the examples. All of them at once are N × M rows, cut into even batches.

    Under `accelerate launch` the batches are dealt out to the processes, which must all make the same calls, and each
    gets all outcomes: bit for bit those of a single process. Equal candidates, of which clamping to the corners makes
    some in every generation, answer once. Answers are judged once: a reward is expected to say the same of the same
    answer whenever it is asked.

    Args:
        generator ([`AnswerGenerator`]): With the bank of the candidates' experts.
        examples (`Dataset`): M rows with `prompt` and the columns that the reward needs.
        reward (`Callable`): A reward function in TRL's signature; an answer is right if its reward is positive.
        batch_size (`int`, *optional*, defaults to 256):
            Answers generated at once, at most. A batch that does not fit is halved, and the next population starts
            with halves.
    """

    def __init__(
        self,
        generator: AnswerGenerator,
        examples: Dataset,
        reward: Callable[..., list[float | None]],
        batch_size: int = 256,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"`batch_size` is at least 1, not {batch_size}.")
        self.generator, self.examples, self.reward, self.batch_size = generator, examples, reward, batch_size
        self.processes = Processes.launched()
        self.prompts: list[Any] = list(examples["prompt"])
        self.texts = [generator.render(prompt) for prompt in self.prompts]
        column = image_column(examples.column_names)
        self.images = None if column is None else list(examples[column])
        self._verdicts: dict[tuple[int, str], bool] = {}

    def outcomes(self, candidates: Route, rows: Sequence[int] | None = None) -> Outcomes:
        """
        Let every candidate answer every example, greedily.

        Args:
            candidates ([`Route`]): N rows, one for each candidate.
            rows (`Sequence[int]`, *optional*): Only these M of the examples, in this order.
        """
        rows = range(len(self.prompts)) if rows is None else rows
        longest_first = sorted(range(len(rows)), key=lambda i: -len(self.texts[rows[i]][0]))
        # The candidates' rows of one example lie together: equally long, so nothing is padded
        first = _first_equals(candidates)
        jobs = [(candidate, i) for i in longest_first for candidate in dict.fromkeys(first)]
        found = dict(zip(jobs, self._answer(candidates, [(candidate, rows[i]) for candidate, i in jobs]), strict=True))
        given = [[found[candidate, i] for i in range(len(rows))] for candidate in first]
        answers = [[answer.text for answer in own] for own in given]
        likelihoods = torch.tensor([[answer.log_likelihood for answer in own] for own in given], dtype=torch.float64)
        verdicts = self._judge({(row, own[i]) for own in answers for i, row in enumerate(rows)})
        right = [[verdicts[row, own[i]] for i, row in enumerate(rows)] for own in answers]
        return Outcomes(answers, torch.tensor(right), likelihoods)

    @torch.no_grad()
    def _answer(self, candidates: Route, jobs: list[tuple[int, int]]) -> list[ScoredAnswer]:
        """The answer of each (candidate, row); every process makes its share of the batches."""
        count = math.ceil(len(jobs) / self.batch_size)
        bounds = [len(jobs) * number // count for number in range(count + 1)]  # a small last batch takes as many steps
        batches = [jobs[start:end] for start, end in itertools.pairwise(bounds)]
        with self.generator.ready(seed=0):
            own = [
                (number, self._answer_batch(candidates, batch))
                for number, batch in self.processes.own(list(enumerate(batches)))
            ]
        too_large = min(filter(None, self.processes.gather([self.generator.too_large])), default=None)
        if too_large is not None:
            self.batch_size = min(self.batch_size, max(1, too_large // 2))
        return [answer for _, batch in sorted(self.processes.gather(own)) for answer in batch]

    def _answer_batch(self, candidates: Route, batch: list[tuple[int, int]]) -> list[ScoredAnswer]:
        rows = [row for _, row in batch]
        return self.generator.scored_answers(
            [self.texts[row] for row in rows],
            [self.prompts[row] for row in rows],
            None if self.images is None else [self.images[row] for row in rows],
            candidates[[candidate for candidate, _ in batch]],
        )

    def _judge(self, asked: set[tuple[int, str]]) -> dict[tuple[int, str], bool]:
        """Whether each (row, answer) is right. Candidates often agree, so most answers have been judged before."""
        new = sorted(asked - self._verdicts.keys())
        own = self.processes.own(new)
        verdicts: list[bool] = []
        if own:
            rows = self.examples.select([row for row, _ in own])
            rewards, _ = judge_answers(self.reward, rows, [[answer] for _, answer in own], self.batch_size)
            verdicts = [reward is not None and reward > 0 for reward in rewards]
        self._verdicts.update(self.processes.gather(list(zip(own, verdicts, strict=True))))
        return self._verdicts


def _first_equals(candidates: Route) -> list[int]:
    """For each candidate the first that has the same weights."""
    first: dict[tuple[float, ...], int] = {}
    return [first.setdefault(tuple(row), index) for index, row in enumerate(candidates.weights.flatten(1).tolist())]
