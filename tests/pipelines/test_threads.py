"""Threads that share one pipeline never see each other's routes."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from peft_svf import Transformer2Pipeline


@pytest.fixture
def in_step(bank):
    """`in_step(*calls)`: run calls in threads of their own, each forward of one between forwards of the others."""

    def in_step(*calls):
        barrier = threading.Barrier(len(calls), timeout=20)
        rounds = [0]

        def wait(*_):
            if barrier.wait() == 0:
                rounds[0] += 1

        layer = bank.base_model.model.layers[0].mlp.down_proj.base_layer
        handle = layer.register_forward_pre_hook(wait)
        try:
            with ThreadPoolExecutor(len(calls)) as pool:
                results = [future.result() for future in [pool.submit(call) for call in calls]]
        finally:
            handle.remove()
        assert rounds[0] >= 8  # they did run side by side
        return results

    return in_step


@pytest.fixture(autouse=True)
def answers_of_one_length(bank):
    bank.model.generation_config.eos_token_id = None


def test_two_threads_with_one_pipeline_get_the_answers_that_they_get_alone(pipe, in_step):
    mixed = [{"text": "x", "expert": {"math": 0.5, "code": 0.5}}, {"text": "a longer one", "expert": "reasoning"}]
    calls = [
        lambda: pipe("math: 2+2?"),
        lambda: pipe(["code: sort", "hello", "math: 1"], batch_size=3, num_beams=2),
        lambda: pipe(mixed, batch_size=2, num_return_sequences=2, num_beams=2),
        lambda: pipe("math: 2+2?", expert="others"),
    ]
    assert in_step(*calls) == [call() for call in calls]


def test_a_first_pass_under_the_base_model_leaves_a_second_pass_of_another_thread_alone(bank, in_step):
    pipe = Transformer2Pipeline(bank, dispatcher="prompt")
    pipe("fill the prefix cache", max_new_tokens=1)
    calls = [
        lambda: pipe("hello", max_new_tokens=7),  # one forward for the scores, seven for the answer
        lambda: pipe("hello", expert="math", max_new_tokens=8),
    ]
    found, expected = in_step(*calls), [call() for call in calls]
    assert [record["generated_text"] for (record,) in found] == [r["generated_text"] for (r,) in expected]
    assert found[0][0]["scores"] == pytest.approx(expected[0][0]["scores"], abs=1e-5)


def test_a_failure_in_one_thread_leaves_the_other_alone(pipe, bank):
    expected = pipe("math: 2+2?")
    started, failed = threading.Event(), threading.Event()

    def fail(*_):
        if threading.current_thread().name == "failing":
            started.wait(20)
            raise RuntimeError("out of memory")
        started.set()
        failed.wait(20)

    handle = bank.base_model.model.layers[1].mlp.down_proj.base_layer.register_forward_pre_hook(fail)

    def failing():
        threading.current_thread().name = "failing"
        try:
            pipe("code: x")
        finally:
            failed.set()

    with ThreadPoolExecutor(2) as pool:
        answer, failure = pool.submit(lambda: pipe("math: 2+2?")), pool.submit(failing)
        assert answer.result() == expected
        with pytest.raises(RuntimeError, match="out of memory"):
            failure.result()
    handle.remove()
    assert pipe("math: 2+2?") == expected
