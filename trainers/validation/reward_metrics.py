"""Rewards of an evaluation in numbers: means over answers instead of over batches, and how sure they are."""

from __future__ import annotations

import torch
from torch import Tensor

from peft_svf.trainers.statistics import NORMAL_QUANTILE_975, grouped_mean, grouped_success_interval


def total_rewards(per_func: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum over reward functions, `(n, functions)` to `(n,)`; NaN where none of them could judge."""
    rewards = (per_func * weights.to(per_func.device)).nansum(1)
    return torch.where(per_func.isnan().all(1), torch.nan, rewards)


def exact_reward_metrics(
    per_func: Tensor, weights: Tensor, names: list[str], answers_per_prompt: int = 1
) -> dict[str, float]:
    """GRPO's reward metrics, exact for all answers of an evaluation, and 95 % intervals.

    An answer that no reward function could judge enters no mean, no success rate and no interval; `unjudged` counts
    them.

    Args:
        per_func (`Tensor`): Rewards, shape `(n, functions)`, the answers to one prompt next to each other.
        weights (`Tensor`): Weights of the functions, shape `(functions,)`.
        names (`list[str]`): Names of the functions.
        answers_per_prompt (`int`, *optional*, defaults to 1): Only answers to different prompts are independent.

    Returns:
        `dict[str, float]`: `reward`, `reward_std`, `rewards/<name>/mean` and `/std`, `unjudged`, and what
        [`reward_interval`] returns.
    """
    totals = total_rewards(per_func, weights)
    metrics = _mean_and_std("reward", "reward_std", totals)
    for name, column in zip(names, per_func.unbind(1), strict=True):
        metrics |= _mean_and_std(f"rewards/{name}/mean", f"rewards/{name}/std", column)
    return metrics | reward_interval(totals, answers_per_prompt) | {"unjudged": int(totals.isnan().sum())}


def reward_interval(totals: Tensor, answers_per_prompt: int = 1) -> dict[str, float]:
    """95 % interval of the mean reward, and for rewards of −1 and +1 the success rate with its own.

    Args:
        totals (`Tensor`): Total rewards, shape `(n,)`, NaN for an answer that could not be judged.
        answers_per_prompt (`int`, *optional*, defaults to 1): Answers to one prompt, next to each other.

    Returns:
        `dict[str, float]`: If all judged rewards are −1 or +1, `success` (share of +1), `success_low` and
        `success_high` (Wilson), and `reward_low` and `reward_high`, the same on the scale of the reward. For other
        rewards only the last two: mean ± 1.96 standard errors, nothing for fewer than two judged prompts.
    """
    groups = [[r for r in group if r == r] for group in totals.view(-1, answers_per_prompt).tolist()]
    judged = totals[~totals.isnan()]
    if not len(judged):
        return {}
    if bool(((judged.abs() - 1.0).abs() < 1e-6).all()):  # weights may sum to 1 up to rounding
        share, low, high = grouped_success_interval([[r > 0.0 for r in group] for group in groups])
        success = {"success": share, "success_low": low, "success_high": high}
        return success | {"reward_low": 2.0 * low - 1.0, "reward_high": 2.0 * high - 1.0}
    mean, error = grouped_mean(groups)
    if error != error:
        return {}
    half = NORMAL_QUANTILE_975 * error
    return {"reward_low": mean - half, "reward_high": mean + half}


def prompt_means(totals: Tensor, answers_per_prompt: int) -> Tensor:
    """Mean reward of the judged answers to each prompt, `(n,)` to `(prompts,)`, in float64; NaN if there is none."""
    return totals.double().view(-1, answers_per_prompt).nanmean(1)


def _mean_and_std(mean_name: str, std_name: str, values: Tensor) -> dict[str, float]:
    values = values[~values.isnan()]
    return {mean_name: values.mean().item(), std_name: values.std().item() if len(values) > 1 else 0.0}


def mean_of_batches(values: list[float], sizes: list[int]) -> list[float]:
    """Mean of batch means, weighted by the sizes of the batches and without NaN, as a list of at most one number."""
    pairs = [(value, size) for value, size in zip(values, sizes, strict=True) if value == value]
    return [sum(v * s for v, s in pairs) / sum(s for _, s in pairs)] if pairs else []
