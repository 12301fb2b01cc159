"""Optimizers: known optima, a literal transcription of the formulas, ties, noise, repeatability."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import cmaes
import numpy as np
import pytest
import torch
from torch import Tensor

from peft_svf.dispatch.few_shot.covariance_adaptation import CovarianceMatrixAdaptation
from peft_svf.dispatch.few_shot.cross_entropy import CrossEntropyMethod
from peft_svf.dispatch.few_shot.optimizer import Fitness, Optimizer, StartDistribution, ranking


OPTIMIZERS = [CrossEntropyMethod, CovarianceMatrixAdaptation]


def start(dimension: int = 3) -> StartDistribution:
    ones = torch.ones(dimension, dtype=torch.float64)
    return StartDistribution(ones / 3, ones / 2, 0.0, 1.0)


def run(optimizer: Optimizer, evaluate: Callable[[Tensor], list[Fitness]], generations: int) -> list[Tensor]:
    asked = []
    for _ in range(generations):
        asked.append(optimizer.ask())
        optimizer.tell(asked[-1], evaluate(asked[-1]))
    return asked


def near(optimum: list[float], steps: int | None = None) -> Callable[[Tensor], list[Fitness]]:
    """Fitness that falls with the distance to `optimum`: of the likelihood alone, or of shares of n `steps`."""

    def evaluate(candidates: Tensor) -> list[Fitness]:
        distances = (candidates - torch.tensor(optimum, dtype=torch.float64)).square().sum(1).tolist()
        if steps is None:
            return [Fitness(0.5, -distance) for distance in distances]
        return [Fitness(round(steps * math.exp(-distance)) / steps, -1.0) for distance in distances]

    return evaluate


def test_success_decides_and_likelihood_breaks_ties():
    worst_first = [Fitness(0.2), Fitness(0.2, -9.0), Fitness(0.2, -0.5), Fitness(0.3, -9.0), Fitness(1.0, -50.0)]
    assert sorted(worst_first[3:] + worst_first[:3]) == worst_first
    assert ranking(worst_first) == [4, 3, 2, 1, 0]
    assert ranking([Fitness(0.2), Fitness(0.5), Fitness(0.5), Fitness(0.2)]) == [1, 2, 0, 3]
    assert ranking([Fitness(0.5, -2.0), Fitness(0.5, -1.0)], by_likelihood=False) == [0, 1]


@pytest.mark.parametrize("values", [(1.1, 0.0), (-0.1, 0.0), (math.nan, 0.0), (0.5, math.nan), (0.5, math.inf)])
def test_a_fitness_that_is_no_score_is_refused(values: tuple[float, float]):
    with pytest.raises(ValueError, match="Fitness"):
        Fitness(*values)


def literal_cross_entropy(
    fitness_of: Callable[[np.ndarray], list[tuple[float, float]]], smoothing: float, by_likelihood: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The released code's generation (optim_modules.CEM) in numpy, with the elites' ties as in the paper."""
    generator = torch.Generator().manual_seed(7)
    mean, std, best = np.full(4, 1 / 3), np.full(4, 0.5), np.full(4, 1 / 3)
    for _ in range(8):
        noise = torch.randn((10, 4), generator=generator, dtype=torch.float64).numpy()
        population = np.clip(noise * std + mean, 0, 1)
        population[0] = best
        success, likelihood = np.array(fitness_of(population)).T
        order = np.lexsort((np.arange(10), -likelihood if by_likelihood else np.zeros(10), -success))
        elites = population[order[: int(0.3 * 10)]]
        best = population[np.lexsort((np.arange(10), -likelihood, -success))[0]]
        mean = elites.mean(0) * (1 - smoothing) + smoothing * mean
        std = elites.std(0, ddof=1) * (1 - smoothing) + smoothing * std
    return mean, std, best


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("by_likelihood", [True, False])
def test_the_cross_entropy_method_is_the_formula_of_the_released_code(smoothing: float, by_likelihood: bool):
    def fitness_of(population: np.ndarray) -> list[tuple[float, float]]:  # three levels of success, so many ties
        return [(round(2 * row[0] * row[1]) / 2, -float((row[2] - 0.6) ** 2)) for row in population]

    optimizer = CrossEntropyMethod(start(4), 10, 0.3, smoothing, seed=7, elites_by_likelihood=by_likelihood)
    run(optimizer, lambda candidates: [Fitness(*pair) for pair in fitness_of(candidates.numpy())], 8)
    mean, std, best = literal_cross_entropy(fitness_of, smoothing, by_likelihood)
    np.testing.assert_allclose(optimizer.mean, mean, rtol=0, atol=1e-12)
    np.testing.assert_allclose(optimizer.std, std, rtol=0, atol=1e-12)
    np.testing.assert_allclose(optimizer.best, best, rtol=0, atol=1e-12)


def test_cma_es_is_the_library_on_the_ranked_samples():
    evaluate = near([0.4, 0.5, 0.6])
    ours = CovarianceMatrixAdaptation(start(), population=9, seed=2)
    library = cmaes.CMA(mean=np.full(3, 1 / 3), sigma=0.5, population_size=8)
    for generation in range(5):
        candidates = ours.ask()
        library.reseed_rng(2 * 1_000_003 + generation)
        samples = np.clip([library.ask() for _ in range(8)], 0, 1)
        np.testing.assert_array_equal(candidates[1:], samples)
        fitness = evaluate(candidates)
        ours.tell(candidates, fitness)
        library.tell([(sample, -one.log_likelihood) for sample, one in zip(samples, fitness[1:], strict=True)])


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize("optimum", [[0.8, 0.1, 0.5], [1.0, 0.0, 0.0]])
def test_the_optimum_of_a_quadratic_is_found(optimizer_class: type, optimum: list[float]):
    optimizer = optimizer_class(start(), seed=3)
    run(optimizer, near(optimum), 30)
    assert (optimizer.best - torch.tensor(optimum)).abs().max() < 0.02
    assert optimizer.converged


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize("seed", range(3))
def test_the_highest_step_is_found_where_most_candidates_tie(optimizer_class: type, seed: int):
    evaluate = near([0.95, 0.9, 0.05, 0.9], steps=10)
    optimizer = optimizer_class(start(4), seed=seed)
    first = run(optimizer, evaluate, 40)[0]
    assert max(evaluate(first)).success < 1  # not by luck
    assert evaluate(optimizer.best[None])[0].success == 1


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_candidates_depend_on_the_seed_alone(optimizer_class: type):
    evaluate = near([0.8, 0.1, 0.5])
    torch.manual_seed(0)
    np.random.seed(0)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1]
    first = run(optimizer_class(start(), seed=4), evaluate, 4)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], before_numpy)
    torch.manual_seed(1)
    np.random.seed(1)
    again, other = (run(optimizer_class(start(), seed=seed), evaluate, 4) for seed in (4, 5))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
@pytest.mark.parametrize("generations", [0, 1, 5])
def test_an_optimizer_goes_on_from_its_state_bit_for_bit(optimizer_class: type, generations: int):
    evaluate = near([0.8, 0.1, 0.5])
    optimizer = optimizer_class(start(), seed=6)
    run(optimizer, evaluate, generations)
    copy = optimizer_class(start(), seed=6)
    copy.load_state(optimizer.state())
    assert copy.converged == optimizer.converged
    for expected, found in zip(run(optimizer, evaluate, 3), run(copy, evaluate, 3), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_the_best_is_evaluated_again_and_loses_a_lucky_score(optimizer_class: type):
    optimizer = optimizer_class(start(), population=10)
    candidates = optimizer.ask()
    assert torch.equal(candidates[0], start().mean)
    lucky = candidates[5].clone()
    optimizer.tell(candidates, [Fitness(1.0 if row == 5 else row / 10, -1.0) for row in range(10)])
    candidates = optimizer.ask()
    assert torch.equal(candidates[0], lucky)
    optimizer.tell(candidates, [Fitness(0.6 if row == 3 else 0.1, -1.0) for row in range(10)])
    assert torch.equal(optimizer.ask()[0], candidates[3])


def test_of_equally_successful_candidates_the_surer_is_the_best():
    optimizer = CrossEntropyMethod(start(), population=6, elite_ratio=0.5)
    candidates = optimizer.ask()
    optimizer.tell(candidates, [Fitness(0.5, value) for value in (-9.0, -3.0, -8.0, -1.0, -2.0, -7.0)])
    assert torch.equal(optimizer.ask()[0], candidates[3])
    torch.testing.assert_close(optimizer.mean, candidates[[3, 4, 1]].mean(0))


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_a_generation_of_equals_moves_nothing(optimizer_class: type):
    optimizer, fresh = optimizer_class(start(), seed=1), optimizer_class(start(), seed=1)
    spread = fresh.ask()[1:].std(0)
    run(optimizer, lambda candidates: [Fitness(0.0)] * len(candidates), 20)
    assert not optimizer.converged
    assert torch.equal(optimizer.best, start().mean)
    torch.testing.assert_close(optimizer.ask()[1:].std(0), spread, rtol=0, atol=0.15)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"population": 1}, "too small"),
        ({"population": 9, "elite_ratio": 0.2}, "makes 1 elites"),
        ({"elite_ratio": 1.5}, "elite_ratio"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"tolerance": -1.0}, "tolerance"),
    ],
)
def test_the_cross_entropy_method_refuses_what_it_cannot_work_with(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        CrossEntropyMethod(start(), **options)


def test_a_start_outside_the_box_is_refused():
    ones = torch.ones(2)
    with pytest.raises(ValueError, match=r"in \[0, 0.5\]"):
        StartDistribution(ones, ones, 0, 0.5)
    with pytest.raises(ValueError, match="shapes"):
        StartDistribution(ones, torch.ones(3), 0, 1)
    with pytest.raises(ValueError, match="positive"):
        StartDistribution(ones, ones * 0, 0, 1)


@pytest.mark.parametrize("optimizer_class", OPTIMIZERS)
def test_telling_something_else_than_was_asked_is_refused(optimizer_class: type):
    optimizer = optimizer_class(start(), population=10)
    with pytest.raises(ValueError, match=r"\(10, 3\)"):
        optimizer.tell(optimizer.ask(), [Fitness(0.0)] * 9)


def test_cma_es_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(ImportError, match=r"peft-svf\[cma\]"):
        CovarianceMatrixAdaptation(start())
