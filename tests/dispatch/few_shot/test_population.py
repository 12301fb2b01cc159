"""A population in batched generation: the scores of recomposing the weights and generating once per candidate."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import distributed

from peft_svf import ExpertBank
from peft_svf.answering import AnswerGenerator
from peft_svf.dispatch import Route
from peft_svf.dispatch.few_shot import Fitness, MixtureSpace
from peft_svf.dispatch.few_shot.population import Outcomes, Population
from peft_svf.trainers.evaluation import evaluate
from peft_svf.trainers.tasks import Task, get_task
from peft_svf.tuner.layer import SVFLayer


EXPERTS = ("math", "code", "reasoning")


def population_of(
    bank: ExpertBank,
    task: Task,
    examples: Dataset,
    batch_size: int = 256,
    reward: Any = None,
    max_new_tokens: int | None = None,
) -> Any:
    length = max_new_tokens or task.max_new_tokens
    generator = AnswerGenerator(bank.model, bank.tokenizer, length, 0.0, {}, bank)
    return Population(generator, examples, reward or task.reward, batch_size)


@pytest.fixture
def recomposed(bank: ExpertBank) -> Iterator[Any]:
    """`recomposed(route, row)`: the bank's model under an adapter with z' = Σ αₖ zₖ, computed matrix by matrix."""
    bank.model.add_adapter("recomposed", bank.model.peft_config["math"])

    def recompose(route: Route, row: int) -> torch.nn.Module:
        for layer in bank.model.modules():
            if isinstance(layer, SVFLayer):
                groups = [i for i, group in enumerate(route.groups) if layer.svf_name.startswith(f"{group}.")]
                alpha = route.weights[row, groups[0]] if groups else route.weights[row]
                scales = torch.stack([1 + layer.svf_offset[name].weight.data for name in route.experts])  # z, (K, r)
                layer.svf_offset["recomposed"].weight.data = (alpha.double() @ scales.double()).float() - 1
        bank.model.set_adapter("recomposed")
        return bank.model

    yield recompose
    bank.model.set_adapter("math")
    bank.model.delete_adapter("recomposed")


@pytest.mark.parametrize(("grouped", "normalized"), [(False, True), (False, False), (True, False)])
def test_scores_are_those_of_one_candidate_after_another(
    bank: ExpertBank, task: Task, examples: Dataset, recomposed: Any, grouped: bool, normalized: bool
) -> None:
    space = MixtureSpace(EXPERTS, bank.layer_groups() if grouped else (), normalized, sum_limits=(0.5, 1.5))
    draws = torch.Generator().manual_seed(1)
    candidates = torch.rand(3, space.dimension, generator=draws, dtype=torch.float64)
    route = space.to_route(candidates)
    found = population_of(bank, task, examples, batch_size=7).outcomes(route)  # 12 rows: 6, 6
    for row, fitness in enumerate(found.fitness()):
        expected = evaluate(recomposed(route, row), bank.tokenizer, task, examples)
        assert found.answers[row] == expected.answers
        assert found.right[row].tolist() == expected.successes
        assert fitness.success == expected.success
    assert len({tuple(answers) for answers in found.answers}) > 1  # the candidates differ


def test_equal_candidates_answer_once_in_even_batches(bank: ExpertBank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three distinct candidates and four examples are twelve rows: three batches of four, not five, five and two."""
    math_task = get_task("playground-math")
    names = ["math", "reasoning", "math", "code", "reasoning", "math"]
    generate, sizes = bank.model.generate, []

    def counted(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        sizes.append(len(input_ids))
        return generate(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(bank.model, "generate", counted)
    population = population_of(bank, math_task, math_task.load("train", 4), batch_size=5, max_new_tokens=10)
    found = population.outcomes(Route.one_hot(names, EXPERTS))
    assert sizes == [4, 4, 4]
    expected = population.outcomes(Route.one_hot(EXPERTS, EXPERTS))
    assert len({tuple(answers) for answers in expected.answers}) == 3
    of = [EXPERTS.index(name) for name in names]
    assert found.answers == [expected.answers[i] for i in of]
    assert torch.equal(found.right, expected.right[of])
    torch.testing.assert_close(found.log_likelihoods, expected.log_likelihoods[of], rtol=0, atol=1e-4)


def test_fitness_is_the_share_and_then_the_mean_over_own_right_answers() -> None:
    right = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4])
    likelihoods = torch.tensor([[-1.0, -90.0, -3.0, -90.0], [-1.0] * 4, [-0.5, -1.0, -1.5, -5.0]]).double()
    found = Outcomes([[""] * 4] * 3, right, likelihoods).fitness()
    assert found == [Fitness(0.5, -2.0), Fitness(0.0, -math.inf), Fitness(1.0, -2.0)]


def test_rows_can_be_chosen_and_keep_their_order(bank: ExpertBank, task: Task, examples: Dataset) -> None:
    route = Route.one_hot(["math", "reasoning", "others"], EXPERTS)
    population = population_of(bank, task, examples)
    whole, part = population.outcomes(route), population.outcomes(route, [3, 0])
    assert part.answers == [[answers[3], answers[0]] for answers in whole.answers]
    torch.testing.assert_close(part.log_likelihoods, whole.log_likelihoods[:, [3, 0]], rtol=0, atol=1e-4)


def test_one_answer_to_one_example_is_judged_once(bank: ExpertBank, task: Task, examples: Dataset) -> None:
    judged: list[tuple[str, str]] = []

    def reward(prompts: Any, completions: Any, answer: list[str], **kwargs: Any) -> list[float | None]:
        judged.extend((p[0]["content"], c[0]["content"]) for p, c in zip(prompts, completions, strict=True))
        return [None if "A" in own else 1.0 for own in answer]  # what cannot be judged is not right

    population = population_of(bank, task, examples, reward=reward)
    route = Route.one_hot(["reasoning", "reasoning", "math"], EXPERTS)
    found = population.outcomes(route)
    assert len(judged) == len(set(judged)) == sum(len({own[row] for own in found.answers}) for row in range(4))
    assert found.right.tolist() == [["A" not in own for own in examples["answer"]]] * 3
    again = population.outcomes(route)
    assert len(judged) == len(set(judged))
    assert torch.equal(again.right, found.right)


def test_batches_that_do_not_fit_are_halved_for_good(
    bank: ExpertBank, task: Task, examples: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    route = Route.one_hot(["math", "reasoning"], EXPERTS)
    expected = population_of(bank, task, examples, max_new_tokens=4).outcomes(route)
    assert len({answer for own in expected.answers for answer in own}) > 3
    generate, sizes = bank.model.generate, []

    def small_memory(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        sizes.append(len(input_ids))
        if len(input_ids) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return generate(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(bank.model, "generate", small_memory)
    population = population_of(bank, task, examples, batch_size=8, max_new_tokens=4)
    assert population.outcomes(route).answers == expected.answers
    assert sizes == [8, 4, 4]
    sizes.clear()
    assert population.outcomes(route).answers == expected.answers
    assert sizes == [4, 4]


def test_a_batch_size_below_one_is_refused(bank: ExpertBank, task: Task, examples: Dataset) -> None:
    with pytest.raises(ValueError, match="`batch_size` is at least 1"):
        population_of(bank, task, examples, batch_size=0)


@pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available() and hasattr(os, "fork")),
    reason="needs torch.distributed with gloo, and fork",
)
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    """The population of a search, and the prompts of an evaluation, bit for bit, down to sampled answers."""
    program = Path(__file__).with_name("two_processes.py")
    both, alone = tmp_path / "both", tmp_path / "alone"
    both.mkdir()
    run = subprocess.run([sys.executable, str(program), str(both)], capture_output=True, text=True, timeout=300)
    logs = "\n".join(f"--- process {log.stem}\n{log.read_text()}" for log in sorted(both.glob("*.log")))
    assert run.returncode == 0, f"{run.stderr}\n{logs}"
    spec = importlib.util.spec_from_file_location("two_processes", program)
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    expected = json.loads(json.dumps(module.results(alone)))
    for rank in range(2):
        found = json.loads((both / f"{rank}.json").read_text())
        assert found.pop("process") == [rank, 2]
        assert found == expected
    written = ["adaptation.json", "adapter_config.json", "adapter_model.safetensors"]
    for name in written:
        assert (both / "expert" / name).read_bytes() == (alone / "expert" / name).read_bytes()
