"""MixtureSpace: which mixtures of experts a search may propose, and how its candidates become routes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_svf.dispatch.few_shot.optimizer import StartDistribution
from peft_svf.dispatch.route import Route


@dataclass(frozen=True)
class MixtureSpace:
    """
    Mixture weights α of K experts, for the whole model or for each of G groups of matrices.

    A candidate is a vector of D = K numbers, or D = G · K, group by group, each in `limits`. What it means:

    - normalized: αₖ = cₖ / Σ c, so that z' = Σ αₖ zₖ with Σ α = 1. All zeros, where this is 0 / 0 (the released code
      gives NaN there, for one in 60 draws and layer with three experts), means equal weights.
    - free: z' = Σ αₖ zₖ with α = c (Transformer², arXiv 2501.06252, section 3.2). As z is near 1, this scales every
      weight by about Σ α. The released code hides that: it rescales each matrix to its old nuclear norm, so that only
      the ratios of its α count. Ours computes what the paper writes, but a model does not survive much of it (the
      playground's: no loss for Σ α in [0.9, 1.2], 47 % right become 40 % at 0.8, 9 % at 0.7 and 23 % at 1.5). So
      where Σ α leaves `sum_limits`, the α of the group are scaled, all alike, to the nearer limit.
    - free with `residual`: offset' = Σ αₖ offsetₖ with α = c, so that the base model keeps the weight 1 − Σ α. Nothing
      is scaled, all zeros are the base model, and `sum_limits` do not matter.

    Weights "per layer" are `groups=bank.layer_groups()`. The released code's `per_layer` has weights for each matrix:
    `groups=bank.matrix_groups()`.

    Args:
        experts (`tuple[str, ...]`): Names of the K experts.
        groups (`tuple[str, ...]`, *optional*, defaults to `()`): As [`Route.groups`]; without, weights are global.
        normalized (`bool`, *optional*, defaults to `True`): Whether the weights of each group sum to 1.
        residual (`bool`, *optional*, defaults to `False`): Convention of free weights, see above.
        limits (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
            Smallest and largest coordinate of a candidate, those of the released code.
        sum_limits (`tuple[float, float]`, *optional*, defaults to `(0.8, 1.2)`):
            Smallest and largest Σ α of free weights without `residual`.

    Raises:
        ValueError: No experts, names used twice, limits that exclude all or allow a meaningless sum, or one normalized
            expert, which leaves nothing to search.
    """

    experts: tuple[str, ...]
    groups: tuple[str, ...] = ()
    normalized: bool = True
    residual: bool = False
    limits: tuple[float, float] = (0.0, 1.0)
    sum_limits: tuple[float, float] = (0.8, 1.2)

    def __post_init__(self) -> None:
        for field, names in (("experts", self.experts), ("groups", self.groups)):
            if len(set(names)) != len(names):
                raise ValueError(f"MixtureSpace: {field} must be distinct, got {list(names)}.")
        if not self.experts:
            raise ValueError("MixtureSpace: there are no experts to mix.")
        if self.normalized and len(self.experts) == 1:
            raise ValueError(
                f"MixtureSpace: the normalized weight of the only expert '{self.experts[0]}' is always 1; take the "
                "expert itself, or normalized=False."
            )
        lower, upper = self.limits
        signed = lower < 0 and (self.normalized or not self.residual)
        if not (math.isfinite(lower) and math.isfinite(upper) and lower < upper) or upper <= 0 or signed:
            raise ValueError(
                f"MixtureSpace: limits must be lower < upper with upper > 0, and lower >= 0 unless weights are free "
                f"with residual=True; got {self.limits}."
            )
        if not 0 < self.sum_limits[0] <= 1 <= self.sum_limits[1] < math.inf:
            raise ValueError(f"MixtureSpace: sum_limits must enclose 1 and be positive, got {self.sum_limits}.")

    @classmethod
    def configurations(
        cls, experts: Sequence[str], groups: Sequence[str] = (), residual: bool = False
    ) -> list[MixtureSpace]:
        """
        The configurations that the paper chooses from, simplest first: global or per group, normalized or free.

        Args:
            experts (`Sequence[str]`): Names of the experts; one expert has no normalized weights.
            groups (`Sequence[str]`, *optional*): Groups of the configurations that are not global; none without.
            residual (`bool`, *optional*, defaults to `False`): Convention of the free ones.
        """
        return [
            cls(tuple(experts), tuple(its_groups), normalized, residual and not normalized)
            for its_groups in ((), groups)[: 2 if groups else 1]
            for normalized in (True, False)
            if not normalized or len(experts) > 1
        ]

    @property
    def name(self) -> str:
        """Short name, fit for a folder: `global-normalized`, `grouped-free`, `grouped-free-residual`, ..."""
        kind = "normalized" if self.normalized else "free-residual" if self.residual else "free"
        return f"{'grouped' if self.groups else 'global'}-{kind}"

    @property
    def dimension(self) -> int:
        """D, numbers in a candidate."""
        return len(self.experts) * max(1, len(self.groups))

    @property
    def start(self) -> StartDistribution:
        """Equal weights 1 / K, deviating by half of the limits' width (released code, `optim_modules.CEM`)."""
        lower, upper = self.limits
        mean = torch.full((self.dimension,), 1 / len(self.experts), dtype=torch.float64).clamp(lower, upper)
        return StartDistribution(mean, torch.full_like(mean, (upper - lower) / 2), lower, upper)

    @property
    def single_experts(self) -> Tensor:
        """
        The candidates that are one expert alone, and the base model where weights are free with `residual`: elsewhere
        no candidate is the base model. Shape `(K, D)` or `(K + 1, D)`, float64.

        Raises:
            ValueError: `limits` exclude them.
        """
        lower, upper = self.limits
        if lower > 0 or (upper < 1 and not self.normalized):
            raise ValueError(f"MixtureSpace: no candidate in the limits {self.limits} is one expert alone.")
        alone = torch.eye(len(self.experts), dtype=torch.float64) * min(upper, 1.0)
        if self.residual and not self.normalized:
            alone = torch.cat([alone, torch.zeros_like(alone[:1])])
        return alone.repeat(1, max(1, len(self.groups)))

    def weights(self, candidates: Tensor) -> Tensor:
        """
        The mixture weights α of candidates.

        Args:
            candidates (`torch.Tensor` of shape `(N, D)`): Rows are candidates.

        Returns:
            `torch.Tensor` of shape `(N, K)`, with groups `(N, G, K)`: float64.

        Raises:
            ValueError: Another number of columns than D, or numbers that are not finite.
        """
        if candidates.ndim != 2 or candidates.shape[1] != self.dimension or not torch.isfinite(candidates).all():
            raise ValueError(
                f"Candidates must be finite and of shape (N, {self.dimension}), got shape {tuple(candidates.shape)}."
            )
        shape = (len(candidates), *((len(self.groups),) if self.groups else ()), len(self.experts))
        coordinates = candidates.double().clamp(*self.limits).reshape(shape)
        if self.residual and not self.normalized:
            return coordinates
        total = coordinates.sum(-1, keepdim=True)
        wanted = torch.ones_like(total) if self.normalized else total.clamp(*self.sum_limits)
        equal = (wanted / len(self.experts)).expand(shape)
        divisible = total > 1e-12
        return torch.where(divisible, coordinates * (wanted / total.where(divisible, 1.0)), equal)

    def to_route(self, candidates: Tensor, rows_each: int = 1) -> Route:
        """
        The route in which every candidate weights `rows_each` rows, one candidate after the other.

        Args:
            candidates (`torch.Tensor` of shape `(N, D)`): Rows are candidates.
            rows_each (`int`, *optional*, defaults to 1): Rows of a batch that each candidate gets.

        Returns:
            [`Route`] of N · `rows_each` rows.
        """
        weights = self.weights(candidates).float().repeat_interleave(rows_each, dim=0)
        # a sum of 1 that is rounded to float32 must not count as a scale
        residual = self.normalized or self.residual
        return Route(weights, self.experts, groups=self.groups, residual=residual)
