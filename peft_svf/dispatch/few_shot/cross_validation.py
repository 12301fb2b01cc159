"""Cross-validation: which configuration of the mixture weights answers examples best that it was not adapted to."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from peft_svf.dispatch.few_shot.mixture_space import MixtureSpace
from peft_svf.dispatch.few_shot.optimizer import Fitness
from peft_svf.dispatch.few_shot.search import SearchResult


@dataclass(frozen=True)
class Fold:
    """
    One split of the examples.

    Args:
        number (`int`): 0 for the first.
        training (`tuple[int, ...]`): Indices of the examples to adapt to.
        held_out (`tuple[int, ...]`): Indices of the examples that judge; none of them is in `training`.
    """

    number: int
    training: tuple[int, ...]
    held_out: tuple[int, ...]


@dataclass(frozen=True)
class ConfigurationScore:
    """
    How well one configuration answers held-out examples.

    Args:
        space ([`MixtureSpace`]): The configuration.
        fitness ([`Fitness`]):
            Over all folds together: the share of all examples, each answered under the mixture that was found without
            it, and the mean log-likelihood of the right answers.
        folds (`tuple[Fitness, ...]`): On the held-out examples of each fold.
        found (`tuple[torch.Tensor, ...]`): The candidate that was found in each fold, `(D,)`.
    """

    space: MixtureSpace
    fitness: Fitness
    folds: tuple[Fitness, ...]
    found: tuple[Tensor, ...]

    def to_dict(self) -> dict[str, Any]:
        """Scores for a report, of JSON types; a log-likelihood without a right answer is `None`."""
        return {
            "configuration": self.space.name,
            "success": self.fitness.success,
            "log_likelihood": self.fitness.log_likelihood if math.isfinite(self.fitness.log_likelihood) else None,
            "folds": [fold.success for fold in self.folds],
        }


@dataclass(frozen=True)
class CrossValidation:
    """
    The configuration chosen, and the scores that it was chosen by.

    Args:
        chosen ([`MixtureSpace`]): The configuration to search once more, on all examples.
        scores (`tuple[ConfigurationScore, ...]`): Of all configurations, in the order given.
        folds (`tuple[Fold, ...]`): How the examples were split.
    """

    chosen: MixtureSpace
    scores: tuple[ConfigurationScore, ...]
    folds: tuple[Fold, ...]


Search: TypeAlias = Callable[[MixtureSpace, Fold], SearchResult]
"""Searches a space on `fold.training`; `f"{space.name}-fold-{fold.number}"` is a name for its folder."""

Judge: TypeAlias = Callable[[MixtureSpace, Tensor, Fold], Fitness]
"""The fitness of a candidate, `(D,)`, on `fold.held_out`."""


def split_folds(examples: int, folds: int = 5, seed: int = 0) -> tuple[Fold, ...]:
    """
    Split examples into folds that differ in size by one at most; each example is held out once.

    Args:
        examples (`int`): Number of examples.
        folds (`int`, *optional*, defaults to 5): Number of folds; with fewer examples each is a fold of its own.
        seed (`int`, *optional*, defaults to 0): Seed of the order in which they are split.

    Raises:
        ValueError: Fewer than two examples or folds.
    """
    if examples < 2 or folds < 2:
        raise ValueError(
            f"Cross-validation needs at least 2 examples and 2 folds, got {examples} and {folds}; with a single "
            "example choose the configuration yourself."
        )
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed)).tolist()
    parts = [sorted(order[start :: min(folds, examples)]) for start in range(min(folds, examples))]
    everything = range(examples)
    return tuple(
        Fold(number, tuple(index for index in everything if index not in part), tuple(part))
        for number, part in enumerate(parts)
    )


def cross_validate(
    configurations: Sequence[MixtureSpace],
    examples: int,
    search: Search,
    judge: Judge,
    folds: int = 5,
    seed: int = 0,
) -> CrossValidation:
    """
    Choose a configuration by k-fold cross-validation on the adaptation examples alone.

    The paper reports the best of its configurations (weights per layer or global, normalized or free) on the test
    data, which flatters it. Here each configuration is searched once for each fold and judged by the examples that
    were left out, so a choice costs as many searches as there are configurations times folds. The share of right
    answers decides; ties go to the simplest configuration: fewest numbers, then normalized. With 3 examples the shares
    are thirds: expect ties, and a choice that is little more than a guess.

    With several processes `search` and `judge` are called in all of them, in the same order.

    Args:
        configurations (`Sequence[MixtureSpace]`): E.g. `MixtureSpace.configurations(experts, groups)`.
        examples (`int`): Number of examples.
        search (`Callable[[MixtureSpace, Fold], SearchResult]`): Searches a configuration on the training examples.
        judge (`Callable[[MixtureSpace, Tensor, Fold], Fitness]`): Fitness of a candidate on the held-out examples.
        folds (`int`, *optional*, defaults to 5): Number of folds; more than `examples` is leave-one-out.
        seed (`int`, *optional*, defaults to 0): Seed of the split.

    Raises:
        ValueError: No configurations, or fewer than two examples or folds.
    """
    if not configurations:
        raise ValueError("Cross-validation needs at least one configuration.")
    splits = split_folds(examples, folds, seed)
    scores = tuple(_score(space, splits, search, judge) for space in configurations)
    best = max(score.fitness.success for score in scores)
    tied = [score.space for score in scores if score.fitness.success > best - 1e-9]  # shares are sums of floats
    return CrossValidation(min(tied, key=_complexity), scores, splits)


def _score(space: MixtureSpace, splits: Sequence[Fold], search: Search, judge: Judge) -> ConfigurationScore:
    found = tuple(search(space, fold).best for fold in splits)
    folds = tuple(judge(space, candidate, fold) for candidate, fold in zip(found, splits, strict=True))
    return ConfigurationScore(space, _pooled(folds, [len(fold.held_out) for fold in splits]), folds, found)


def _pooled(folds: Sequence[Fitness], sizes: Sequence[int]) -> Fitness:
    """The fitness on the examples of all folds together."""
    right = [fitness.success * size for fitness, size in zip(folds, sizes, strict=True)]
    if not sum(right):
        return Fitness(0.0)
    likelihood = sum(n * fitness.log_likelihood for n, fitness in zip(right, folds, strict=True) if n)
    return Fitness(min(1.0, sum(right) / sum(sizes)), likelihood / sum(right))


def _complexity(space: MixtureSpace) -> tuple[int, bool, bool]:
    return space.dimension, not space.normalized, space.residual
