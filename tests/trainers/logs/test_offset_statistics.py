"""Statistics of z − 1, against the weights that the layers really run with."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from peft_svf import SVFConfig
from peft_svf.trainers import SVFPolicyGradientTrainer
from peft_svf.trainers.logs.offset_statistics import OffsetStatistics, groups_of
from peft_svf.tuner.layer import SVFLayer


def scales_in_the_weights(model: PeftModel) -> dict[str, Tensor]:
    """z − 1 of each adapted weight by module name, from the weight change itself: ΔW = U diag(σ (z − 1)) Vᵀ."""
    scales = {}
    for name, layer in model.named_modules():
        if isinstance(layer, SVFLayer):
            weight = layer.get_base_weight().double()
            u, singular_values, vh = torch.linalg.svd(weight, full_matrices=False)
            change = layer.get_delta_weight("default").double()
            scales[name] = (u.T @ change @ vh.T).diagonal() / singular_values
    return scales


def rms(values: list[Tensor]) -> float:
    return torch.cat(values).square().mean().sqrt().item()


@pytest.mark.parametrize("config", [SVFConfig(init_weights=False), SVFConfig.paper(init_weights=False)])
def test_they_are_those_of_the_effective_weights(config: SVFConfig, tiny: SimpleNamespace) -> None:
    torch.manual_seed(1)
    model = get_peft_model(tiny.model(), config)
    scales = scales_in_the_weights(model)
    expected = {
        "z/rms_change": rms(list(scales.values())),
        "z/max_change": max(scale.abs().max().item() for scale in scales.values()),
        "z/layers/0": rms([scale for name, scale in scales.items() if ".layers.0." in name]),
        "z/layers/1": rms([scale for name, scale in scales.items() if ".layers.1." in name]),
        "z/modules/down_proj": rms([scale for name, scale in scales.items() if name.endswith("down_proj")]),
        "z/modules/q_proj": rms([scale for name, scale in scales.items() if name.endswith("q_proj")]),
    }
    found = OffsetStatistics(model).collect(by_place=True)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert len(found) == 2 + 2 + 7
    assert OffsetStatistics(model).collect() == {name: found[name] for name in ("z/rms_change", "z/max_change")}


def test_only_what_moved_shows(tiny: SimpleNamespace) -> None:
    model = get_peft_model(tiny.model(), SVFConfig())
    statistics = OffsetStatistics(model)
    assert set(statistics.collect(by_place=True).values()) == {0.0}
    moved = model.base_model.model.model.layers[1].mlp.down_proj.svf_offset["default"].weight
    moved.data[3] = -0.5
    found = statistics.collect(by_place=True)
    assert {name for name, value in found.items() if value} == {
        "z/rms_change",
        "z/max_change",
        "z/layers/1",
        "z/modules/down_proj",
    }
    assert found["z/max_change"] == 0.5
    assert found["z/modules/down_proj"] == pytest.approx(0.5 / math.sqrt(2 * 32))


def test_the_strength_and_all_active_adapters_count(tiny: SimpleNamespace) -> None:
    torch.manual_seed(1)
    model = get_peft_model(tiny.model(), SVFConfig(init_weights=False))
    alone = OffsetStatistics(model).collect()["z/rms_change"]
    model.add_adapter("second", SVFConfig())
    model.base_model.set_adapter(["default", "second"])
    layers = [module for module in model.modules() if isinstance(module, SVFLayer)]
    for layer in layers:
        layer.svf_offset["second"].load_state_dict(layer.svf_offset["default"].state_dict())
    assert OffsetStatistics(model).collect()["z/rms_change"] == pytest.approx(2 * alone)
    for layer in layers:
        layer.svf_strength["second"] = -0.5
    assert OffsetStatistics(model).collect()["z/rms_change"] == pytest.approx(0.5 * alone)
    model.set_adapter("default")
    assert OffsetStatistics(model).collect()["z/rms_change"] == pytest.approx(alone)


def test_a_part_of_the_offsets_gives_no_numbers(tiny: SimpleNamespace) -> None:
    model = get_peft_model(tiny.model(), SVFConfig())
    statistics = OffsetStatistics(model)
    offset = model.base_model.model.model.layers[0].mlp.up_proj.svf_offset["default"]
    offset.weight.data = torch.empty(0)  # as ZeRO-3 leaves it
    assert statistics.collect(by_place=True) == {}


def test_other_adapters_have_none(tiny: SimpleNamespace) -> None:
    model = get_peft_model(tiny.model(), LoraConfig(target_modules="all-linear"))
    assert OffsetStatistics(model).collect(by_place=True) == {}


def test_layers_of_several_stacks_keep_apart() -> None:
    names = ["vision.layers.0.fc1", "language.layers.0.mlp.fc1", "language.layers.11.mlp.experts.3.fc2", "projector"]
    assert groups_of(names) == {
        "layers/vision.layers.0": [0],
        "layers/language.layers.0": [1],
        "layers/language.layers.11": [2],
        "modules/fc1": [0, 1],
        "modules/fc2": [2],
        "modules/projector": [3],
    }


def test_a_run_logs_how_far_it_went(make_trainer: Callable[..., SVFPolicyGradientTrainer]) -> None:
    trainer = make_trainer(max_steps=2, eval_strategy="steps", eval_steps=1, report_to="none")
    trainer.train()
    last: dict[str, Any] = trainer.state.log_history[-1]
    scales = scales_in_the_weights(trainer.model)
    assert last["z/rms_change"] == pytest.approx(rms(list(scales.values())), rel=1e-3)
    assert last["z/layers/0"] > 0


@pytest.mark.parametrize("config", [SVFConfig(init_weights=False), SVFConfig.paper(init_weights=False)])
def test_shards_of_fsdp2_are_gathered(config: SVFConfig, tiny: SimpleNamespace, tmp_path: Path) -> None:
    """In one process, which shows that shards are recognized; in two, the numbers were equal as well."""
    model = get_peft_model(tiny.model(), config)
    statistics = OffsetStatistics(model)
    whole = statistics.collect(by_place=True)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(model)
        sharded = [p for p in model.parameters() if p.requires_grad and isinstance(p, DTensor)]
        assert len(sharded) == 14
        assert statistics.collect(by_place=True) == whole
    finally:
        distributed.destroy_process_group()
