"""The size of a saved expert: 4 bytes a component and the names of its tensors."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from models import LAYERS_OF_8B, LINEAR_LAYERS, METHODS, SHAPES, Shape, adapt, basis_cache, build_base
from peft import PeftModel
from report import Row
from safetensors.torch import load_file, save_file
from timing import Spread

from quantities.memory import SETTING_8B
from quantities.setting import Setting


GOAL_KB = 16.0
WEIGHTS = "adapter_model.safetensors"


def measure(setting: Setting) -> Iterator[Row]:
    """Bytes of the file less 4 for each component, and the whole file beside those of the other methods."""
    sizes, overhead, matrices = {}, 0.0, 1
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            path = _save(setting.adapted(method), folder)
            sizes[method] = Spread.exact(path.stat().st_size / 1e3)
            if method == "SVF":
                overhead, matrices = _overhead(path)
    yield _overhead_row(str(setting), overhead, matrices)
    yield Row("expert file, KB", str(setting), sizes)


def measure_8b(setting: Setting) -> Iterator[Row]:
    """An expert for Llama-3.1-8B: the names from a small model of 32 layers, with vectors of the real sizes."""
    small = Shape("small", hidden=32, intermediate=64, layers=LAYERS_OF_8B, heads=4)
    ranks = [min(shape) for shape in SHAPES["llama-8b"].matrices()]
    with tempfile.TemporaryDirectory() as folder, basis_cache("off"):
        path = _save(adapt(build_base(small, torch.float32, "cpu", setting.seed), "SVF"), folder)
        names = list(load_file(path))
        rank_of = dict(zip(LINEAR_LAYERS, ranks, strict=True))
        tensors = {name: torch.zeros(rank_of[name.split(".svf_offset")[0].rpartition(".")[2]]) for name in names}
        save_file(tensors, path, metadata={"format": "pt"})
        overhead, matrices = _overhead(path)
        size = path.stat().st_size / 1e3
    yield _overhead_row(SETTING_8B, overhead, matrices, f"the whole file: {size:.0f} KB")


def _save(model: PeftModel, folder: str) -> Path:
    model.save_pretrained(folder)
    return Path(folder) / WEIGHTS


def _overhead(path: Path) -> tuple[float, int]:
    """KB of the file that are not components, and how many matrices it has."""
    tensors = load_file(path)
    components = sum(tensor.numel() for tensor in tensors.values())
    return (path.stat().st_size - 4 * components) / 1e3, len(tensors)


def _overhead_row(setting: str, overhead: float, matrices: int, note: str = "") -> Row:
    per_matrix = f"{1e3 * overhead / matrices:.0f} bytes for the name, shape and place of each of {matrices} matrices"
    return Row(
        "expert file beyond 4 bytes a component, KB",
        setting,
        {"SVF": Spread.exact(overhead)},
        GOAL_KB,
        per_matrix,
        note if overhead > GOAL_KB else f"{per_matrix}; {note}" if note else per_matrix,
    )
