"""The inputs of some rows of a batch, and the output of a batch from those of its groups of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad


def take_rows(model_inputs: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Some rows of a batch: of tensors along their first axis, of lists."""
    return {
        name: values[list(rows)] if isinstance(values, torch.Tensor) else [values[row] for row in rows]
        for name, values in model_inputs.items()
    }


def join_rows(outputs: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[int]], pad_token: int) -> dict[str, Any]:
    """
    The output of a batch from those of its groups, as text pipelines of transformers make them.

    Args:
        outputs (`Sequence[Mapping[str, Any]]`):
            Of each group, a list with one entry for each row, or a tensor: `input_ids` (rows, prompt),
            `generated_sequence` (rows, [sequences,] prompt + answer), any other (rows, sequences, [tokens, ...]).
        groups (`Sequence[Sequence[int]]`): the rows that each group has.
        pad_token (`int`): stands in front of shorter prompts and behind shorter answers; of other tensors, 0.
    """
    order = [row for rows in groups for row in rows]
    back = [order.index(row) for row in range(len(order))]
    prompt = max(output["input_ids"].shape[-1] for output in outputs)
    joined: dict[str, Any] = {}
    for name in outputs[0]:
        parts = [output[name] for output in outputs]
        if not isinstance(parts[0], torch.Tensor):
            rows = [value for part in parts for value in part]
            joined[name] = [rows[row] for row in back]
            continue
        if name in ("input_ids", "generated_sequence"):
            shifts = [prompt - output["input_ids"].shape[-1] for output in outputs]
            parts = [pad(part, (shift, 0), value=pad_token) for part, shift in zip(parts, shifts, strict=True)]
            parts = _of_one_length(parts, -1, pad_token)
        elif parts[0].dim() > 2:
            parts = _of_one_length(parts, 2, 0)
        joined[name] = torch.cat(parts)[back]
    return joined


def _of_one_length(parts: Sequence[torch.Tensor], axis: int, value: int) -> list[torch.Tensor]:
    longest = max(part.shape[axis] for part in parts)
    behind = [0, 0] * (parts[0].dim() - 1 - axis % parts[0].dim())  # `pad` counts axes from the last
    return [pad(part, (*behind, 0, longest - part.shape[axis]), value=value) for part in parts]
