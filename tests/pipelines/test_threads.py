"""Threads that share one pipeline never see each other's routes."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from peft_svf import Transformer2Pipeline
from peft_svf.pipelines.routing import TOKENIZING


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


def test_a_thread_that_truncates_does_not_cut_the_prompts_of_another(pipe, bank, monkeypatch):
    """Both would set the tokenizer before either uses it, if they could."""
    both = threading.Barrier(2)
    settle = bank.tokenizer.set_truncation_and_padding

    def settle_together(**settings):
        settle(**settings)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.3)

    monkeypatch.setattr(bank.tokenizer, "set_truncation_and_padding", settle_together)

    def length(**options):
        return pipe.preprocess("math: 2+2?", **options)["input_ids"].shape[-1]

    with ThreadPoolExecutor(2) as pool:
        cut, whole = pool.submit(length, truncation=True, max_length=5), pool.submit(length)
        assert (cut.result(), whole.result()) == (5, len("[user]math: 2+2?\n[assistant]"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_process_that_is_forked_meanwhile_can_tokenize():
    """Workers of a data loader: the thread that would let go of the tokenizer is not in them."""
    inside = threading.Event()

    def hold():
        with TOKENIZING:
            inside.set()
            time.sleep(0.1)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hold)
        inside.wait(20)
        child = os.fork()
        if child == 0:
            os._exit(0 if TOKENIZING.acquire(timeout=5) else 1)
        assert os.waitpid(child, 0)[1] == 0
