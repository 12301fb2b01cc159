"""Weights read one by one from a checkpoint on disk or on the Hub, never the whole model."""

from __future__ import annotations

import torch


class CheckpointWeights:
    def __init__(self, source: str) -> None:
        raise NotImplementedError

    def read(self, module_name: str) -> torch.Tensor:
        raise NotImplementedError
