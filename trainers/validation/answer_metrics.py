"""Metrics of answers, each counted once: equal for any number of micro-batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class EvalAnswers:
    """What is known of every answer of an evaluation, in the order of the dataset.

    Means over batches would weigh the last, smaller batch too much, and with several processes it is filled up with
    answers that have been counted already.
    """

    def __init__(self) -> None:
        self._columns: dict[str, list[Tensor]] = {}

    def clear(self) -> None:
        self._columns.clear()

    def add(self, columns: dict[str, Tensor]) -> None:
        """Append values of shape `(n,)`, gathered over processes."""
        for name, values in columns.items():
            self._columns.setdefault(name, []).append(values)

    def metrics(self, n: int | None = None) -> dict[str, float]:
        """Metrics of the first `n` answers, by default of all."""
        answers = {name: torch.cat(values)[:n] for name, values in self._columns.items()}
        return {**score_metrics(answers), **length_metrics(answers["length"], answers["ended"].bool())}


def score_metrics(answers: dict[str, Tensor], tokens: Tensor | float | None = None) -> dict[str, float]:
    """Metrics of a loss from its parts for each answer.

    Args:
        answers (`dict[str, Tensor]`):
            `policy_loss`, `tokens` (how many were scored), `entropy` and, with a reference, `kl` (both summed over
            tokens), each of shape `(n,)`.
        tokens (`float`, *optional*):
            What `entropy` and `kl` are divided by, where `answers` are one of several shares of a batch. Defaults to
            the tokens of `answers`.

    Returns:
        `dict[str, float]`: `policy_loss`, `entropy`, `kl` (means over tokens) and `kl_sequence`, in nats.
    """
    tokens = answers["tokens"].sum() if tokens is None else torch.as_tensor(tokens)
    tokens = tokens.clamp(min=1)
    metrics = {"policy_loss": answers["policy_loss"].mean(), "entropy": answers["entropy"].sum() / tokens}
    if "kl" in answers:
        metrics |= {"kl": answers["kl"].sum() / tokens, "kl_sequence": answers["kl"].mean()}
    return dict(zip(metrics, torch.stack(list(metrics.values())).tolist(), strict=True))  # one wait for the device


def lengths_and_ends(output: dict[str, Any], ending_ids: list[int]) -> dict[str, Tensor]:
    """Length in tokens of each answer, and whether it has ended by itself: `length` and `ended`, of shape `(n,)`.

    Args:
        output (`dict`):
            What `GRPOTrainer` makes of a generated batch: `completion_ids`, padded on the right, `completion_mask`,
            all 0 in an answer that was cut off and masked for it, and perhaps `tool_mask`, 0 at what a tool wrote.
        ending_ids (`list[int]`): Tokens that end an answer.
    """
    ids, mask = output["completion_ids"], output["completion_mask"]  # (n, length)
    last = ids.gather(1, (mask.sum(1) - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
    masked = mask.sum(1) == 0
    ended = torch.isin(last, torch.tensor(ending_ids, device=ids.device)) & ~masked
    written = mask * output["tool_mask"] if output.get("tool_mask") is not None else mask
    return {"length": torch.where(masked, ids.size(1), written.sum(1)), "ended": ended}


def length_metrics(lengths: Tensor, ended: Tensor) -> dict[str, float]:
    """GRPO's metrics of lengths; those of answers that have ended are 0 where none has."""
    lengths = lengths.float()
    metrics = {"completions/clipped_ratio": 1.0 - ended.float().mean()}
    for suffix, chosen in {"length": lengths, "terminated_length": lengths[ended]}.items():
        chosen = chosen if len(chosen) else lengths.new_zeros(1)
        for name in ("mean", "min", "max"):
            metrics[f"completions/{name}_{suffix}"] = getattr(chosen, name)()
    return {name: value.item() for name, value in metrics.items()}
