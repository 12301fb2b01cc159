"""Made-up experts for pictures and tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from peft_svf.experts import Expert
from peft_svf.tuner.config import SVFConfig


@pytest.fixture(scope="session")
def make_expert() -> Callable[..., Expert]:
    """`make_expert({name: shape or values})`: an expert with these offsets, drawn where only a shape is given."""

    def make(offsets: Mapping[str, object], seed: int = 0, **metadata: object) -> Expert:
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for name, values in offsets.items():
            is_shape = isinstance(values, tuple)
            made[name] = 0.1 * torch.randn(*values, generator=generator) if is_shape else torch.tensor(values)
        return Expert(made, SVFConfig(target_modules=set(made)), metadata, source="the expert made up")

    return make
