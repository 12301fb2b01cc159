"""What all of the algebra stands on: one base, stacked offsets, the configuration and origin of a result."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from peft_svf.experts.errors import ExpertError
from peft_svf.experts.expert import Expert
from peft_svf.experts.same_base import check_same_base


Weights: TypeAlias = "Sequence[float] | Mapping[str, Sequence[float]]"
Facts: TypeAlias = "Mapping[str, Any] | None"


def check_experts(experts: Sequence[Expert], purpose: str) -> None:
    """Raise an `ExpertError` unless there are experts, of one base model, that are offsets and nothing else."""
    if not experts:
        raise ExpertError(f"There are no experts for {purpose}; give at least one.")
    for expert in experts:
        if not isinstance(expert, Expert):
            raise ExpertError(f"{purpose} takes Expert objects, not {expert!r:.60}; Expert.from_pretrained loads one.")
        expert.check_only_offsets(purpose)
    check_same_base((expert.source, expert.config) for expert in experts)
    for name in modules(experts):
        stacks = {expert.offsets[name].shape[:-1] for expert in experts if name in expert.offsets}
        if len(stacks) > 1:
            raise ExpertError(f"'{name}' has another number of fused experts in some of the experts for {purpose}.")


def with_offsets(experts: Sequence[Expert], offsets: dict[str, Tensor], metadata: dict[str, Any]) -> Expert:
    """An expert with `offsets` and the configuration of one of `experts` that has them, or one that follows them."""
    for expert in experts:
        if _shapes(expert.offsets) == _shapes(offsets):
            return expert.with_offsets(offsets, metadata)
    config = copy.deepcopy(experts[0].config)
    config.base_fingerprint = {k: v for expert in reversed(experts) for k, v in expert.fingerprint.items()} or None
    return replace(experts[0], config=config).with_offsets(offsets, metadata)


def _shapes(offsets: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: offset.shape for name, offset in offsets.items()}


def modules(experts: Sequence[Expert]) -> list[str]:
    """The modules that any of the experts adapts."""
    return list(dict.fromkeys(name for expert in experts for name in expert.offsets))


def stacked_offsets(experts: Sequence[Expert], name: str) -> Tensor:
    """The offsets of one module, shape (K, ..., k), float64; zeros where an expert has none."""
    present = [expert.offsets.get(name) for expert in experts]
    *stack, length = max((offset.shape for offset in present if offset is not None), key=lambda shape: shape[-1])
    zeros = torch.zeros(*stack, length, dtype=torch.float64)
    return torch.stack([zeros if o is None else pad(o.double(), (0, length - o.shape[-1])) for o in present])


def origin_of(
    operation: str, formula: str, experts: Sequence[Expert], settings: dict[str, Any], weights: Weights | None = None
) -> dict[str, Any]:
    """How an expert was made, of JSON types."""
    sources = []
    for number, expert in enumerate(experts):
        source: dict[str, Any] = {"name": name_of(expert), "fingerprint_id": expert.fingerprint_id}
        if isinstance(weights, Mapping):
            source["weight"] = {group: float(each[number]) for group, each in weights.items() if number < len(each)}
        elif weights is not None:
            source["weight"] = float(weights[number]) if number < len(weights) else None
        for key in ("repo_id", "origin"):  # where to find it, and how it was made itself
            if key in expert.metadata:
                source[key] = expert.metadata[key]
        sources.append(source)
    origin: dict[str, Any] = {"operation": operation, "formula": formula, "sources": sources}
    return {**origin, "settings": settings} if settings else origin


def name_of(expert: Expert) -> str:
    """What an expert is called, without the path of its folder."""
    name = expert.metadata.get("name")
    return str(name) if name else re.split(r"[/\\ ]", expert.source)[-1].strip("'") or expert.source
