"""Threads with one model under different routes: each gets exactly what it gets alone, and leaves no trace."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TextIteratorStreamer

from peft_svf import SVFConfig
from peft_svf.tuner.mixed_batch import MixedBatch


Build = Callable[..., LlamaForCausalLM]
IDS = torch.randint(3, 97, (4, 6), generator=torch.Generator().manual_seed(0))
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4}
TIMEOUT = 20  # seconds; a broken barrier is an error, not a test that hangs


def with_adapters(model: LlamaForCausalLM, **settings: Any) -> PeftModel:
    torch.manual_seed(1)
    peft_model = get_peft_model(model, SVFConfig(init_weights=False, **settings), "a")
    peft_model.add_adapter("b", SVFConfig(init_weights=False, **settings))
    for name, parameter in peft_model.named_parameters():
        if ".svf_offset." in name:
            parameter.data.mul_(4)
        elif ".modules_to_save." in name:
            parameter.data.add_(0.5 * torch.randn_like(parameter))
    return peft_model.eval()


@pytest.fixture(scope="module")
def prototypes() -> list[PeftModel]:
    return []


@pytest.fixture
def model(tiny_llama: Build, prototypes: list[PeftModel]) -> PeftModel:
    if not prototypes:
        prototypes.append(with_adapters(tiny_llama()))
    return copy.deepcopy(prototypes[0])


def mixed(*rows: list[float], every_row: bool = False) -> MixedBatch:
    return MixedBatch(["a", "b"], torch.tensor(rows), every_row=every_row)


def is_clean(model: PeftModel) -> bool:
    """No route is left, and nothing that routes put on the model."""
    base = model.get_base_model()
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    return not model.base_model.svf_batches.in_use and hooks == 0 and "generate" not in vars(base)


@contextmanager
def meeting(model: PeftModel, threads: int) -> Iterator[None]:
    """All threads wait for one another in the middle of every forward pass, between two adapted layers."""
    barrier = threading.Barrier(threads)
    module = model.get_base_model().model.layers[1].post_attention_layernorm

    def wait(*args: Any) -> None:
        barrier.wait(TIMEOUT)

    handle = module.register_forward_hook(wait)
    try:
        yield
    finally:
        handle.remove()


Job = Callable[[], torch.Tensor]
Route = Callable[[], AbstractContextManager[None]]


def at_the_same_time(model: PeftModel, jobs: list[Job]) -> list[torch.Tensor]:
    with meeting(model, len(jobs)), ThreadPoolExecutor(len(jobs)) as pool:
        return [future.result(TIMEOUT) for future in [pool.submit(job) for job in jobs]]


def jobs_of(model: PeftModel) -> list[Job]:
    """Generation under four routes, of which the last is none, in other places and with other numbers of rows."""
    base = model.base_model

    def job(route: Route, ids: torch.Tensor, **settings: Any) -> Job:
        def run() -> torch.Tensor:
            with route():
                return model.generate(ids, **GREEDY, **settings)

        return run

    return [
        job(lambda: base.routed(mixed([0.3, 0.7], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0])), IDS),
        job(lambda: base.routed(mixed([-0.5, 1.2], [0.0, 0.0])), IDS[:2], num_beams=3),
        job(lambda: base.routed(mixed([0.0, 0.0], every_row=True)), IDS[:3]),
        job(nullcontext, IDS),
    ]


@pytest.mark.parametrize("chosen", [[0, 1], [0, 3], [0, 1, 2, 3]], ids=["two routes", "a route and none", "four"])
def test_each_thread_gets_what_it_gets_alone(model: PeftModel, chosen: list[int]) -> None:
    jobs = [jobs_of(model)[index] for index in chosen]
    alone = [job() for job in jobs]
    assert len({str(result.tolist()) for result in alone}) == len(jobs)
    for found, expected in zip(at_the_same_time(model, jobs), alone, strict=True):
        assert torch.equal(found, expected)
    assert is_clean(model)


@torch.no_grad()
def test_threads_that_pass_adapter_names(model: PeftModel) -> None:
    def job(names: list[str]) -> Job:
        return lambda: model.generate(IDS, adapter_names=names, **GREEDY)

    jobs = [job(["a", "b", "a", "__base__"]), job(["b", "__base__", "b", "a"])]
    alone = [job() for job in jobs]
    for found, expected in zip(at_the_same_time(model, jobs), alone, strict=True):
        assert torch.equal(found, expected)


def test_whole_modules_follow_the_thread(tiny_llama: Build) -> None:
    """Their hooks are visible to all threads, but only act in one."""
    model = with_adapters(tiny_llama(), modules_to_save=["lm_head"])

    def job(*rows: list[float]) -> Job:
        def run() -> torch.Tensor:
            with model.base_model.routed(mixed(*rows)), torch.no_grad():
                return model(IDS).logits

        return run

    def unrouted() -> torch.Tensor:
        with torch.no_grad():
            return model(IDS).logits

    one, other = [0.0, 1.0], [1.0, 0.0]
    jobs = [job(one, one, other, [0.0, 0.0]), job(other, [0.0, 0.0], one, one), unrouted]
    alone = [job() for job in jobs]
    for found, expected in zip(at_the_same_time(model, jobs), alone, strict=True):
        assert torch.equal(found, expected)
    assert is_clean(model)


@torch.no_grad()
def test_nested_routes_restore_the_outer_one(model: PeftModel) -> None:
    outer, inner = mixed([1.0, 0.0], every_row=True), mixed([0.0, 1.0], every_row=True)
    with model.base_model.routed(outer):
        expected = model(IDS).logits
        with model.base_model.routed(inner):
            assert not torch.equal(model(IDS).logits, expected)
            named = model(IDS, adapter_names=["a"] * 4).logits  # the innermost
            assert torch.equal(named, expected)
            with model.base_model.routed(outer):
                assert torch.equal(model(IDS).logits, expected)
            assert not torch.equal(model(IDS).logits, expected)
        assert torch.equal(model(IDS).logits, expected)
    assert is_clean(model)


@torch.no_grad()
def test_generators_may_end_in_another_order(model: PeftModel) -> None:
    def route(*row: float) -> Iterator[None]:
        with model.base_model.routed(mixed(list(row), every_row=True)):
            yield

    model.set_adapter("b")
    expected = model(IDS).logits
    model.set_adapter("a")
    first, second = route(1.0, 0.0), route(0.0, 1.0)
    next(first), next(second)
    first.close()
    assert torch.equal(model(IDS).logits, expected)
    second.close()
    assert is_clean(model)


class Stop(BaseException):
    """Like KeyboardInterrupt, which pytest would take for its own, no Exception."""


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, Stop])
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}], ids=["offsets", "whole modules"])
def test_an_exception_leaves_no_trace(tiny_llama: Build, settings: dict[str, Any], error: type[BaseException]) -> None:
    model = with_adapters(tiny_llama(), **settings)
    before = model.generate(IDS, **GREEDY)

    def fail(*args: Any) -> None:
        raise error("stop here")

    handle = model.get_base_model().model.layers[1].mlp.down_proj.register_forward_hook(fail)
    with pytest.raises(error, match="stop here"), model.base_model.routed(mixed(*[[1.0, 0.0]] * 4)):
        model.generate(IDS, num_beams=2, **GREEDY)
    handle.remove()
    assert is_clean(model)
    assert torch.equal(model.generate(IDS, **GREEDY), before)


def test_a_new_thread_does_not_inherit_the_route(model: PeftModel) -> None:
    active = model.generate(IDS, **GREEDY)
    with model.base_model.routed(mixed([0.0, 1.0], every_row=True)), ThreadPoolExecutor(1) as pool:
        routed = model.generate(IDS, **GREEDY)
        assert torch.equal(pool.submit(lambda: model.generate(IDS, **GREEDY)).result(TIMEOUT), active)
    assert not torch.equal(routed, active)


def test_streaming_from_a_thread_that_enters_the_route(
    tiny_llama: Build, character_tokenizer: PreTrainedTokenizerFast
) -> None:
    """transformers' example for `TextIteratorStreamer`, with the route where it generates."""
    model = with_adapters(tiny_llama(vocab_size=100))
    settings = {**GREEDY, "max_new_tokens": 8, "min_new_tokens": 8}

    def generate(**kwargs: Any) -> torch.Tensor:
        with model.base_model.routed(mixed([0.0, 1.0], every_row=True)):
            return model.generate(IDS[:1], **settings, **kwargs)

    expected = character_tokenizer.decode(generate()[0, 6:], skip_special_tokens=True)
    streamer = TextIteratorStreamer(character_tokenizer, skip_prompt=True, timeout=TIMEOUT, skip_special_tokens=True)
    thread = threading.Thread(target=generate, kwargs={"streamer": streamer})
    thread.start()
    active = model.generate(IDS[:1], **settings)[0, 6:]
    assert "".join(streamer) == expected != character_tokenizer.decode(active, skip_special_tokens=True)
    thread.join()
    assert is_clean(model)


@torch.no_grad()
def test_an_adapter_that_is_added_meanwhile_does_not_disturb_the_route(tiny_llama: Build) -> None:
    """It adapts layers that had no adapter, and come first in the model."""
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), SVFConfig(init_weights=False, target_modules=["down_proj"]), "a").eval()
    model.add_adapter("b", SVFConfig(init_weights=False, target_modules=["down_proj"]))
    model.set_adapter("b")
    expected = model(IDS).logits
    model.set_adapter("a")
    with model.base_model.routed(mixed([0.0, 1.0], every_row=True)):
        model.add_adapter("c", SVFConfig(init_weights=False, target_modules=["q_proj", "up_proj"]))
        assert torch.equal(model(IDS).logits, expected)
        model.set_adapter("c")
        assert torch.equal(model(IDS).logits, expected)
        with model.base_model.routed(MixedBatch.of_names(["c", "b", "__base__", "c"])):
            assert not torch.allclose(model(IDS).logits[0], expected[0], atol=1e-3)
    assert is_clean(model)


@torch.no_grad()
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_has_no_route_and_is_a_model_of_its_own(
    model: PeftModel, how: Callable[[PeftModel], PeftModel]
) -> None:
    active = model.generate(IDS, **GREEDY)
    with model.base_model.routed(mixed([0.0, 1.0], every_row=True)):
        twin = how(model)
        routed = model.generate(IDS, **GREEDY)
        assert torch.equal(twin.generate(IDS, **GREEDY), active) and not torch.equal(routed, active)
        for parameter in twin.parameters():
            parameter.zero_()  # of the copy alone
        assert torch.equal(model.generate(IDS, **GREEDY), routed)
        assert (twin.generate(IDS, **GREEDY)[:, 6:] != routed[:, 6:]).any()
    with twin.base_model.routed(mixed([0.0, 1.0], every_row=True)):
        pass
    assert is_clean(twin)  # nor anything else of the routed model
    again = how(model)
    with again.base_model.routed(mixed([0.0, 1.0], every_row=True)):
        assert torch.equal(again.generate(IDS, **GREEDY), routed)
        assert torch.equal(model.generate(IDS, **GREEDY), active)


def test_a_generate_of_the_models_own_comes_back(model: PeftModel) -> None:
    base = model.get_base_model()
    original, calls = base.generate, []
    base.generate = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    own = base.generate
    with model.base_model.routed(mixed([0.0, 1.0], every_row=True)):
        model.generate(IDS, **GREEDY)
    assert base.generate is own and calls == [1]


def test_a_model_is_saved_under_a_route_as_without(model: PeftModel, tmp_path: Path) -> None:
    with model.base_model.routed(mixed([0.0, 1.0], every_row=True)):
        model.save_pretrained(tmp_path / "adapters")
        model.get_base_model().save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "adapters again")
    model.get_base_model().save_pretrained(tmp_path / "model again")
    for saved in ("adapters", "model"):
        files = [path for path in (tmp_path / saved).rglob("*") if path.is_file()]
        assert len(files) >= 2
        for path in files:
            again = tmp_path / f"{saved} again" / path.relative_to(tmp_path / saved)
            assert path.read_bytes() == again.read_bytes()
