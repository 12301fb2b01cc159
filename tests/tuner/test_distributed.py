"""SVF in two processes: the same training as in one, one basis for all, and clear errors where it cannot be right."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import distributed, nn
from transformers import LlamaForCausalLM

from peft_svf import SVFConfig
from peft_svf.tuner.layer import SVFLayer


if not (distributed.is_available() and distributed.is_gloo_available() and hasattr(os, "fork")):
    pytest.skip("needs torch.distributed with gloo, and fork", allow_module_level=True)

PROGRAM = Path(__file__).with_name("distributed") / "scenarios.py"


@dataclass
class Outcome:
    """What the processes of one scenario left behind, by rank."""

    folder: Path
    tensors: list[dict[str, torch.Tensor]]
    facts: list[dict[str, Any]]


Run = Callable[..., Outcome]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Runs a scenario of scenarios.py: `run(name, processes=2)`; the second time, returns the outcome of the first."""
    errors = tmp_path_factory.mktemp("scenarios") / "errors.txt"
    outcomes: dict[str, Outcome] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with (
        errors.open("w") as log,
        subprocess.Popen(
            [sys.executable, str(PROGRAM)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment
        ) as program,
    ):

        def run_once(scenario: str, processes: int = 2) -> Outcome:
            if scenario not in outcomes:
                folder = tmp_path_factory.mktemp(scenario)
                program.stdin.write(json.dumps([scenario, processes, str(folder)]).encode() + b"\n")
                program.stdin.flush()
                answer = program.stdout.readline()
                assert answer, f"the program has ended:\n{errors.read_text()}"
                logs = [f"--- process {log.stem}\n{log.read_text()}" for log in sorted(folder.glob("*.log"))]
                assert json.loads(answer) == [0] * processes, f"exit codes {answer!r}\n" + "\n".join(logs)
                outcomes[scenario] = Outcome(
                    folder,
                    [load_file(folder / f"{rank}.safetensors") for rank in range(processes)],
                    [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)],
                )
            return outcomes[scenario]

        yield run_once
        program.stdin.close()


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert expected
    assert all(name in found for name in expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


def assert_trained(found: dict[str, torch.Tensor]) -> None:
    """The steps are large enough for differences to show."""
    assert min(float(tensor.abs().max()) for tensor in found.values()) > 1e-3


def offsets_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: tensor for n, tensor in tensors.items() if n.startswith("base_model.") and "svf_offset" in n}


def bases_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: tensor for n, tensor in tensors.items() if n.startswith("base_model.") and "svf_offset" not in n}


def under(prefix: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}


ROUNDING = 1e-6  # offsets are of size 0.1; sums over a batch are taken in another order


@pytest.mark.parametrize("scenario", ["ddp", "trainer", "fsdp2", "fsdp1", "first_process_meta", "first_process_nan"])
def test_two_processes_train_as_one_does(run: Run, scenario: str) -> None:
    expected = run("single", processes=1).tensors[0]
    assert_trained(expected)
    first, second = run(scenario).tensors
    assert_same(offsets_of(second), offsets_of(first))
    assert_same(first, expected, ROUNDING)


def test_fsdp2_trains_float32_offsets_beside_bfloat16_weights(run: Run) -> None:
    expected = run("single_bfloat16", processes=1).tensors[0]
    assert_trained(expected)
    first, second = run("fsdp2_bfloat16").tensors
    assert all(tensor.dtype == torch.float32 for tensor in offsets_of(first).values())
    assert_same(offsets_of(second), offsets_of(first))
    assert_same(first, expected, ROUNDING)


def test_the_scenarios_are_what_they_claim_to_be(run: Run) -> None:
    for facts in run("trainer").facts:
        assert facts == {"processes": 2, "wrapped": "DistributedDataParallel"}
    for scenario in ("fsdp2", "fsdp2_bfloat16", "first_process_meta", "first_process_nan"):
        assert all(facts["is_sharded"] for facts in run(scenario).facts)


def test_ddp_never_broadcasts_a_basis(run: Run) -> None:
    """Shapes (32, 32) and (16, 16) are those of the bases, (4,) those of the rotary embedding, which DDP does send."""
    for facts in run("ddp").facts:
        without_the_list = facts["without the list"]
        assert without_the_list.count([32, 32]) == 10 and without_the_list.count([16, 16]) == 4
        assert facts["sent"].count([4]) > 0
        assert facts["sent"].count([32, 32]) == 4  # q_proj and o_proj of two layers, once, as parameters
        assert facts["sent"].count([16, 16]) == 0
        assert set(facts["found"]) == {"SVFModel", "compiled", "transformers"}
        assert all(shapes == [[4], [4]] for shapes in facts["found"].values())


@pytest.mark.parametrize("scenario", ["fsdp2", "fsdp2_bfloat16", "fsdp1", "first_process_meta", "first_process_nan"])
def test_a_sharded_model_saves_an_ordinary_expert(run: Run, scenario: str) -> None:
    """Same entries as from one process, values bit for bit those that were trained, and so the same model."""
    outcome, ordinary = run(scenario), run("single_bfloat16" if "bfloat16" in scenario else "single", processes=1)
    saved = load_file(outcome.folder / "expert" / "adapter_model.safetensors")
    expected = load_file(ordinary.folder / "expert" / "adapter_model.safetensors")
    assert {name: t.shape for name, t in saved.items()} == {name: t.shape for name, t in expected.items()}
    assert_same(
        {name.replace(".weight", ".default.weight"): t for name, t in saved.items()}, offsets_of(outcome.tensors[0])
    )
    configs = [json.loads((o.folder / "expert" / "adapter_config.json").read_text()) for o in (outcome, ordinary)]
    assert configs[0]["base_fingerprint"] and configs[0]["base_fingerprint"] == configs[1]["base_fingerprint"]
    for tensors in outcome.tensors:
        assert torch.equal(tensors["logits.trained"], tensors["logits.reloaded"])


@pytest.mark.parametrize("scenario", ["first_process_meta", "first_process_nan"])
def test_training_resumes_from_sharded_checkpoints(run: Run, scenario: str) -> None:
    for tensors in run(scenario).tensors:
        assert_same(under("resumed.", tensors), offsets_of(tensors))


@pytest.mark.parametrize("scenario", ["first_process_meta", "first_process_nan"])
def test_bases_come_from_the_process_that_has_the_weights(run: Run, scenario: str) -> None:
    """In process 1 the weights were on the meta device, or NaN, when the adapter was added."""
    first, second = run(scenario).tensors
    assert len(bases_of(first)) == 28  # Q and singular values of 14 matrices
    assert_same(bases_of(second), bases_of(first))
    assert all(torch.isfinite(tensor).all() for tensor in second.values())
    facts = run(scenario).facts
    assert len(facts[0]["sketches"]) == 14 and facts[1]["sketches"] == facts[0]["sketches"]


def test_what_the_first_process_refuses_no_process_accepts(run: Run) -> None:
    for facts in run("first_process_fails").facts:
        assert "'model.layers.1.mlp.up_proj'" in facts["zero weight"]
        assert "the weight is zero" in facts["zero weight"]
        assert "belongs to another base model" in facts["other base"]


def test_an_expert_loads_where_only_the_first_process_has_the_weights(run: Run) -> None:
    first, second = run("first_process_fails").tensors
    assert {name.partition(".")[0] for name in first} == {"plain", "saved"}  # saved: with `save_basis`
    assert_same(second, first)
    expected = bases_of(run("first_process_meta").tensors[0])
    assert_same(under("plain.", first), expected)
    assert_same(under("saved.", first), expected)


@pytest.mark.parametrize("kind", ["FSDP2", "FSDP1", "tensor parallel"])
def test_an_adapter_that_comes_after_sharding_is_refused(run: Run, kind: str) -> None:
    remedy = "without `tp_plan`" if kind == "tensor parallel" else "add the adapter, and shard it afterwards"
    for facts in run("sharded_before").facts:
        assert facts[kind]["is_unchanged"]
        assert "SVF cannot adapt a model that is sharded already: 'model." in facts[kind]["message"]
        assert remedy in facts[kind]["message"]


@pytest.mark.parametrize("scenario", ["fsdp2", "fsdp1"])
def test_a_second_adapter_on_a_sharded_model_is_refused(run: Run, scenario: str) -> None:
    for facts in run(scenario).facts:
        assert "shard it afterwards" in facts["add"]
        assert facts["adapters"] == ["default"]


@pytest.mark.parametrize(
    ("scenario", "attempt"),
    [
        ("fsdp2", "merge"),
        ("fsdp2", "merge and unload"),
        ("fsdp2_keeps_unsharded", "merge"),
        ("fsdp1", "merge"),
        ("fsdp1", "merge whole"),
    ],
)
def test_merging_into_shards_is_refused(run: Run, scenario: str, attempt: str) -> None:
    for facts in run(scenario).facts:
        assert "SVF cannot merge into a sharded model: 'model." in facts[attempt]
        assert "merge_and_unload()" in facts[attempt]
        assert not facts["is_merged"]
    assert all(facts["looks_whole"] for facts in run("fsdp2_keeps_unsharded").facts)


@pytest.mark.parametrize("attempt", ["merge one", "weight change"])
def test_a_sharded_weight_is_not_read(run: Run, attempt: str) -> None:
    for facts in run("fsdp2").facts:
        assert "cannot read the weight of 'model.layers.0.self_attn.q_proj'" in facts[attempt]


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed_zero3(run: Run) -> None:
    expected = run("single", processes=1).tensors[0]
    first, second = run("zero3").tensors
    assert_same(second, first)
    assert_same(first, expected, ROUNDING)
    for facts in run("zero3").facts:
        assert facts["is_partitioned"] and facts["is_loaded"]
        assert facts["merging changes"] and facts["unmerging restores"]
        assert "deepspeed.zero.GatheredParameters" in facts["merge"]
        assert "runs already" in facts["add"]
        assert "belongs to another base model" in facts["other base"]


def partition(model: nn.Module) -> None:
    """What DeepSpeed ZeRO-3 does to parameters, as far as can be seen without it."""
    for parameter in model.parameters():
        parameter.ds_id, parameter.ds_status = 0, SimpleNamespace(name="NOT_AVAILABLE")
        parameter.data = torch.empty(0)


def test_zero3_without_deepspeed_is_an_error(
    tiny_llama: Callable[..., LlamaForCausalLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    base = tiny_llama()
    partition(base)
    before = list(base.named_modules())
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.q_proj'.*`deepspeed` cannot be imported"):
        get_peft_model(base, SVFConfig())
    assert list(base.named_modules()) == before


def test_merging_under_zero3_is_an_error_outside_of_gathered_parameters(
    tiny_llama: Callable[..., LlamaForCausalLM],
) -> None:
    model = get_peft_model(tiny_llama(), SVFConfig())
    partition(model)
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.q_proj'.*GatheredParameters"):
        model.merge_adapter()
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, SVFLayer))


def test_fused_experts_under_zero3_are_an_error(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    base = tiny_llama()
    partition(base)
    with pytest.raises(ValueError, match=r"`target_parameters` under DeepSpeed ZeRO-3.*use FSDP2 or ZeRO-2"):
        get_peft_model(base, SVFConfig(target_parameters=["mlp.up_proj.weight"]))


def test_ddp_still_ignores_what_the_model_asked_for(tiny_llama: Callable[..., LlamaForCausalLM]) -> None:
    base = tiny_llama()
    base._ddp_params_and_buffers_to_ignore = ["model.rotary_emb.inv_freq"]
    get_peft_model(base, SVFConfig())
    assert "model.rotary_emb.inv_freq" in base._ddp_params_and_buffers_to_ignore
    assert "base_model.model.model.layers.0.mlp.up_proj.svf_basis" in base._ddp_params_and_buffers_to_ignore
