"""The embedded bank is what it claims to be: base half right, experts better, routing right, all from package data."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from transformers import pipeline

from peft_svf import ExpertBank, PromptDispatcher
from peft_svf.playground import BANK_FOLDER, generate_problems
from peft_svf.playground.families import FAMILIES
from peft_svf.trainers.evaluation import evaluate_success
from peft_svf.trainers.statistics import paired_difference_interval
from peft_svf.trainers.tasks.playground import PLAYGROUND_TASKS


@pytest.fixture(scope="module")
def bank() -> ExpertBank:
    return ExpertBank.from_pretrained(BANK_FOLDER)


@pytest.mark.parametrize("family", FAMILIES)
def test_base_is_half_right_and_the_expert_gains_ten_points_clear_of_zero(bank: ExpertBank, family: str) -> None:
    task = PLAYGROUND_TASKS[family]
    dataset = task.load("test", 300)
    with bank.base_only() as model:
        base = evaluate_success(model, bank.tokenizer, task, dataset)
    bank.model.set_adapter(family, inference_mode=True)
    expert = evaluate_success(bank.model, bank.tokenizer, task, dataset)
    assert 0.40 <= sum(base) / len(base) <= 0.75
    gain, low, _ = paired_difference_interval(base, expert)
    assert gain >= 0.10
    assert low > 0


def test_prompts_are_routed_to_the_expert_of_their_family(bank: ExpertBank) -> None:
    dispatcher = PromptDispatcher(bank)
    for family in (*FAMILIES, "others"):
        prompts = [problem.prompt for problem in generate_problems(family, "test", 15)]
        assert dispatcher.route(prompts).chosen().count(family) >= 14


def test_weights_are_safetensors_and_small() -> None:
    files = [path for path in BANK_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files if path.parent.name == "base") < 6_000_000
    for family in FAMILIES:
        path = BANK_FOLDER / family / "adapter_model.safetensors"
        assert sum(tensor.numel() for tensor in load_file(path).values()) == 3072
        assert path.stat().st_size < 4 * 3072 + 16_384
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".jinja", ".md"}


def test_default_pipeline_answers_from_the_embedded_bank() -> None:
    """In a fresh process without a network: tests/pipelines/test_fresh_process.py."""
    pipe = pipeline("transformer2-generation")
    [record] = pipe("Tom has 23 apples and buys 18 more. How many apples does Tom have?")
    assert record["expert"] == "math"
    assert record["generated_text"].endswith("so 41")
