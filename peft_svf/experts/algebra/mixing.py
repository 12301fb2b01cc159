"""Mixtures: what is linear in the offsets of experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from peft_svf.experts.algebra.common import (
    Facts,
    Weights,
    check_experts,
    modules,
    origin_of,
    stacked_offsets,
    with_offsets,
)
from peft_svf.experts.errors import ExpertError
from peft_svf.experts.expert import Expert


SAME_SUM = 1e-9  # how far Σα may be from 1 and still be 1


def mix(
    experts: Sequence[Expert],
    weights: Weights,
    residual: bool = True,
    normalize: bool = False,
    metadata: Facts = None,
) -> Expert:
    """
    The mixture of experts, z' = Σ αₖ zₖ (Transformer², arXiv 2501.06252, section 3.2, strategy C).

        residual:       offset' = Σ αₖ offsetₖ             (z' = Σ αₖ zₖ + 1 − Σα: the base model has the rest)
        not residual:   offset' = Σ αₖ offsetₖ + Σα − 1    (z' = Σ αₖ zₖ: the paper's formula as it stands)

    If the weights sum to 1, both are the same. Linear in the weights and in the offsets.

    Args:
        experts (`Sequence[Expert]`): K experts of one base model.
        weights (`Sequence[float]` or `Mapping[str, Sequence[float]]`):
            K weights α, of any sign; or such weights by module name or dotted beginning of one ("model.layers.3"), of
            which the longest that fits counts.
        residual (`bool`, *optional*, defaults to `True`): Which formula.
        normalize (`bool`, *optional*, defaults to `False`): Divide the weights by their sum first.
        metadata (`Mapping[str, Any]`, *optional*): Facts of the result: name, label, description and so on.

    Raises:
        ExpertError: See the module; or weights that are not K finite numbers, sum to 0 with `normalize`, or do not fit
            a module.
    """
    check_experts(experts, "a mixture")
    weights_of = _weights_by_module(weights, len(experts), normalize)
    settings = {"residual": residual, "normalize": normalize}
    formula = "offset' = Σ αₖ offsetₖ" if residual else "offset' = Σ αₖ offsetₖ + Σα − 1"
    formula = "offset' = Σ αₖ offsetₖ / Σα" if normalize else formula
    origin = origin_of("mix", formula, experts, settings, weights)
    return _combine(experts, weights_of, residual, origin, metadata)


def interpolate(first: Expert, second: Expert, t: float, metadata: Facts = None) -> Expert:
    """
    On the line from one expert to another: offset' = (1 − t) offset₁ + t offset₂, and so z' = (1 − t) z₁ + t z₂.

    Args:
        first, second (`Expert`): The ends.
        t (`float`): 0 is the first, 1 the second; others than those between extrapolate.
        metadata (`Mapping[str, Any]`, *optional*): See [`mix`].
    """
    check_experts([first, second], "`interpolate`")
    origin = origin_of("interpolate", "offset' = (1 − t) offset₁ + t offset₂", [first, second], {"t": t}, [1 - t, t])
    return _combine([first, second], _weights_by_module([1 - t, t], 2, False), True, origin, metadata)


def difference(first: Expert, second: Expert, metadata: Facts = None) -> Expert:
    """What the first expert has beyond the second: offset' = offset₁ − offset₂, z' = 1 + z₁ − z₂."""
    check_experts([first, second], "`difference`")
    origin = origin_of("difference", "offset' = offset₁ − offset₂", [first, second], {}, [1.0, -1.0])
    return _combine([first, second], _weights_by_module([1.0, -1.0], 2, False), True, origin, metadata)


def average(experts: Sequence[Expert], metadata: Facts = None) -> Expert:
    """
    The mean of K experts, for instance of one training with K seeds: offset' = Σ offsetₖ / K, z' = Σ zₖ / K.

    [`spread`] says how far they are apart.
    """
    check_experts(experts, "an average")
    weights = [1 / len(experts)] * len(experts)
    origin = origin_of("average", "offset' = Σ offsetₖ / K", experts, {}, weights)
    return _combine(experts, _weights_by_module(weights, len(experts), False), True, origin, metadata)


def scale(expert: Expert, factor: float, metadata: Facts = None) -> Expert:
    """
    The expert at another strength, as `model.set_strength` applies it: offset' = c offset, z' = 1 + c (z − 1).

    1 is the expert, 0 the base model; [`negate`] is −1.
    """
    check_experts([expert], "`scale`")
    origin = origin_of("scale", "offset' = c offset", [expert], {"factor": factor}, [factor])
    return _combine([expert], _weights_by_module([factor], 1, False), True, origin, metadata)


def negate(expert: Expert, metadata: Facts = None) -> Expert:
    """
    The opposite expert: offset' = −offset, z' = 2 − z; together with the expert, at weight 1 each, the base model.

    Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089) forgets a skill in this way. It is not the inverse of the
    changed weight.
    """
    check_experts([expert], "`negate`")
    origin = origin_of("negate", "offset' = −offset", [expert], {})
    return _combine([expert], _weights_by_module([-1.0], 1, False), True, origin, metadata)


def _combine(
    experts: Sequence[Expert],
    weights_of: Callable[[str], list[float]],
    residual: bool,
    origin: dict[str, Any],
    metadata: Facts,
) -> Expert:
    offsets = {}
    for name in modules(experts):
        weights = weights_of(name)
        surplus = 0.0 if residual else math.fsum(weights) - 1
        moves_all = abs(surplus) > SAME_SUM
        pairs = [(w, e) for w, e in zip(weights, experts, strict=True) if name in e.offsets and (w or moves_all)]
        if not pairs:
            continue
        stacked = stacked_offsets([expert for _, expert in pairs], name)
        mixture = torch.tensordot(torch.tensor([w for w, _ in pairs], dtype=torch.float64), stacked, dims=1)
        if moves_all:
            mixture = pad(mixture, (0, _components(experts, name) - mixture.shape[-1])) + surplus
        offsets[name] = mixture.float()
    if not offsets:  # all weights are 0: the base model, as an expert
        offsets = {name: torch.zeros_like(offset) for name, offset in experts[0].offsets.items()}
    return with_offsets(experts, offsets, {**(metadata or {}), "origin": origin})


def _components(experts: Sequence[Expert], name: str) -> int:
    """How many singular values the weight of a module has."""
    for expert in experts:
        if name in expert.fingerprint:
            return int(min(expert.fingerprint[name][:2]))
        if name in expert.offsets and expert.config.rank is None and not expert.config.rank_pattern:
            return expert.offsets[name].shape[-1]
    raise ExpertError(
        f"Weights that do not sum to 1 move all singular values of '{name}', and nothing says how many it has: use "
        "residual=True, or weights that sum to 1."
    )


def _weights_by_module(weights: Weights, count: int, normalize: bool) -> Callable[[str], list[float]]:
    groups = dict(weights) if isinstance(weights, Mapping) else {"": weights}
    made = {group: _checked_weights(each, count, normalize) for group, each in groups.items()}

    def weights_of(name: str) -> list[float]:
        beginning = name
        while beginning and beginning not in made:
            beginning = beginning.rpartition(".")[0]
        if beginning not in made:
            raise ExpertError(f"No weights are given for the module '{name}'; they are for {', '.join(made)}.")
        return made[beginning]

    return weights_of


def _checked_weights(weights: Sequence[float], count: int, normalize: bool) -> list[float]:
    try:
        made = [float(weight) for weight in weights]
    except (TypeError, ValueError) as error:
        raise ExpertError(f"Mixture weights are numbers, one for each expert, not {weights!r}.") from error
    if len(made) != count or not all(map(math.isfinite, made)):
        raise ExpertError(f"A mixture of {count} experts takes {count} finite weights, not {made}.")
    total = math.fsum(made) if normalize else 1.0
    if abs(total) <= SAME_SUM:
        raise ExpertError(f"The weights {made} sum to 0 and cannot be normalized.")
    return [weight / total for weight in made]
