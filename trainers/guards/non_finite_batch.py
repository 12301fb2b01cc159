"""The batch that made a loss, a gradient or a reward not finite: the error, and the files it leaves to look at."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from peft_svf.experts.files import replace_file


class NonFiniteLossError(ArithmeticError):
    """Training met a loss, a gradient, a reward or a logit that is NaN or infinite, and has stopped before using it.

    Attributes:
        step (`int`): Number of optimizer steps before the failure. The offsets are those of this step.
        folder (`str`): Where the batch was saved, one pair of files a process.
    """

    def __init__(self, message: str, step: int, folder: str) -> None:
        super().__init__(message)
        self.step = step
        self.folder = folder


def save_batch(folder: str, process: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write `process-<process>.safetensors` and `process-<process>.json` into `folder`, each whole or not at all.

    Args:
        folder (`str`): Made if it does not exist.
        process (`int`): Rank of the process, whose share of the batch this is.
        tensors (`dict[str, Tensor]`): On any device.
        facts (`dict[str, Any]`): Plain data. Numbers that JSON does not know become `"nan"`, `"inf"` and `"-inf"`;
            what is no data, such as an image of a prompt, is named by its `str`.
    """
    on_cpu = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps(_strict(facts), indent=1, ensure_ascii=False, allow_nan=False, default=str)
    for suffix, data in (("safetensors", safetensors.torch.save(on_cpu)), ("json", text.encode())):
        replace_file(Path(folder) / f"process-{process}.{suffix}", partial(Path.write_bytes, data=data))


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_strict(entry) for entry in value]
    return value
