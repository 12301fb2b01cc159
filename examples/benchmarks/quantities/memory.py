"""Memory that an adapter adds to the model, as a fraction of the adapted weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from models import LAYERS_OF_8B, METHODS, SHAPES, adapted_linears, add_experts
from report import Row
from timing import Spread
from torch import nn

from quantities.setting import Setting


EXPERTS = 100
GOAL, GOAL_8B = 0.50, 0.40
OFFSET_BYTES = 4  # float32
LORA_RANK = 16
SETTING_8B = f"Llama-3.1-8B, {LAYERS_OF_8B} layers, bfloat16, computed from its shapes"


def measure(setting: Setting) -> Iterator[Row]:
    """Parameters and buffers of the adapted model less those of the base, with 1 and with 100 experts."""
    base = setting.build_base()
    weights = _bytes_of(nn.ModuleList(adapted_linears(base).values()))
    one, further = {}, {}
    for method in METHODS:
        model = setting.adapted(method)
        one[method] = (_bytes_of(model) - _bytes_of(base)) / weights
        add_experts(model, method, ["second"])
        further[method] = (_bytes_of(model) - _bytes_of(base)) / weights - one[method]
    released = setting.adapted("U, S, V")
    one["U, S, V"] = (_bytes_of(released) - _bytes_of(base)) / weights
    further["U, S, V"] = sum(p.numel() * p.element_size() for p in released.decompositions.parameters()) / weights
    yield from _rows(str(setting), one, further, GOAL, f"{EXPERTS} experts: 1 and 2 measured, all further alike")


def compute_8b(setting: Setting) -> Iterator[Row]:
    """The same for Llama-3.1-8B in bfloat16, from its shapes alone."""
    element = torch.bfloat16.itemsize
    matrices = SHAPES["llama-8b"].matrices() * LAYERS_OF_8B
    weights = sum(rows * columns for rows, columns in matrices) * element
    basis = sum(min(shape) ** 2 for shape in matrices) * element
    offsets = sum(min(shape) for shape in matrices) * OFFSET_BYTES
    lora = sum(LORA_RANK * sum(shape) for shape in matrices) * OFFSET_BYTES
    factors = sum(min(shape) * (sum(shape) + 1) for shape in matrices) * element
    further = {"SVF": offsets / weights, "LoRA r16": lora / weights, "U, S, V": offsets / 2 / weights}
    one = {"SVF": (basis + offsets) / weights, "LoRA r16": lora / weights, "U, S, V": factors / weights}
    yield from _rows(SETTING_8B, one, further, GOAL_8B)


def _rows(
    setting: str, one: dict[str, float], further: dict[str, float], goal: float, note: str = ""
) -> Iterator[Row]:
    many = {name: Spread.exact(value + (EXPERTS - 1) * further[name]) for name, value in one.items()}
    yield Row(
        "extra memory with 1 expert, × of the adapted weights",
        setting,
        {name: Spread.exact(value) for name, value in one.items()},
        goal,
    )
    basis, offsets = one["SVF"] - further["SVF"], EXPERTS * further["SVF"]
    yield Row(
        f"extra memory with {EXPERTS} experts, × of the adapted weights",
        setting,
        many,
        goal,
        f"the basis stays as it is, {basis:.3f}; the {EXPERTS} float32 offsets are {offsets:.3f}",
        note,
    )


def _bytes_of(model: nn.Module) -> int:
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(storages.values())
