"""CrossEntropyMethod: the optimizer of the paper, a normal distribution that is fitted to the best candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


class CrossEntropyMethod:
    """
    The cross-entropy method (Rubinstein and Kroese, 2004) as Transformer² uses it (arXiv 2501.06252, section 3.2).

    In every generation N candidates are drawn from a normal distribution with a diagonal covariance and clamped to
    the box, the first is replaced by the best so far, and mean and standard deviation become those of the elites, the
    best `int(elite_ratio * N)`:

        mean ← s · mean + (1 − s) · mean(elites)        std ← s · std + (1 − s) · std(elites),  s = smoothing

    with the unbiased standard deviation. The paper leaves these formulas open; they are those of its released code
    (SakanaAI/self-adaptive-llms, `optim_modules.CEM`). Two differences to that code:

    - The paper breaks ties between candidates by the log-likelihood of their right answers. The code does so only to
      choose the best candidate; which of equally successful candidates are elites is up to `np.argpartition`. With 10
      examples most are equally successful, so ours ranks the elites by likelihood too;
      `elites_by_likelihood=False` is the code's choice, earlier candidates first.
    - A generation in which all candidates are equal leaves the distribution as it is. Elites chosen at random from
      equals, as in the code, would shrink it towards no better place.

    Args:
        start ([`StartDistribution`]): Distribution of the first generation, and the box.
        population (`int`, *optional*, defaults to 32): N, candidates in a generation, the re-evaluated best included.
        elite_ratio (`float`, *optional*, defaults to 0.2): Share of them that the distribution is fitted to.
        smoothing (`float`, *optional*, defaults to 0.0): Share of the old mean and deviation that is kept, in [0, 1).
        seed (`int`, *optional*, defaults to 0): Seed of its own random generator.
        tolerance (`float`, *optional*, defaults to 0.01):
            Collapsed when no coordinate has a larger standard deviation; 0 for never.
        elites_by_likelihood (`bool`, *optional*, defaults to `True`): Whether likelihoods decide between elites.

    Raises:
        ValueError: Fewer than two elites, whose deviation is not defined, or more than candidates; a smoothing or
            tolerance out of range.
    """

    def __init__(
        self,
        start: StartDistribution,
        population: int = 32,
        elite_ratio: float = 0.2,
        smoothing: float = 0.0,
        seed: int = 0,
        tolerance: float = 0.01,
        elites_by_likelihood: bool = True,
    ) -> None:
        check_population(population, least=2)
        self.elites = int(elite_ratio * population + 1e-9)  # 0.29 · 100 is 28.999...
        if not 2 <= self.elites <= population:
            raise ValueError(
                f"elite_ratio={elite_ratio} of a population of {population} makes {self.elites} elites: at least 2 "
                f"and at most {population} are needed; take a larger population or another elite_ratio."
            )
        if not 0 <= smoothing < 1 or tolerance < 0:
            raise ValueError(f"smoothing must be in [0, 1) and tolerance >= 0, got {smoothing} and {tolerance}.")
        self.lower, self.upper = start.lower, start.upper
        self.mean, self.std = start.mean.double(), start.std.double()
        self.best = self.mean.clone()
        self.population, self.smoothing, self.tolerance = population, smoothing, tolerance
        self.elites_by_likelihood = elites_by_likelihood
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def converged(self) -> bool:
        """Whether no coordinate has a standard deviation of `tolerance` any more."""
        return float(self.std.max()) < self.tolerance

    def ask(self) -> Tensor:
        """Draw a generation, `(N, D)`; its first row is the best candidate so far."""
        shape = (self.population, len(self.mean))
        noise = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        candidates = (self.mean + self.std * noise).clamp(self.lower, self.upper)
        candidates[0] = self.best
        return candidates

    def tell(self, candidates: Tensor, fitness: Sequence[Fitness]) -> None:
        """Fit the distribution to the elites and remember the best candidate of this generation."""
        check_told(candidates, fitness, (self.population, len(self.mean)))
        self.best = candidates[ranking(fitness)[0]].clone()
        if all_equal(fitness):
            return
        elites = candidates[ranking(fitness, self.elites_by_likelihood)[: self.elites]]  # (E, D)
        self.mean = torch.lerp(elites.mean(0), self.mean, self.smoothing)
        self.std = torch.lerp(elites.std(0), self.std, self.smoothing)

    def state(self) -> OptimizerState:
        """Mean, deviation, best candidate and the state of the random generator."""
        return {"mean": self.mean, "std": self.std, "best": self.best, "generator": self._generator.get_state()}

    def load_state(self, state: Mapping[str, Tensor | int | float]) -> None:
        """Go on from `state`."""
        self.mean, self.std, self.best, generator = (
            torch.as_tensor(state[name]).clone() for name in ("mean", "std", "best", "generator")
        )
        self._generator.set_state(generator)
