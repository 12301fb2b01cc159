"""Controls: transfers that keep everything but the one thing that transfer is believed to depend on."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch


Control = Literal["shuffled", "reversed", "random"]
CONTROLS: dict[str, str] = {
    "shuffled": "the offsets of each matrix in random order (the paper's control): their values without their places",
    "reversed": "the offsets of each matrix in reversed order",
    "random": "normal numbers of the same norm in each matrix: as far from the base model, in no direction",
}


def controlled(offset: torch.Tensor, control: str | None, seed: int, name: str) -> torch.Tensor:
    """
    The offsets of one matrix under a control; as they are without one.

    Args:
        offset (`torch.Tensor`): Shape (k,), in the order of the target's singular values.
        control (`str`, *optional*): A key of `CONTROLS`.
        seed (`int`): Of the random controls; every matrix draws its own numbers from it.
        name (`str`): The matrix.
    """
    if control is None:
        return offset
    if control == "reversed":
        return offset.flip(0)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    if control == "shuffled":
        return offset[torch.randperm(len(offset), generator=generator)]
    direction = torch.randn(len(offset), generator=generator, dtype=torch.float64)
    return direction * (offset.norm() / direction.norm())
