"""Two processes and gradient accumulation against one process: the same curve, scores and expert, within rounding.

Real `accelerate launch` with the configurations of examples/accelerate_configs. On CPUs with gloo; NCCL was not run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed


if not (distributed.is_available() and distributed.is_gloo_available()):
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

PROGRAM = Path(__file__).with_name("program.py")
CONFIGS = Path(__file__).resolve().parents[3] / "examples" / "accelerate_configs"
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed (it is in no extra)"
)
CURVES = ["curve", "accumulated", "group", "masked", "unjudged"]
LAUNCHES = {
    "cpu": [*CURVES, "evaluation", "best", "start is best", "resumed", "sampled"],
    "fsdp2": ["curve", "evaluation", "best", "start is best", "resumed", "sampled"],
    "deepspeed_zero2": ["curve", "best", "start is best", "sampled"],
    "deepspeed_zero3": ["curve", "from path", "from path in bfloat16", "evaluation", "sampled"],
}
DEEPSPEED = [config for config in LAUNCHES if "deepspeed" in config]
SHARDED = ["cpu", "fsdp2", *(pytest.param(config, marks=needs_deepspeed) for config in DEEPSPEED)]
ROUNDING = 1e-5  # of metrics, relative; offsets are of size 0.1, and sums over a batch are taken in another order
TIMING = ("runtime", "per_second", "time", "flos", "loss_scale")


def import_program() -> Any:
    spec = importlib.util.spec_from_file_location("scale_program", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


program = import_program()


@dataclass
class Outcome:
    """What one scenario left behind, by process."""

    folder: Path
    facts: list[dict[str, Any]]
    offsets: list[dict[str, Tensor]]


Launch = Callable[[str, str], Outcome]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """`launched(config, scenario)`: the outcome in two processes; all scenarios of a configuration run at once."""
    folders: dict[str, Path] = {}

    def outcome(config: str, scenario: str) -> Outcome:
        if config not in folders:
            folders[config] = tmp_path_factory.mktemp(config)
            launch(config, folders[config])
        names = [folders[config] / f"{scenario}.{rank}" for rank in range(2)]
        assert Path(f"{names[0]}.json").is_file(), (folders[config] / "log").read_text()[-8000:]
        return Outcome(
            folders[config] / scenario,
            [json.loads(Path(f"{name}.json").read_text()) for name in names],
            [load_file(f"{name}.safetensors") for name in names],
        )

    return outcome


def launch(config: str, folder: Path) -> None:
    program.save_bases(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", "2", "--main_process_port", port]
    if config == "fsdp2":
        options += ["--mixed_precision", "no"]  # to compare it with one process in float32
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, str(PROGRAM), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with (folder / "log").open("w") as log:
        subprocess.run(
            [*command, *LAUNCHES[config]], stdout=log, stderr=log, env=environment, timeout=600, check=False
        )


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """`single(scenario)`: the outcome in this process alone."""
    outcomes: dict[str, Outcome] = {}

    def outcome(scenario: str) -> Outcome:
        if scenario not in outcomes:
            parent = tmp_path_factory.mktemp("single")
            program.save_bases(parent)
            facts, offsets = program.SCENARIOS[scenario](parent / scenario)
            outcomes[scenario] = Outcome(parent / scenario, [facts], [offsets])
        return outcomes[scenario]

    return outcome


Single = Callable[[str], Outcome]


def assert_same_history(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        numbers = {k: v for k, v in theirs.items() if isinstance(v, float | int) and not any(t in k for t in TIMING)}
        assert {k: ours[k] for k in numbers} == pytest.approx(numbers, rel=ROUNDING, abs=ROUNDING)


def assert_same_offsets(found: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    assert expected and all(offsets.keys() == expected.keys() for offsets in found)
    for name, tensor in expected.items():
        assert torch.equal(found[0][name], found[1][name])
        torch.testing.assert_close(found[0][name], tensor, rtol=0, atol=ROUNDING)


def history(facts: dict[str, Any]) -> list[dict[str, Any]]:
    return facts["history"]


@pytest.mark.parametrize(
    ("config", "wrapper"),
    [
        ("cpu", "DistributedDataParallel"),
        ("fsdp2", "FSDPPeftModel"),
        *(pytest.param(config, "DeepSpeedEngine", marks=needs_deepspeed) for config in DEEPSPEED),
    ],
)
def test_two_processes_really_run(launched: Launch, config: str, wrapper: str) -> None:
    """`accelerate launch --cpu` would start one, and say nothing."""
    for facts in launched(config, "curve").facts:
        assert (facts["processes"], facts["backend"], facts["wrapped"]) == (2, "gloo", wrapper)
        assert facts["sharded"] == (config == "fsdp2")
        assert facts["dtypes"] == ["torch.float32"]


@pytest.mark.parametrize(
    ("config", "scenario"),
    [
        *(("cpu", scenario) for scenario in CURVES),
        ("fsdp2", "curve"),
        *(pytest.param(config, "curve", marks=needs_deepspeed) for config in DEEPSPEED),
        pytest.param("deepspeed_zero3", "from path", marks=needs_deepspeed),
    ],
)
def test_the_curve_is_that_of_one_process(launched: Launch, single: Single, config: str, scenario: str) -> None:
    """Every logged number and the offsets of 5 steps, with clipping, schedule, KL and answers of unequal lengths."""
    two, one = launched(config, scenario), single(scenario)
    assert max(float(offset.abs().max()) for offset in one.offsets[0].values()) > 0.05
    norms = [entry["grad_norm"] for entry in history(one.facts[0]) if "grad_norm" in entry]
    assert min(norms) < 0.5 < max(norms), "some steps are clipped and others not"
    for facts in two.facts:
        assert_same_history(history(facts), history(one.facts[0]))
    assert_same_offsets(two.offsets, one.offsets[0])


def test_accumulation_gives_the_curve_of_the_whole_batch(single: Single) -> None:
    whole, accumulated = single("curve"), single("accumulated")
    assert_same_history(history(accumulated.facts[0]), history(whole.facts[0]))
    assert_same_offsets(accumulated.offsets * 2, whole.offsets[0])


@pytest.mark.parametrize("config", ["cpu", "fsdp2", pytest.param("deepspeed_zero3", marks=needs_deepspeed)])
def test_each_sample_is_counted_once(launched: Launch, single: Single, config: str) -> None:
    """21 and 6 samples in batches of 8, two named sets: every metric of an evaluation is that of one process."""
    expected = single("evaluation").facts[0]["metrics"]
    assert {"eval_valid_reward", "eval_other_kl", "eval_valid_completions/mean_length"} <= expected.keys()
    rewards = [1.0 if i % 2 else -1.0 for i in range(21) if i % 3]
    assert expected["eval_valid_rewards/by_row/mean"] == pytest.approx(sum(rewards) / len(rewards))
    for facts in launched(config, "evaluation").facts:
        measured = {name for name in expected if "preparation_time" in name}  # logged by the first evaluation alone
        found = {name: value for name, value in facts["metrics"].items() if name not in measured}
        assert_same_history([found], [{name: value for name, value in expected.items() if name not in measured}])


def test_evaluation_before_training_does_not_keep_processes_apart(launched: Launch, single: Single) -> None:
    """transformers 5.23 would not wrap the model in DDP after it: each process would train for itself."""
    two = launched("cpu", "evaluation")
    assert [facts["refused"] for facts in two.facts] == ["", ""]
    assert [facts["wrapped"] for facts in two.facts] == ["DistributedDataParallel"] * 2
    assert_same_offsets(two.offsets, single("evaluation").offsets[0])


@pytest.mark.parametrize(
    ("config", "name"), [("fsdp2", "FSDP2"), pytest.param("deepspeed_zero3", "DeepSpeed", marks=needs_deepspeed)]
)
def test_sharded_evaluation_before_training_is_refused(launched: Launch, config: str, name: str) -> None:
    for facts in launched(config, "evaluation").facts:
        assert f"Under {name} the model" in facts["refused"] and "`eval_on_start=True`" in facts["refused"]


@pytest.mark.parametrize("config", ["cpu", "fsdp2", pytest.param("deepspeed_zero2", marks=needs_deepspeed)])
@pytest.mark.parametrize(("scenario", "step"), [("best", 4), ("start is best", None)])
def test_processes_agree_on_the_best_and_save_it(
    launched: Launch, single: Single, config: str, scenario: str, step: int | None
) -> None:
    two, one = launched(config, scenario), single(scenario)
    for facts in two.facts:
        assert facts["is_start"] == (step is None)
        assert (facts["best_step"], facts["best_metric"]) == (one.facts[0]["best_step"], one.facts[0]["best_metric"])
        assert step is None or facts["best_step"] == step
    assert_same_offsets(two.offsets, one.offsets[0])
    saved = load_file(two.folder / "expert" / "adapter_model.safetensors")
    saved = {name.replace(".weight", ".default.weight"): value for name, value in saved.items()}
    assert saved.keys() == two.offsets[0].keys()
    assert all(torch.equal(saved[name], two.offsets[0][name]) for name in saved)
    assert (two.folder / "expert" / "README.md").is_file()


@needs_deepspeed
@pytest.mark.parametrize("scenario", ["from path", "from path in bfloat16"])
def test_zero3_saves_a_complete_float32_expert(launched: Launch, scenario: str) -> None:
    outcome = launched("deepspeed_zero3", scenario)
    assert all(facts["dtypes"] == ["torch.float32"] for facts in outcome.facts)
    saved = load_file(outcome.folder / "expert" / "adapter_model.safetensors")
    saved = {name.replace(".weight", ".default.weight"): value for name, value in saved.items()}
    assert saved.keys() == outcome.offsets[0].keys()
    assert all(torch.equal(saved[name], outcome.offsets[0][name]) for name in saved)
    assert max(float(offset.abs().max()) for offset in saved.values()) > 0.05


@pytest.mark.parametrize("config", ["cpu", "fsdp2"])
def test_resuming_gives_the_numbers_of_an_uninterrupted_run(launched: Launch, single: Single, config: str) -> None:
    two = launched(config, "resumed")
    for facts in two.facts:
        assert facts["same"]
        assert_same_history(history(facts)[:4], history(single("resumed").facts[0])[:4])


@pytest.mark.parametrize("config", SHARDED)
def test_processes_sample_different_answers_and_learn_together(launched: Launch, config: str) -> None:
    """Real rollouts of one prompt: no process repeats what the other has sampled, and the reward rises."""
    first, second = launched(config, "sampled").facts
    assert len(first["answers"]) == len(second["answers"]) == 32
    assert len(set(first["answers"]) & set(second["answers"])) < 8
    rewards = [entry["reward"] for entry in history(first) if "reward" in entry]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
    assert first["base_unchanged"] and second["base_unchanged"]
