"""SearchSettings: how a few-shot search runs, with the paper's preset and a light one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from peft_svf.dispatch.few_shot.covariance_adaptation import CovarianceMatrixAdaptation
from peft_svf.dispatch.few_shot.cross_entropy import CrossEntropyMethod
from peft_svf.dispatch.few_shot.optimizer import Optimizer, StartDistribution


@dataclass(frozen=True)
class SearchSettings:
    """
    How a [`MixtureSearch`] runs. The defaults are those of the paper (arXiv 2501.06252, section 3.2; population, elite
    ratio, smoothing and the re-evaluated best as in the released code's `cfgs/optimization/cem.yaml`), which does not
    stop early.

    Args:
        examples (`int`, *optional*, defaults to 10): Examples to adapt to, for whoever draws them.
        iterations (`int`, *optional*, defaults to 100): Generations at most.
        population (`int`, *optional*, defaults to 32): Candidates in a generation.
        optimizer (`str`, *optional*, defaults to `"cross_entropy"`): Or `"covariance_adaptation"`, which is CMA-ES.
        elite_ratio (`float`, *optional*, defaults to 0.2): Of the cross-entropy method.
        smoothing (`float`, *optional*, defaults to 0.0): Of the cross-entropy method.
        elites_by_likelihood (`bool`, *optional*, defaults to `True`): Of the cross-entropy method.
        seed (`int`, *optional*, defaults to 0): Seed of the candidates.
        collapse_tolerance (`float`, *optional*, defaults to 0.01):
            Stop when no weight has a larger standard deviation in the distribution; 0 for never.
        patience (`int`, *optional*, defaults to 5):
            Stop when for so many generations all candidates were equally good, or when the best has been right on
            everything for so many and no surer; 0 for never.
        likelihood_tolerance (`float`, *optional*, defaults to 1e-3):
            The least gain of the log-likelihood, in nats, that counts as surer.
        include_experts (`bool`, *optional*, defaults to `False`):
            Let every expert alone, and the base model where the weights can be it, be candidates of the first
            generation, in place of drawn ones. As the best is kept, what is found is then at least as good on the
            examples as the best expert. Not in the paper.

    Raises:
        ValueError: A number out of range, or an unknown optimizer.
    """

    examples: int = 10
    iterations: int = 100
    population: int = 32
    optimizer: Literal["cross_entropy", "covariance_adaptation"] = "cross_entropy"
    elite_ratio: float = 0.2
    smoothing: float = 0.0
    elites_by_likelihood: bool = True
    seed: int = 0
    collapse_tolerance: float = 0.01
    patience: int = 5
    likelihood_tolerance: float = 1e-3
    include_experts: bool = False

    def __post_init__(self) -> None:
        for name, least in (("examples", 1), ("iterations", 1), ("population", 2), ("seed", 0), ("patience", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"SearchSettings: {name} must be a whole number of at least {least}, got {value!r}.")
        for name in ("collapse_tolerance", "likelihood_tolerance"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"SearchSettings: {name} must not be negative, got {getattr(self, name)!r}.")
        if self.optimizer not in ("cross_entropy", "covariance_adaptation"):
            raise ValueError(
                f"SearchSettings: unknown optimizer {self.optimizer!r}: choose 'cross_entropy' or "
                "'covariance_adaptation'."
            )

    @classmethod
    def paper(cls, **overrides: Any) -> SearchSettings:
        """10 examples, up to 100 generations of 32 candidates, a fifth of them elites."""
        return cls(**{"examples": 10, "iterations": 100, "population": 32, "elite_ratio": 0.2, **overrides})

    @classmethod
    def light(cls, **overrides: Any) -> SearchSettings:
        """3 examples and 10 generations, 3 % of the paper's cost (its Table 10)."""
        return cls(**{"examples": 3, "iterations": 10, **overrides})

    def make_optimizer(self, start: StartDistribution) -> Optimizer:
        """
        A new optimizer with these settings.

        Raises:
            ValueError: A population or elite ratio that it cannot work with.
            ImportError: `"covariance_adaptation"` without the library cmaes.
        """
        if self.optimizer == "covariance_adaptation":
            return CovarianceMatrixAdaptation(start, self.population, self.seed, self.collapse_tolerance)
        return CrossEntropyMethod(
            start,
            self.population,
            self.elite_ratio,
            self.smoothing,
            self.seed,
            self.collapse_tolerance,
            self.elites_by_likelihood,
        )
