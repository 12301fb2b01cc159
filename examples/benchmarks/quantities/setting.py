"""What a quantity is measured on: a shape, a dtype, a device, and how much work to spend on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from models import Shape, build_base
from timing import time_rounds
from transformers import LlamaForCausalLM


# A CPU without AVX-512 multiplies bfloat16 matrices 5 to 80 times slower than float32 ones.
SLOW_BFLOAT16 = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")


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
        return f"{self.shape.name}, {self.shape.layers} layers, {dtype}"

    @property
    def slow(self) -> bool:
        """Whether matrix products of this dtype are emulated here, so that work has to be cut down."""
        return self.device == "cpu" and self.dtype != torch.float32 and SLOW_BFLOAT16

    def build_base(self) -> LlamaForCausalLM:
        return build_base(self.shape, self.dtype, self.device, self.seed)

    def time(
        self, candidates: dict[str, Callable[[], Any]], times_more: int = 1, warm_up: bool = True
    ) -> dict[str, list[float]]:
        """Seconds of every candidate in every round (see [`time_rounds`])."""
        return time_rounds(candidates, self.rounds * times_more, self.clock, warm_up)

    def tokens(self, cuda: tuple[int, int], cpu: tuple[int, int], slow: tuple[int, int]) -> tuple[int, int]:
        """(rows, length) of a timed batch: as large as the device bears."""
        if self.device == "cuda":
            return cuda
        return slow if self.slow or self.quick else cpu
