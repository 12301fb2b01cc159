"""Merged experts: forward and decoding as fast as the base model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from models import random_tokens
from report import Row
from timing import ratios
from torch import nn

from quantities.setting import Setting


GOAL = 1.02
DECODED = 16  # tokens of one timed generation
TIMES_MORE = 5  # rounds than elsewhere: the differences are small


def measure(setting: Setting) -> Iterator[Row]:
    """Time of forward over a batch, and of greedy decoding of one row, after `merge_adapter`."""
    base = setting.build_base()
    models: dict[str, nn.Module] = {"base": base, "base again": copy.deepcopy(base)}  # how far equal models differ
    for method in ("SVF", "LoRA r16"):
        models[method] = setting.adapted(method).eval()
        models[method].merge_adapter()
    rows, length = setting.tokens(cuda=(8, 512), cpu=(2, 128), slow=(1, 16))
    batch = random_tokens(rows, length, setting.device, setting.seed)
    prompt = random_tokens(1, 8, setting.device, setting.seed)
    forward = {name: _forward(model, batch) for name, model in models.items()}
    decode = {name: _decode(model, prompt) for name, model in models.items()}
    yield _row(setting, f"merged forward, {rows} × {length} tokens, × of the base model", forward)
    yield _row(setting, "merged greedy decoding, × of the base model", decode)


def _row(setting: Setting, quantity: str, candidates: dict[str, Callable[[], object]]) -> Row:
    found = ratios(setting.time(candidates, times_more=1 if setting.slow else TIMES_MORE), "base")
    why = "each merged layer makes one Python call more than the base; merge_and_unload() returns a plain base model"
    values = {name: found[name] for name in ("SVF", "LoRA r16")}
    return Row(quantity, str(setting), values, GOAL, why, f"a second copy of the base model: {found['base again']}")


def _forward(model: nn.Module, tokens: torch.Tensor) -> Callable[[], object]:
    @torch.no_grad()
    def run() -> None:
        model(input_ids=tokens, use_cache=False)

    return run


def _decode(model: nn.Module, prompt: torch.Tensor) -> Callable[[], object]:
    mask = torch.ones_like(prompt)
    return lambda: model.generate(
        input_ids=prompt, attention_mask=mask, max_new_tokens=DECODED, min_new_tokens=DECODED, do_sample=False
    )
