"""What a quantity is measured on: a shape, a dtype, a device, and how much work to spend on it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from models import Shape, adapt, basis_cache, build_base
from released_code import ReleasedCode
from timing import time_rounds
from torch import nn
from transformers import LlamaForCausalLM


# A CPU without AVX-512 multiplies bfloat16 matrices 5 to 80 times slower than float32 ones.
SLOW_BFLOAT16 = torch.backends.cpu.get_cpu_capability() == "AVX2"


@dataclass(frozen=True)
class Setting:
    """One column of the benchmark; `rounds` is how often every timing is repeated."""

    shape: Shape
    dtype: torch.dtype
    device: str
    rounds: int
    seed: int
    quick: bool
    clock: Callable[[], float]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        layers = "1 layer" if self.shape.layers == 1 else f"{self.shape.layers} layers"
        return f"{self.shape.name}, {layers}, {dtype}"

    @property
    def slow(self) -> bool:
        """Whether matrix products of this dtype are emulated here, so that work has to be cut down."""
        return self.device == "cpu" and self.dtype != torch.float32 and SLOW_BFLOAT16

    def build_base(self) -> LlamaForCausalLM:
        return build_base(self.shape, self.dtype, self.device, self.seed)

    def adapted(self, method: str) -> nn.Module:
        """A base model with an adapter, or the `ReleasedCode` for "U, S, V". Yours to change."""
        return copy.deepcopy(_adapted_on_cpu(self, method)).to(self.device)

    def time(
        self, candidates: dict[str, Callable[[], Any]], times_more: int = 1, most: int = 100, warm_up: bool = True
    ) -> dict[str, list[float]]:
        """Seconds of every candidate in every round (see [`time_rounds`])."""
        return time_rounds(candidates, min(self.rounds * times_more, most), self.clock, warm_up)

    def tokens(self, cuda: tuple[int, int], cpu: tuple[int, int], slow: tuple[int, int]) -> tuple[int, int]:
        """(rows, length) of a timed batch: as large as the device bears."""
        if self.device == "cuda":
            return cuda
        return slow if self.slow or self.quick else cpu


@lru_cache(maxsize=6)  # the methods of one setting: two of them decompose every weight, which takes long
def _adapted_on_cpu(setting: Setting, method: str) -> nn.Module:
    base = setting.build_base()
    if method == "U, S, V":
        return ReleasedCode(base).cpu()
    with basis_cache("off"):
        return adapt(base, method).cpu()
