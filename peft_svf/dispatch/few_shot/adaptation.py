"""Adaptation: what a few-shot search has found, and how, in numbers and in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from peft_svf.dispatch.few_shot.cross_validation import CrossValidation
from peft_svf.dispatch.few_shot.optimizer import Fitness
from peft_svf.dispatch.few_shot.search import SearchResult


@dataclass(frozen=True)
class Adaptation:
    """
    What [`FewShotDispatcher.adapt`] has found.

    Args:
        search ([`SearchResult`]): Of the search on all examples.
        cross_validation ([`CrossValidation`], *optional*): How its configuration was chosen, if there were several.
        references (`dict[str, Fitness]`): Base model (`"others"`) and single experts on the same examples.
    """

    search: SearchResult
    cross_validation: CrossValidation | None
    references: dict[str, Fitness]

    @property
    def fitness(self) -> Fitness:
        """On the examples that the mixture was chosen by: too good as an estimate for other prompts."""
        return self.search.fitness

    @property
    def adapted(self) -> bool:
        """Whether there was anything to adapt to: some candidate has answered some example right."""
        return any(generation.best_fitness.success > 0 for generation in self.search.history)

    @property
    def weights(self) -> dict[str, float] | dict[str, dict[str, float]]:
        """Mixture weights by expert; for weights in groups, those by group."""
        route = self.search.route()
        by_group = route.weights[0].reshape(-1, len(route.experts)).tolist()  # (G or 1, K)
        mixtures = [dict(zip(route.experts, row, strict=True)) for row in by_group]
        return dict(zip(route.groups, mixtures, strict=True)) if route.groups else mixtures[0]

    @property
    def statement(self) -> str:
        """How the configuration was chosen, and what the fitness is worth, in plain words."""
        if not self.adapted:
            return (
                "No candidate answered any of the examples right, so nothing was adapted: the mixture is the one that "
                "the search started from. Check `max_new_tokens`, the reward and the prompts, or bring easier "
                "examples."
            )
        if self.cross_validation is None:
            chosen = f"The configuration '{self.search.space.name}' was given, not chosen."
        else:
            validation = self.cross_validation
            chosen = (
                f"The configuration '{validation.chosen.name}' was chosen among {len(validation.scores)} by "
                f"{len(validation.folds)}-fold cross-validation on the examples alone; ties go to the simplest. The "
                "paper picks its best configuration on test data; ours used no other data."
            )
        return (
            f"{chosen} The fitness is that on the examples which the mixture was searched on, so it is too good as an "
            "estimate for other prompts."
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it but the candidates, of JSON types; a log-likelihood without a right answer is `None`."""
        route, validation = self.search.route(), self.cross_validation
        return {
            "statement": self.statement,
            "adapted": self.adapted,
            "configuration": self.search.space.name,
            "weights": self.weights,
            "experts": list(route.experts),
            "groups": list(route.groups),
            "residual": route.residual,
            "fitness": _fitness(self.fitness),
            "references": {name: _fitness(fitness) for name, fitness in self.references.items()},
            "stopped": self.search.stopped.value,
            "generations": [_fitness(generation.best_fitness) for generation in self.search.history],
            "cross_validation": None
            if validation is None
            else {
                "folds": len(validation.folds),
                "chosen": validation.chosen.name,
                "scores": [score.to_dict() for score in validation.scores],
            },
        }


def _fitness(fitness: Fitness) -> dict[str, float | None]:
    likelihood = fitness.log_likelihood
    return {"success": fitness.success, "log_likelihood": likelihood if math.isfinite(likelihood) else None}
