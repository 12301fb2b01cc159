"""Switching the active expert of a large model with `set_adapter`, in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from models import LINEAR_LAYERS, Shape, adapt, add_experts, basis_cache, build_base
from peft import PeftModel
from report import Row
from timing import Spread

from quantities.setting import Setting


GOAL_MS = 2.0
# Switching touches no weight, so only the number of modules counts: 29 layers of 7 matrices, 203 in all.
SMALL = Shape("small", hidden=32, intermediate=64, layers=29, heads=4)


def measure(setting: Setting) -> Iterator[Row]:
    """`set_adapter` on a model of 203 adapted matrices, with 2 and with 32 experts loaded."""
    small = SMALL.with_layers(2) if setting.quick else SMALL
    for experts in (2, 4) if setting.quick else (2, 32):
        names = [f"expert{number}" for number in range(experts)]
        models = {method: _with_experts(setting, small, method, names) for method in ("SVF", "LoRA r16")}
        switches = {method: (lambda model=model: _switch_twice(model)) for method, model in models.items()}
        seconds = setting.time(switches, times_more=4)
        yield Row(
            f"set_adapter with {experts} experts loaded, ms",
            f"{small.layers * len(LINEAR_LAYERS)} adapted matrices",
            {method: Spread.of([1e3 * value / 2 for value in values]) for method, values in seconds.items()},
            GOAL_MS if experts == 2 else None,
            "setting requires_grad of every offset, as PEFT promises, takes this long in Python",
        )


def _with_experts(setting: Setting, shape: Shape, method: str, names: list[str]) -> PeftModel:
    with basis_cache("off"):
        model = adapt(build_base(shape, torch.float32, setting.device, setting.seed), method, names[0])
        add_experts(model, method, names[1:])
    return model


def _switch_twice(model: PeftModel) -> None:
    model.set_adapter("expert1")
    model.set_adapter("expert0")
