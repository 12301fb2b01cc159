"""Cross-validation: what was adapted to never judges, the held-out share decides, ties go to the simplest."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peft_svf.dispatch.few_shot.cross_validation import Fold, cross_validate, split_folds
from peft_svf.dispatch.few_shot.mixture_space import MixtureSpace
from peft_svf.dispatch.few_shot.optimizer import Fitness
from peft_svf.dispatch.few_shot.search import MixtureSearch, SearchResult, StopReason
from peft_svf.dispatch.few_shot.search_settings import SearchSettings


CONFIGURATIONS = MixtureSpace.configurations(("math", "code"), ("model.layers.0", "model.layers.1"))


def found(space: MixtureSpace, fold: Fold) -> SearchResult:
    return SearchResult(space, space.start.mean + fold.number, Fitness(1.0), (), StopReason.ITERATIONS)


@pytest.mark.parametrize("examples, folds, sizes", [(3, 5, [1, 1, 1]), (10, 5, [2] * 5), (11, 4, [2, 3, 3, 3])])
def test_each_example_is_held_out_once_and_never_adapted_to_then(examples: int, folds: int, sizes: list[int]):
    splits = split_folds(examples, folds, seed=1)
    assert sorted(len(fold.held_out) for fold in splits) == sizes
    assert sorted(index for fold in splits for index in fold.held_out) == list(range(examples))
    for fold in splits:
        assert sorted(fold.training + fold.held_out) == list(range(examples))
    assert splits == split_folds(examples, folds, seed=1)
    assert [fold.number for fold in splits] == list(range(len(splits)))


def test_examples_are_shuffled_by_their_own_seed():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    splits = {split_folds(20, 4, seed) for seed in range(4)}
    assert len(splits) == 4
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "shares, chosen",
    [
        ([0, 0, 0, 0], "global-normalized"),
        ([1 / 3, 2 / 3, 2 / 3, 2 / 3], "global-free"),
        ([1 / 3, 2 / 3, 1, 1], "grouped-normalized"),
        ([0, 0, 2 / 3, 1], "grouped-free"),
        ([1, 0, 1, 1], "global-normalized"),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_the_share_decides_and_ties_go_to_the_simplest(shares: list[float], chosen: str, order: int):
    share = dict(zip((space.name for space in CONFIGURATIONS), shares, strict=True))

    def judge(space: MixtureSpace, candidate: Tensor, fold: Fold) -> Fitness:
        right = fold.number < round(3 * share[space.name])
        surer = -1.0 if space.groups else -5.0  # the likelihood of one held-out example must not decide
        return Fitness(1.0, surer) if right else Fitness(0.0)

    result = cross_validate(CONFIGURATIONS[::order], 3, found, judge)
    assert result.chosen.name == chosen
    assert {score.space.name: score.fitness.success for score in result.scores} == pytest.approx(share)


def test_folds_are_pooled_example_by_example():
    likelihoods = [-1.0, -2.0, -4.0, -8.0, -16.0, -32.0, -64.0]
    right = [True, False, True, True, False, False, True]

    def judge(space: MixtureSpace, candidate: Tensor, fold: Fold) -> Fitness:
        assert torch.equal(candidate, space.start.mean + fold.number)  # the one that was found without them
        own = [likelihoods[index] for index in fold.held_out if right[index]]
        return Fitness(len(own) / len(fold.held_out), sum(own) / len(own) if own else -math.inf)

    result = cross_validate(CONFIGURATIONS, 7, found, judge, folds=3)
    for score in result.scores:
        assert score.fitness.success == pytest.approx(4 / 7)
        assert score.fitness.log_likelihood == pytest.approx((-1 - 4 - 8 - 64) / 4)
        assert len(score.folds) == len(score.found) == len(result.folds) == 3
        assert score.to_dict()["folds"] == [fold.success for fold in score.folds]


def test_no_right_answer_at_all_is_a_score_too():
    result = cross_validate(CONFIGURATIONS[:1], 3, found, lambda *_: Fitness(0.0))
    assert result.scores[0].fitness == Fitness(0.0)
    assert result.scores[0].to_dict()["log_likelihood"] is None


def right_by(weights: Callable[[Tensor], Tensor]) -> tuple[Callable[..., SearchResult], Callable[..., Fitness]]:
    """Searches and judges examples, of which number i is answered right where the i-th of `weights` is positive."""

    def fitness(space: MixtureSpace, candidate: Tensor, examples: tuple[int, ...]) -> Fitness:
        margins = weights(space.weights(candidate[None])[0])[list(examples)]
        return Fitness(float((margins > 0).double().mean()), float(margins.clamp(max=0.3).mean()) - 1)

    def search(space: MixtureSpace, fold: Fold) -> SearchResult:
        settings = SearchSettings(iterations=6, population=16, elite_ratio=0.25, seed=2)
        return MixtureSearch(space, settings).run(
            lambda candidates: [fitness(space, row, fold.training) for row in candidates], progress=False
        )

    return search, lambda space, candidate, fold: fitness(space, candidate, fold.held_out)


def test_layers_that_need_different_experts_get_weights_of_their_own():
    def needs_both(alpha: Tensor) -> Tensor:  # math in the first layer, code in the second
        first, second = (alpha[0], alpha[1]) if alpha.ndim == 2 else (alpha, alpha)
        return torch.minimum(first[0] - first[1], second[1] - second[0]).expand(4) - 0.2

    assert cross_validate(CONFIGURATIONS, 4, *right_by(needs_both)).chosen.name == "grouped-normalized"


def test_layers_that_need_the_same_expert_share_its_weights():
    def needs_math(alpha: Tensor) -> Tensor:
        return (alpha[..., 0] - alpha[..., 1]).flatten()[:1].expand(3) - 0.2

    result = cross_validate(CONFIGURATIONS, 3, *right_by(needs_math))
    assert result.chosen.name == "global-normalized"
    assert [score.fitness.success for score in result.scores] == [1.0] * 4


@pytest.mark.parametrize(
    "arguments, message",
    [(([], 3), "one configuration"), ((CONFIGURATIONS, 1), "2 examples"), ((CONFIGURATIONS, 3), "2 folds")],
)
def test_what_cannot_be_validated_is_refused(arguments: tuple, message: str):
    with pytest.raises(ValueError, match=message):
        cross_validate(*arguments, found, lambda *_: Fitness(0.0), folds=1)
