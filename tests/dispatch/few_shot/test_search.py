"""Search: interrupted and resumed bit for bit, refused where it is another, stopped for the reason it says."""

from __future__ import annotations

import copy
import io
import json
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_svf.answering import Processes
from peft_svf.dispatch.few_shot import search as search_module
from peft_svf.dispatch.few_shot.mixture_space import MixtureSpace
from peft_svf.dispatch.few_shot.optimizer import Fitness
from peft_svf.dispatch.few_shot.search import MixtureSearch, SearchResult, StopReason
from peft_svf.dispatch.few_shot.search_settings import SearchSettings
from peft_svf.dispatch.few_shot.search_state import SearchStateError
from peft_svf.dispatch.route import Route


SPACE = MixtureSpace(("math", "code", "reasoning"), ("model.layers.0", "model.layers.1"), normalized=False)
SETTINGS = SearchSettings(iterations=7, population=12, elite_ratio=0.34, seed=5)
IDENTITY = {"examples": ["1+1", "2+2"], "bank": {"sha": "abc"}, "max_new_tokens": 8}


@dataclass
class Evaluation:
    """Fitness with many ties, some without any right answer; dies at the call `dies_at`."""

    dies_at: int | None = None
    calls: list[Tensor] = field(default_factory=list)

    def __call__(self, candidates: Tensor) -> list[Fitness]:
        if len(self.calls) == self.dies_at:
            raise InterruptedError
        self.calls.append(candidates.clone())
        score = SPACE.weights(candidates)[:, 0, 1] * SPACE.weights(candidates)[:, 1, 2]
        right = (score * 8).round().clamp(max=4) / 5
        return [Fitness(one, -1 / one if one else -torch.inf) for one in right.tolist()]


def run(evaluate: Any, folder: Path | None = None, settings: SearchSettings = SETTINGS, **kwargs: Any) -> SearchResult:
    options = {"identity": IDENTITY, "progress": False, **kwargs}
    return MixtureSearch(SPACE, settings).run(evaluate, folder, **options)


def assert_same(found: SearchResult, expected: SearchResult) -> None:
    assert torch.equal(found.best, expected.best)
    assert (found.fitness, found.stopped) == (expected.fitness, expected.stopped)
    assert len(found.history) == len(expected.history)
    for one, other in zip(found.history, expected.history, strict=True):
        assert one.fitness == other.fitness
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("mean", "std", "best"))


@pytest.mark.parametrize("optimizer", ["cross_entropy", "covariance_adaptation"])
@pytest.mark.parametrize("dies_at", [0, 1, 4])
def test_a_resumed_search_gives_what_an_uninterrupted_one_gives(tmp_path: Path, optimizer: Any, dies_at: int):
    settings = SearchSettings(iterations=7, population=12, elite_ratio=0.34, seed=5, optimizer=optimizer)
    whole, before, after = Evaluation(), Evaluation(dies_at), Evaluation()
    expected = run(whole, settings=settings)
    with pytest.raises(InterruptedError):
        run(before, tmp_path / "search", settings)
    assert_same(run(after, tmp_path / "search", settings), expected)
    assert len(after.calls) == 7 - dies_at
    for found, one in zip([*before.calls, *after.calls], whole.calls, strict=True):
        assert torch.equal(found, one)
    assert sorted(os.listdir(tmp_path / "search")) == ["generation-00007.safetensors", "search.json"]


def test_a_search_killed_while_it_writes_loses_one_generation_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InterruptedError):
        run(Evaluation(dies_at=3), tmp_path)

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run(Evaluation(), tmp_path)
    after = Evaluation()
    assert_same(run(after, tmp_path), run(Evaluation()))
    assert len(after.calls) == 7 - 3


def test_a_finished_search_is_not_run_again_and_goes_on_with_more_iterations(tmp_path: Path):
    first = run(Evaluation(), tmp_path)
    again = Evaluation()
    assert_same(run(again, tmp_path), first)
    assert again.calls == []
    longer = SearchSettings(iterations=9, population=12, elite_ratio=0.34, seed=5)
    assert_same(run(again, tmp_path, longer), run(Evaluation(), settings=longer))
    assert len(again.calls) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ({"settings": SearchSettings(iterations=7, population=12, elite_ratio=0.34, seed=6)}, "seed was 5 and is 6"),
        ({"identity": {**IDENTITY, "examples": ["1+1"]}}, r'examples was \["1\+1", "2\+2"\] and is \["1\+1"\] now'),
        ({"identity": {**IDENTITY, "bank": {"sha": "x"}}}, 'bank.sha was "abc" and is "x" now'),
        ({"identity": {}}, "max_new_tokens was 8 and is null now"),
    ],
)
def test_another_search_is_refused_with_the_difference(tmp_path: Path, change: dict, message: str):
    with pytest.raises(InterruptedError):
        run(Evaluation(dies_at=2), tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    evaluation = Evaluation()
    with pytest.raises(SearchStateError, match=message):
        run(evaluation, tmp_path, **change)
    assert evaluation.calls == []
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_search_of_another_space_or_optimizer_is_refused(tmp_path: Path):
    run(Evaluation(), tmp_path)
    with pytest.raises(SearchStateError, match=r"space\.normalized was false and is true"):
        MixtureSearch(MixtureSpace(SPACE.experts, SPACE.groups), SETTINGS).run(Evaluation(), tmp_path, IDENTITY)
    with pytest.raises(SearchStateError, match=r"optimizer was .*CrossEntropy.* and is .*Covariance"):
        run(Evaluation(), tmp_path, SearchSettings(seed=5, optimizer="covariance_adaptation"))


def truncate_tensors(folder: Path) -> None:
    path = folder / "generation-00007.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def lose_tensors(folder: Path) -> None:
    (folder / "generation-00007.safetensors").unlink()


def break_json(folder: Path) -> None:
    (folder / "search.json").write_text("{")


@pytest.mark.parametrize("damage", [truncate_tensors, lose_tensors, break_json])
def test_a_damaged_folder_says_so_before_anything_is_evaluated(tmp_path: Path, damage: Callable[[Path], None]):
    run(Evaluation(), tmp_path)
    damage(tmp_path)
    evaluation = Evaluation()
    with pytest.raises(SearchStateError, match=r"cannot be read.*delete this one"):
        run(evaluation, tmp_path)
    assert evaluation.calls == []


def test_what_cannot_be_kept_is_refused_before_anything_is_evaluated(tmp_path: Path):
    evaluation = Evaluation()
    with pytest.raises(ValueError, match="JSON"):
        run(evaluation, tmp_path / "new", identity={"reward": object()})
    (tmp_path / "file").write_text("")
    with pytest.raises(SearchStateError, match="take another folder"):
        run(evaluation, tmp_path / "file")
    assert evaluation.calls == []


def test_the_record_is_json_that_others_can_read(tmp_path: Path):
    run(Evaluation(), tmp_path)
    record = json.loads((tmp_path / "search.json").read_text(), parse_constant=pytest.fail)  # no NaN, no Infinity
    assert record["generations"] == 7
    assert record["identity"]["evaluation"] == IDENTITY


def by_likelihood(target: float, success: float) -> Callable[[Tensor], list[Fitness]]:
    return lambda candidates: [Fitness(success, -float((row - target).square().sum())) for row in candidates]


def constant(*values: Fitness) -> Callable[[Tensor], list[Fitness]]:
    return lambda candidates: [values[row % len(values)] for row in range(len(candidates))]


@pytest.mark.parametrize(
    "evaluate, reason, generations",
    [
        (by_likelihood(0.4, success=0.5), StopReason.COLLAPSED, None),
        (constant(Fitness(1.0, -2.0), Fitness(1.0, -2.0005)), StopReason.SATURATED, 1),  # all perfect, equally sure
        (constant(Fitness(1.0)), StopReason.SATURATED, 1),  # nobody has measured how sure
        (constant(Fitness(1.0, -2.0), Fitness(0.9, -2.0)), StopReason.SATURATED, 6),  # the best grows no surer
        (constant(Fitness(0.0)), StopReason.INDISTINGUISHABLE, 5),
        (constant(Fitness(0.9, -2.0), Fitness(0.8, -2.0)), StopReason.ITERATIONS, 8),
    ],
)
def test_a_search_stops_for_the_reason_it_says(
    evaluate: Callable[[Tensor], list[Fitness]], reason: StopReason, generations: int | None
):
    space = MixtureSpace(SPACE.experts)
    iterations = 8 if generations else 60
    result = MixtureSearch(space, SearchSettings(iterations=iterations)).run(evaluate, progress=False)
    assert result.stopped is reason
    if generations:
        assert len(result.history) == generations
    else:
        assert 3 < len(result.history) < iterations
        assert result.history[-1].std.max() < 0.05
        assert result.route(2).row_weights()[1] == pytest.approx(dict.fromkeys(space.experts, 1 / 3), abs=0.02)


def test_growing_surer_is_reason_enough_to_go_on():
    steps = iter(range(100))

    def evaluate(candidates: Tensor) -> list[Fitness]:
        sure = -10 + 0.01 * next(steps)
        return [Fitness(1.0, sure), *[Fitness(0.5, -1.0 - row) for row in range(len(candidates) - 1)]]

    settings = SearchSettings(iterations=15, collapse_tolerance=0)
    assert MixtureSearch(SPACE, settings).run(evaluate, progress=False).stopped is StopReason.ITERATIONS


def test_the_result_is_the_best_of_the_last_generation_under_noise():
    noise = torch.Generator().manual_seed(0)

    def evaluate(candidates: Tensor) -> list[Fitness]:
        return [Fitness(float(torch.rand((), generator=noise))) for _ in candidates]

    result = run(evaluate)
    assert result.fitness == max(result.history[-1].fitness)
    assert result.fitness < max(max(generation.fitness) for generation in result.history)  # a lucky score is gone


@pytest.mark.parametrize("wrong", [lambda c: [Fitness(0.0)] * 3, lambda c: [0.5] * len(c), lambda c: None])
def test_an_evaluation_that_returns_something_else_is_refused(wrong: Any):
    with pytest.raises(ValueError, match="one Fitness for each of 12 candidates"):
        run(wrong)


def test_one_progress_bar_shows_the_best_score(monkeypatch: pytest.MonkeyPatch):
    bars = []

    class Bar(search_module.tqdm):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs, file=io.StringIO())
            bars.append(self)

    monkeypatch.setattr(search_module, "tqdm", Bar)
    result = run(Evaluation(), progress=True)
    assert [(bar.n, bar.total) for bar in bars] == [(7, 7)]
    assert f"right={result.fitness.success:.0%}" in str(bars[0].postfix)


@pytest.mark.parametrize("optimizer", ["cross_entropy", "covariance_adaptation"])
@pytest.mark.parametrize("options", [{}, {"normalized": False}, {"normalized": False, "residual": True}])
def test_included_experts_are_candidates_and_the_best_of_them_is_not_lost(
    tmp_path: Path, optimizer: Any, options: dict[str, bool]
):
    """Only one expert alone is right, which no draw hits."""
    space = MixtureSpace(SPACE.experts, SPACE.groups, **options)
    alone = Route.one_hot(["math", "code", "reasoning", *(["others"] if "residual" in options else [])], space.experts)
    asked: list[Tensor] = []

    def evaluate(candidates: Tensor) -> list[Fitness]:
        weights = space.to_route(candidates).weights  # (N, 2, 3)
        asked.append(weights)
        return [Fitness(float(torch.equal(own, alone.weights[[1, 1]])), -1.0) for own in weights]

    def search(folder: Path | None, iterations: int, include: bool) -> SearchResult:
        settings = SearchSettings(
            iterations=iterations, population=12, optimizer=optimizer, patience=0, include_experts=include
        )
        return MixtureSearch(space, settings).run(evaluate, folder, progress=False)

    assert search(None, 3, include=False).fitness.success == 0
    asked.clear()
    search(tmp_path, 1, include=True)
    found = search(tmp_path, 3, include=True)
    assert torch.equal(found.route().weights[0], alone.weights[[1, 1]]) and found.fitness.success == 1
    assert torch.equal(asked[0][1 : len(alone) + 1], alone.weights[:, None].expand(-1, 2, -1))
    again = [own for own in asked[1][1:] if any(torch.equal(own, one.expand(2, -1)) for one in alone.weights)]
    assert not again  # the others of the second generation are drawn
    assert torch.equal(found.best, search(None, 3, include=True).best)


def test_experts_that_cannot_be_included_are_refused():
    settings = SearchSettings(population=6, elite_ratio=0.4, include_experts=True)
    with pytest.raises(ValueError, match="population of 6 has no room for 6 single experts"):
        MixtureSearch(MixtureSpace(tuple("abcdef")), settings)
    with pytest.raises(ValueError, match="no candidate in the limits"):
        MixtureSearch(MixtureSpace(("a", "b"), normalized=False, limits=(0.0, 0.9)), settings)
    MixtureSearch(MixtureSpace(tuple("abcde"), limits=(0.0, 0.5)), settings)


def test_presets_are_those_of_the_paper():
    paper, light = SearchSettings.paper(), SearchSettings.light(seed=3)
    assert (paper.examples, paper.iterations, paper.population, paper.elite_ratio) == (10, 100, 32, 0.2)
    assert paper.make_optimizer(SPACE.start).elites == 6
    assert (light.examples, light.iterations, light.population, light.seed) == (3, 10, 32, 3)
    with pytest.raises(ValueError, match="iterations must be a whole number of at least 1"):
        SearchSettings(iterations=0)
    with pytest.raises(ValueError, match="unknown optimizer 'adam'"):
        SearchSettings(optimizer="adam")
    with pytest.raises(ValueError, match="makes 1 elites"):
        MixtureSearch(SPACE, SearchSettings(population=8))


@dataclass(frozen=True)
class Threads(Processes):
    """Processes played by threads: `gather` waits for all and gives each the same."""

    barrier: Any = None
    board: dict[int, list[Any]] = field(default_factory=dict)

    def gather(self, items: list[Any]) -> list[Any]:
        self.board[self.index] = items
        self.barrier.wait(timeout=20)
        gathered = [copy.deepcopy(item) for index in range(self.count) for item in self.board[index]]
        self.barrier.wait(timeout=20)
        return gathered


def two_processes(work: Callable[[Processes], Any]) -> list[Any]:
    barrier, board, results = threading.Barrier(2), {}, [None, None]

    def play(index: int) -> None:
        try:
            results[index] = work(Threads(index, 2, barrier, board))
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=play, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return results


def test_processes_agree_and_only_the_main_one_writes(tmp_path: Path):
    """The second has another folder, a fitness that differs a little, and sees none of the first's files."""

    def work(processes: Processes, dies_at: int | None = None) -> SearchResult:
        exact = Evaluation(dies_at)

        def evaluate(candidates: Tensor) -> list[Fitness]:
            return [Fitness(one.success * (1 - 0.3 * processes.index), -1.0) for one in exact(candidates)]

        folder = tmp_path / str(processes.index)
        return MixtureSearch(SPACE, SETTINGS, processes=processes).run(evaluate, folder, IDENTITY, progress=False)

    assert all(isinstance(one, InterruptedError) for one in two_processes(lambda p: work(p, dies_at=3)))
    found = two_processes(work)
    expected = work(Processes())  # folder 0 is finished by now, and read again
    for one in found:
        assert_same(one, expected)
    assert not (tmp_path / "1").exists()
    other = SearchSettings(iterations=7, population=12, elite_ratio=0.34, seed=8)
    refused = two_processes(
        lambda p: MixtureSearch(SPACE, other, processes=p).run(Evaluation(), tmp_path / str(p.index), IDENTITY)
    )
    assert all(isinstance(error, SearchStateError) and "seed was 5" in str(error) for error in refused)
