"""Generated problems: reproducible, split without overlap, right answers right and slips wrong."""

from __future__ import annotations

import re

import pytest

from peft_svf.playground import SPLITS, Problem, generate_problems
from peft_svf.playground.families import FAMILIES, MAKERS
from peft_svf.playground.families.reasoning import CATEGORIES, SIZES
from peft_svf.trainers.tasks.playground import PLAYGROUND_TASKS, math_reward, reasoning_reward


TRAINED = sorted(PLAYGROUND_TASKS)


@pytest.mark.parametrize("family", sorted(MAKERS))
def test_same_seed_gives_the_same_problems_and_another_seed_gives_others(family: str) -> None:
    first = generate_problems(family, "test", 20, seed=3)
    assert first == generate_problems(family, "test", 20, seed=3)
    assert first != generate_problems(family, "test", 20, seed=4)
    assert len({problem.prompt for problem in first}) == 20


@pytest.mark.parametrize("family", TRAINED)
def test_splits_share_neither_prompt_nor_problem(family: str) -> None:
    keys = {split: {problem.key for problem in generate_problems(family, split, 200)} for split in SPLITS}
    assert not keys["train"] & keys["validation"]
    assert not keys["train"] & keys["test"]
    assert not keys["validation"] & keys["test"]


def test_unknown_family_and_split_and_too_many_prompts_are_named() -> None:
    with pytest.raises(ValueError, match="Unknown playground family 'history': choose one of math"):
        generate_problems("history", "test", 1)
    with pytest.raises(ValueError, match="Unknown split 'dev': choose one of train"):
        generate_problems("math", "dev", 1)
    with pytest.raises(ValueError, match="distinct prompts, 500 were asked for"):
        generate_problems("others", "test", 500)


def states_another_result(problem: Problem) -> bool:
    """Two slips of a two-step problem can cancel: then the careless author states the right number."""
    return problem.has_slip and not (problem.answer and problem.careless.split()[-1] == problem.careful.split()[-1])


@pytest.mark.parametrize("family", TRAINED)
def test_careful_answers_are_rewarded_and_slips_are_not(family: str) -> None:
    task = PLAYGROUND_TASKS[family]
    problems = generate_problems(family, "test", 100)
    dataset = task.load("test", 100)
    assert dataset["prompt"][0] == [{"role": "user", "content": problems[0].prompt}]
    assert dataset["id"][:50] == task.load("test", 50)["id"][:]
    assert len(set(dataset["id"])) == 100
    columns = {"answer": dataset["answer"][:], "tests": dataset["tests"][:]}
    assert task.reward(completions=[problem.careful for problem in problems], **columns) == [1.0] * 100
    expected = [-1.0 if states_another_result(problem) else 1.0 for problem in problems]
    assert task.reward(completions=[problem.careless for problem in problems], **columns) == expected
    assert 0.25 < expected.count(-1.0) / 100 < 0.85


@pytest.mark.parametrize("family", ["math", "math-hard"])
def test_math_answers_equal_the_arithmetic_of_the_prompt(family: str) -> None:
    for problem in generate_problems(family, "train", 300):
        a, b, *rest = (int(number) for number in re.findall(r"\d+", problem.prompt))
        result = a + b if family == "math-hard" or problem.kind == "add" else a - b
        assert int(problem.answer) == result - sum(rest)


def test_sizes_are_answered_as_a_sorted_list_would() -> None:
    rank = {word: place for place, words in enumerate(SIZES.values()) for word in words}
    problems = [problem for problem in generate_problems("reasoning", "train", 300) if problem.kind == "size"]
    assert len(problems) > 100
    for problem in problems:
        options = re.findall(r"([A-E])\) (\w+)", problem.prompt)
        letters = [letter for letter, word in sorted(options, key=lambda option: rank[option[1]])]
        assert problem.answer == letters[0 if "smallest" in problem.prompt else -1]


def test_categories_are_answered_by_membership() -> None:
    problems = [problem for problem in generate_problems("reasoning", "train", 300) if problem.kind == "category"]
    assert len(problems) > 100
    for problem in problems:
        question = re.match(r"Which one is (not )?an? (\w+)\?", problem.prompt)
        assert question is not None
        members = CATEGORIES[question[2]]
        fitting = [
            letter
            for letter, word in re.findall(r"([A-E])\) (\w+)", problem.prompt)
            if (word in members) != bool(question[1])
        ]
        assert fitting == [problem.answer]


@pytest.mark.parametrize("completion", ["", "41", "so 41 apples", "so 41, so 42", "so 4", "so 41.", "so 041"])
def test_math_reward_takes_only_the_stated_number(completion: str) -> None:
    assert math_reward([completion], answer=["41"]) == [-1.0]


@pytest.mark.parametrize("completion", ["", "A", "so A or B", "It is Tom, so", "It is Tom, so F", "so A so B", "so a"])
def test_reasoning_reward_takes_only_the_stated_letter(completion: str) -> None:
    assert reasoning_reward([completion], answer=["A"]) == [-1.0]


def test_families_of_experts_are_the_trained_ones() -> None:
    assert set(FAMILIES) == {family for family in TRAINED if not family.endswith("-hard")}
