"""Tokens per second: which tokens, and which seconds."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peft_svf.trainers import SVFPolicyGradientTrainer
from peft_svf.trainers.logs import throughput
from peft_svf.trainers.logs.throughput import ThroughputCallback


ARGS: Any = SimpleNamespace(device=torch.device("cpu"))
CONTROL: Any = SimpleNamespace(should_log=False, should_evaluate=False, should_save=False)


def test_tokens_of_a_stretch_over_the_seconds_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    metrics: dict[str, list[float]] = {}
    callback, state = ThroughputCallback(metrics), SimpleNamespace(num_input_tokens_seen=1000)

    def step(tokens: int, seconds: float) -> None:
        callback.on_step_begin(ARGS, state, CONTROL)
        state.num_input_tokens_seen += tokens
        clock.now += seconds
        callback.on_step_end(ARGS, state, CONTROL)

    step(30, 1.0)
    clock.now += 500.0  # an evaluation
    step(50, 3.0)
    assert metrics == {"tokens_per_second": [80 / 4]}  # not the mean of 30 and 50 / 3
    metrics.clear()  # logged
    step(60, 2.0)
    assert metrics == {"tokens_per_second": [30.0]}


def test_prompt_and_completion_tokens_count_and_evaluation_time_does_not(
    make_trainer: Callable[..., SVFPolicyGradientTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(max_steps=3, eval_strategy="steps", eval_steps=1, logging_steps=1, report_to="none")
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    counted: list[int] = []
    generate = trainer._generate_single_turn

    def one_second(prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        output = generate(prompt_ids, *args, **kwargs)
        if trainer.model.training:
            counted.append(sum(map(len, prompt_ids)) + sum(map(len, output[0])))
        clock.now += 1.0 if trainer.model.training else 1000.0
        return output

    monkeypatch.setattr(trainer, "_generate_single_turn", one_second)
    trainer.train()
    logged = [entry["tokens_per_second"] for entry in trainer.state.log_history if "tokens_per_second" in entry]
    assert logged == counted and len(set(counted)) > 1
    assert not any("eval_tokens_per_second" in entry for entry in trainer.state.log_history)
