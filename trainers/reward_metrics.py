"""Means of rewards over answers instead of over batches, for the metrics of an evaluation."""

from __future__ import annotations

import torch
from torch import Tensor


def total_rewards(per_func: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over reward functions, `(n, functions)` to `(n,)`; NaN where none of them could judge."""
    rewards = (per_func * weights.to(per_func.device)).nansum(1)
    return torch.where(per_func.isnan().all(1), torch.nan, rewards)


def exact_reward_metrics(per_func: Tensor, weights: Tensor, names: list[str]) -> dict[str, float]:
    """GRPO's reward metrics, exact for all answers of an evaluation: `per_func` is `(n, functions)`."""
    metrics = _mean_and_std("reward", "reward_std", total_rewards(per_func, weights))
    for name, column in zip(names, per_func.unbind(1), strict=True):
        metrics |= _mean_and_std(f"rewards/{name}/mean", f"rewards/{name}/std", column)
    return metrics


def _mean_and_std(mean_name: str, std_name: str, values: Tensor) -> dict[str, float]:
    values = values[~values.isnan()]
    return {mean_name: values.mean().item(), std_name: values.std().item() if len(values) > 1 else 0.0}


def mean_of_batches(values: list[float], sizes: list[int]) -> list[float]:
    """Mean of batch means, weighted by the sizes of the batches and without NaN, as a list of at most one number."""
    pairs = [(value, size) for value, size in zip(values, sizes, strict=True) if value == value]
    return [sum(v * s for v, s in pairs) / sum(s for _, s in pairs)] if pairs else []
