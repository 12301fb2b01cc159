"""Strategy B of Transformer²: the ordinary trainer on the routing task makes the base model route better."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from peft_svf import ExpertBank, PromptDispatcher
from peft_svf.playground import BANK_FOLDER
from peft_svf.trainers.statistics import paired_difference_interval
from peft_svf.trainers.tasks import routing_task


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_routing_expert.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_routing_expert", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_few_steps_on_an_instruction_that_the_base_model_half_follows(example: ModuleType, tmp_path: Path) -> None:
    """By its bank's instruction the playground's base makes no mistake; by a bare list of labels it does."""
    bank = ExpertBank.from_pretrained(BANK_FOLDER)
    dispatcher = PromptDispatcher(bank, instruction="math code reasoning others")
    task = routing_task(example.SOURCES, instruction=dispatcher.instruction, tokenizer=bank.tokenizer)
    rows = task.load("test", 80)
    trainer = example.train_routing_expert(task, str(tmp_path), steps=8, learning_rate=0.15)
    with trainer.model.disable_adapter():
        before = example.measure(trainer.model, dispatcher, task, rows)
    after = example.measure(trainer.model, dispatcher, task, rows)

    _, low, _ = paired_difference_interval(before.generated, after.generated)
    assert sum(before.generated) < 72  # of 80: there is something to learn
    assert low > 0.0
    assert sum(after.scored) >= sum(before.scored)
    assert not trainer.best_is_base
    # scores before training are those of the bank's own dispatcher
    chosen = dispatcher.route(list(rows["prompt"])).chosen()
    assert before.scored == [name == answer for name, answer in zip(chosen, rows["answer"], strict=True)]
