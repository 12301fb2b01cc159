"""Optimizer: what proposes candidates and learns from their fitness, and the fitness that it maximizes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor


OptimizerState: TypeAlias = dict[str, Tensor | int | float]


@dataclass(frozen=True, order=True)
class Fitness:
    """
    How good a candidate is, compared lexicographically: of two that answer equally many examples right, the better is
    the one that is surer of its right answers (Transformer², arXiv 2501.06252, section 3.2, "few-shot adaptation").

    Args:
        success (`float`): Share of right answers, in [0, 1].
        log_likelihood (`float`, *optional*, defaults to `-inf`):
            Mean log-likelihood of the candidate's own right answers, in nats; `-inf` if it has none.

    Raises:
        ValueError: A share outside [0, 1], or a log-likelihood that is no number or infinitely good.
    """

    success: float
    log_likelihood: float = -math.inf

    def __post_init__(self) -> None:
        if not 0 <= self.success <= 1:  # NaN too
            raise ValueError(f"Fitness: the share of right answers must be in [0, 1], got {self.success}.")
        if math.isnan(self.log_likelihood) or self.log_likelihood == math.inf:
            raise ValueError(
                f"Fitness: the log-likelihood must be finite, or -inf without a right answer, got "
                f"{self.log_likelihood}; does the model compute NaN under one of the mixtures?"
            )


@dataclass(frozen=True)
class StartDistribution:
    """
    The normal distribution with a diagonal covariance that a search starts from, and the box it stays in.

    Args:
        mean (`torch.Tensor` of shape `(D,)`, float64): Also the first candidate.
        std (`torch.Tensor` of shape `(D,)`, float64): Standard deviation of each coordinate.
        lower (`float`): Smallest value of every coordinate.
        upper (`float`): Largest value of every coordinate.

    Raises:
        ValueError: Shapes that do not fit, a mean outside the box, or a standard deviation that is not positive.
    """

    mean: Tensor
    std: Tensor
    lower: float
    upper: float

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or not len(self.mean) or self.mean.shape != self.std.shape:
            raise ValueError(
                f"StartDistribution: mean and std must be vectors of one length, got shapes {tuple(self.mean.shape)} "
                f"and {tuple(self.std.shape)}."
            )
        if not bool(((self.mean >= self.lower) & (self.mean <= self.upper)).all()):
            raise ValueError(f"StartDistribution: the mean must lie in [{self.lower}, {self.upper}].")
        if not bool((self.std > 0).all()) or not bool(torch.isfinite(self.std).all()):
            raise ValueError("StartDistribution: every standard deviation must be positive and finite.")


class Optimizer(Protocol):
    """
    What maximizes the fitness of candidates, vectors of D coordinates.

    The first row of what `ask` returns is the best candidate of the generation before (at first the mean of the start
    distribution): it is evaluated again with every generation, so that a lucky score under a noisy fitness does not
    last. The same seed and the same fitness give the same candidates; no global random state is read or changed.
    """

    @property
    def converged(self) -> bool:
        """Whether the distribution has collapsed: new candidates would hardly differ from one another."""
        ...

    def ask(self) -> Tensor:
        """Candidates to evaluate: rows of a float64 CPU tensor of shape `(N, D)`."""
        ...

    def tell(self, candidates: Tensor, fitness: Sequence[Fitness]) -> None:
        """Learn the fitness of the N candidates that `ask` has returned; all but the first may be replaced."""
        ...

    def state(self) -> OptimizerState:
        """All that `load_state` needs to go on as if there had been no interruption."""
        ...

    def load_state(self, state: Mapping[str, Tensor | int | float]) -> None:
        """Go on from what `state` returned, in an optimizer that was made with the same arguments."""
        ...


def ranking(fitness: Sequence[Fitness], by_likelihood: bool = True) -> list[int]:
    """
    Indices of the candidates from the best to the worst; of equals the earlier comes first.

    Args:
        fitness (`Sequence[Fitness]`): Fitness of N candidates.
        by_likelihood (`bool`, *optional*, defaults to `True`): Whether the log-likelihood breaks ties.
    """
    keys = [(one.success, one.log_likelihood if by_likelihood else 0.0) for one in fitness]
    return sorted(range(len(keys)), key=keys.__getitem__, reverse=True)  # stable, also in reverse


def all_equal(fitness: Sequence[Fitness]) -> bool:
    """Whether no candidate is better than another: such a generation says nothing about where to search."""
    return all(one == fitness[0] for one in fitness)


def check_told(candidates: Tensor, fitness: Sequence[Fitness], expected: tuple[int, int]) -> None:
    """
    Check what an optimizer is told.

    Raises:
        ValueError: Not as many candidates or fitness values as were asked for.
    """
    if tuple(candidates.shape) != expected or len(fitness) != expected[0]:
        raise ValueError(
            f"tell() needs the candidates that ask() returned, of shape {expected}, and a fitness for each; got shape "
            f"{tuple(candidates.shape)} and {len(fitness)} fitness values."
        )


def check_population(population: int, least: int) -> None:
    """Raise a `ValueError` if the population is smaller than an optimizer can work with."""
    if population < least:
        raise ValueError(f"A population of {population} is too small: take at least {least} candidates a generation.")
