"""CovarianceMatrixAdaptation: CMA-ES of the library `cmaes` behind the interface of our optimizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_svf.dispatch.few_shot.optimizer import (
    Fitness,
    OptimizerState,
    StartDistribution,
    all_equal,
    check_population,
    check_told,
    ranking,
)


class CovarianceMatrixAdaptation:
    """
    CMA-ES (Hansen, arXiv 1604.00772), which also learns how the weights depend on one another.

    Not in the paper: an alternative to the cross-entropy method, from the library
    [cmaes](https://pypi.org/project/cmaes), `pip install "peft-svf[cma]"`. It sees only the ranking of the candidates,
    ties broken by log-likelihood. It keeps a D × D covariance matrix, so it suits global weights better than weights
    for each of hundreds of matrices.

    The state is what the library was told so far, which is told again on resuming: nothing of its inside is needed.

    Args:
        start ([`StartDistribution`]): Distribution of the first generation, and the box that samples are clamped to.
        population (`int`, *optional*, defaults to 32): Candidates in a generation, the re-evaluated best included.
        seed (`int`, *optional*, defaults to 0): Seed of its random numbers.
        tolerance (`float`, *optional*, defaults to 0.01):
            Collapsed when no coordinate of the candidates has a larger standard deviation; 0 for never.

    Raises:
        ImportError: The library is not installed.
        ValueError: Fewer than 5 candidates, or a negative tolerance.
    """

    def __init__(self, start: StartDistribution, population: int = 32, seed: int = 0, tolerance: float = 0.01) -> None:
        check_population(population, least=5)  # CMA-ES itself sees one fewer, and 4 is its least
        if tolerance < 0:
            raise ValueError(f"tolerance must be >= 0, got {tolerance}.")
        self.lower, self.upper = start.lower, start.upper
        self.population, self.seed, self.tolerance = population, seed, tolerance
        self.best = start.mean.double().clone()
        self.generation = 0
        self._told: list[tuple[Tensor, Tensor]] = []  # for each generation, the samples (N - 1, D) and their ranks
        self._library = _make(start, population - 1)

    @property
    def converged(self) -> bool:
        """Whether no coordinate of the last candidates has a standard deviation of `tolerance` any more."""
        return bool(self._told) and float(self._told[-1][0].std(0).max()) < self.tolerance

    def ask(self) -> Tensor:
        """Draw a generation, `(N, D)`; its first row is the best candidate so far."""
        # a seed of its own for each generation: there is no random state to store
        self._library.reseed_rng((self.seed * 1_000_003 + self.generation) % 2**32)
        samples = [torch.from_numpy(self._library.ask()) for _ in range(self.population - 1)]
        return torch.stack([self.best, *samples]).clamp(self.lower, self.upper)

    def tell(self, candidates: Tensor, fitness: Sequence[Fitness]) -> None:
        """Let CMA-ES learn the ranking of its samples, and remember the best candidate of this generation."""
        check_told(candidates, fitness, (self.population, len(self.best)))
        self.best = candidates[ranking(fitness)[0]].clone()
        self.generation += 1
        if not all_equal(fitness[1:]):
            self._learn(candidates[1:].clone(), _dense_ranks(fitness[1:]))

    def _learn(self, samples: Tensor, ranks: Tensor) -> None:
        self._told.append((samples, ranks))
        self._library.tell(list(zip(samples.numpy().copy(), ranks.tolist(), strict=True)))

    def state(self) -> OptimizerState:
        """All generations that CMA-ES was told, the best candidate, and the number of generations."""
        state: OptimizerState = {"generation": self.generation, "best": self.best}
        if self._told:
            state["samples"] = torch.stack([samples for samples, _ in self._told])  # (generations, N - 1, D)
            state["ranks"] = torch.stack([ranks for _, ranks in self._told])  # (generations, N - 1)
        return state

    def load_state(self, state: Mapping[str, Tensor | int | float]) -> None:
        """Tell CMA-ES again what it was told, in an optimizer that has learned nothing yet."""
        if self.generation:
            raise ValueError("load_state() needs a new optimizer, this one has learned something already.")
        if "samples" in state:
            samples, ranks = torch.as_tensor(state["samples"]), torch.as_tensor(state["ranks"])
            for one, its_ranks in zip(samples, ranks, strict=True):
                self._learn(one.clone(), its_ranks.clone())
        self.generation = int(state["generation"])
        self.best = torch.as_tensor(state["best"]).clone()


def _make(start: StartDistribution, population: int) -> Any:
    try:
        from cmaes import CMA
    except ImportError as error:
        raise ImportError(
            'CMA-ES needs the library cmaes: pip install "peft-svf[cma]", or search by the cross-entropy method.'
        ) from error
    sigma = float(start.std.double().mean())
    covariance = torch.diag((start.std.double() / sigma) ** 2)
    # no bounds here: the library resamples what lies outside, which hardly ever succeeds in many dimensions
    return CMA(
        mean=start.mean.double().numpy().copy(),
        sigma=sigma,
        cov=covariance.numpy().copy(),
        population_size=population,
    )


def _dense_ranks(fitness: Sequence[Fitness]) -> Tensor:
    """0 for the best, 1 for the second best value, and so on, as the library minimizes; `(N,)`, float64."""
    values = sorted(set(fitness), reverse=True)
    return torch.tensor([values.index(one) for one in fitness], dtype=torch.float64)
