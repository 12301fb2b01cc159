"""From rewards to advantages: the baseline that is subtracted, always from the *other* answers."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


Baseline = Literal["none", "batch", "group"]


def subtract_baseline(rewards: Tensor, baseline: Baseline, num_generations: int) -> Tensor:
    """Advantages of a generation batch.

    The baseline of an answer is the mean reward of the other answers of the batch or of its own prompt. Leaving the
    answer itself out keeps the policy gradient unbiased, also in small batches.

    Args:
        rewards (`Tensor`):
            Rewards of shape `(n,)`, the `num_generations` answers to one prompt next to each other. NaN marks an
            answer that could not be judged: its advantage is 0 and it counts in no mean.
        baseline (`str`): `"none"` keeps the rewards, `"batch"` and `"group"` subtract the mean of the others.
        num_generations (`int`): Answers per prompt.

    Returns:
        `Tensor`: Shape `(n,)`, without NaN.
    """
    judged = ~rewards.isnan()
    rewards = torch.where(judged, rewards, 0.0)
    if baseline == "none":
        return rewards
    size = len(rewards) if baseline == "batch" else num_generations
    grouped = rewards.view(-1, size)  # (groups, size)
    others = (judged.view(-1, size).sum(1, keepdim=True) - 1).clamp(min=1)  # (groups, 1)
    means = (grouped.sum(1, keepdim=True) - grouped) / others  # (groups, size)
    return torch.where(judged, rewards - means.view(-1), 0.0)
