"""Another sampling temperature for a while: TRL fixes how answers are decoded when its trainer is made."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any


GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}


@contextlib.contextmanager
def decoding_temperature(trainer: Any, temperature: float) -> Iterator[None]:
    """Let a [`~trl.GRPOTrainer`] generate at `temperature`, 0 being greedy; everything is as before afterwards."""
    if trainer.use_vllm:
        saved = trainer.vllm_generation.temperature
        trainer.vllm_generation.temperature = temperature
        try:
            yield
        finally:
            trainer.vllm_generation.temperature = saved
        return
    change = GREEDY if temperature == 0.0 else {"temperature": temperature}
    config, kwargs = trainer.generation_config, trainer.generation_kwargs
    trainer.generation_config = copy.deepcopy(config)
    for name, value in change.items():
        setattr(trainer.generation_config, name, value)
    trainer.generation_kwargs = {**kwargs, **change}
    try:
        yield
    finally:
        trainer.generation_config, trainer.generation_kwargs = config, kwargs
