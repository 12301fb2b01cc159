"""The configurations that are searched with a bank: the paper's four, or the user's once they are known to work."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peft_svf.dispatch.few_shot.mixture_space import MixtureSpace
from peft_svf.experts.bank import ExpertBank
from peft_svf.tuner.layer import SVFLayer
from peft_svf.tuner.mixed_batch import MixedBatch
from peft_svf.tuner.mixture import check_mixture


def usable_configurations(bank: ExpertBank, given: Sequence[MixtureSpace] | None) -> list[MixtureSpace]:
    """
    The configurations to choose from.

    Args:
        bank (`ExpertBank`): The experts to mix.
        given (`Sequence[MixtureSpace]`, *optional*):
            The user's. Without, the paper's four; if experts of limited `rank` have only some of the singular values,
            free weights leave the rest to the base model, as they cannot scale all values.

    Raises:
        ValueError: None, too few experts or unknown ones, experts that are more than offsets, or free weights that
            scale all singular values of experts of limited `rank`.
    """
    experts = list(bank.experts)
    if len(experts) < (2 if given is None else 1):
        known = f"only '{experts[0]}'" if experts else "none"
        raise ValueError(
            f"A mixture needs at least two experts, but the bank has {known}: add experts to it, or answer with "
            f"{'that one' if experts else 'the base model'}."
        )
    check_mixture(bank.model.peft_config, experts, [1.0] * len(experts), new_name="", normalize=False)
    if given is None:
        residual = _rank_problem(bank, experts) is not None
        return MixtureSpace.configurations(experts, bank.layer_groups(), residual)
    if not given:
        raise ValueError("`configurations` is empty: pass at least one, or leave it out for the paper's four.")
    for space in given:
        for name in space.experts:
            bank.check_expert(name)
        scales = not (space.normalized or space.residual)
        if scales and (problem := _rank_problem(bank, space.experts)):
            raise ValueError(f"The configuration '{space.name}' is not for these experts: {problem}") from problem
    return list(given)


def _rank_problem(bank: ExpertBank, experts: Sequence[str]) -> ValueError | None:
    """What prevents weights that do not sum to 1, which scale all singular values, of experts that hold only some."""
    scaling = MixedBatch(experts, torch.full((1, len(experts)), 2.0), residual=False)
    try:
        for layer in bank.model.modules():
            if isinstance(layer, SVFLayer):
                scaling.offsets(layer)
    except ValueError as problem:
        return problem
    return None
