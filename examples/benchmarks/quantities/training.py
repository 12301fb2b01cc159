"""A training step without merging: its time and its peak memory, against LoRA of rank 16."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from functools import partial

import torch
from models import METHODS, random_tokens, training_step
from peak_memory import peak_bytes
from released_code import ReleasedCode
from report import Row
from timing import Spread, ratios
from torch import nn

from quantities.setting import Setting


TIME_GOAL, MEMORY_GOAL = 1.6, 1.15
REFERENCE = "LoRA r16"
BATCH = (4, 512)
COMPARED = [*METHODS, "U, S, V"]


def measure(setting: Setting) -> Iterator[Row]:
    """Time, then peak memory, of forward, backward and AdamW."""
    yield _time(setting)
    yield _peak(setting)


def _time(setting: Setting) -> Row:
    rows, length = setting.tokens(cuda=BATCH, cpu=BATCH, slow=(1, 16))
    tokens = random_tokens(rows, length, setting.device, setting.seed)
    # Composing every weight of the model in emulated bfloat16 takes minutes.
    compared = [*METHODS] if setting.slow else COMPARED
    steps = {name: _make_step(setting.adapted(name))(tokens) for name in compared}
    found = ratios(setting.time(steps), REFERENCE)
    return Row(
        f"training step, {rows} × {length} tokens, time, × of LoRA r16",
        str(setting),
        found,
        TIME_GOAL,
        _flops(setting),
        "bfloat16 matrix products are emulated on this CPU" if setting.slow else "",
    )


def _peak(setting: Setting) -> Row:
    rows, length = (2, 64) if setting.quick else BATCH
    tokens = random_tokens(rows, length, setting.device, setting.seed)
    peaks = {}
    for name in COMPARED:  # one at a time: nothing else may be alive on the device
        model = setting.adapted(name)
        peaks[name] = peak_bytes(model, _make_step(model), tokens)
        del model
        gc.collect()
    return Row(
        f"training step, {rows} × {length} tokens, peak memory, × of LoRA r16",
        str(setting),
        {name: Spread.exact(peak / peaks[REFERENCE]) for name, peak in peaks.items()},
        MEMORY_GOAL,
        "with so few tokens the basis weighs more than what the backward pass keeps",
        f"LoRA r16: {peaks[REFERENCE] / 1e6:.0f} MB, weights included",
    )


def _make_step(model: nn.Module) -> Callable[[torch.Tensor], Callable[[], object]]:
    return model.training_step if isinstance(model, ReleasedCode) else partial(training_step, model)


def _flops(setting: Setting) -> str:
    """Why a goal on time can be out of reach: per token, 8 r² beside 4 · out · in for forward and backward."""
    matrices = setting.shape.matrices()
    extra = sum(8 * min(shape) ** 2 for shape in matrices)
    base = sum(4 * rows * columns for rows, columns in matrices)
    return f"forward and backward take 4·out·in flops a token in the base, 8·r² in SVF, here {1 + extra / base:.2f}×"
