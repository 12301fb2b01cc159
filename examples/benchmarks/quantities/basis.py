"""Set-up: how long it takes to find the singular bases of a whole model, and how exact they are."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import torch
from models import METHODS, adapt, adapted_linears, basis_cache
from quantities.setting import Setting
from report import Row
from timing import Spread, ratios, time_rounds
from torch import nn


SETUP_SPEED = 1 / 2  # of torch.linalg.svd
CACHE_SPEED = 1 / 10  # of computing
CHECKED_LAYERS = ("q_proj", "k_proj", "down_proj")  # square, output side, output side with a larger input
OFFSET_STD = 0.1


def measure(setting: Setting) -> Iterator[Row]:
    """Set-up against torch.linalg.svd in float32, from the cache against without it, and the error of ΔW."""
    yield from _time_setup(setting)
    yield _compare_errors(setting)


def _time_setup(setting: Setting) -> Iterator[Row]:
    base = setting.build_base()
    linears = list(adapted_linears(base).values())
    with tempfile.TemporaryDirectory() as folder:
        filled = str(Path(folder) / "filled")
        with basis_cache(filled):
            adapt(copy.deepcopy(base), "SVF")
        empty = (str(Path(folder) / str(number)) for number in count())
        candidates: dict[str, Callable[[], object]] = {
            "svd": lambda: [torch.linalg.svd(linear.weight.detach().float(), full_matrices=False) for linear in linears],
            "SVF from cache": lambda: _set_up(base, "SVF", filled),
            "SVF": lambda: _set_up(base, "SVF", next(empty)),
            **{name: (lambda name=name: _set_up(base, name, "off")) for name in METHODS if name != "SVF"},
        }
        seconds = time_rounds(candidates, min(setting.rounds, 3), setting.device, warm_up=False)
    to_svd = ratios(seconds, "svd")
    yield Row(
        "set-up of the whole model, × of torch.linalg.svd in float32",
        str(setting),
        {"SVF": to_svd["SVF"], **{name: to_svd[name] for name in METHODS if name != "SVF"}, "U, S, V": to_svd["svd"]},
        SETUP_SPEED,
        note=f"SVF {Spread.of(seconds['SVF']).median:.2g} s, written to the cache included",
    )
    yield Row(
        "set-up from the cache, × of computing",
        str(setting),
        {"SVF": ratios(seconds, "SVF")["SVF from cache"]},
        CACHE_SPEED,
        "at this size the bases are computed in little more than the rest of the set-up takes",
    )


def _set_up(base: nn.Module, method: str, cache: str) -> None:
    with basis_cache(cache):
        adapt(copy.deepcopy(base), method).unload()


def _compare_errors(setting: Setting) -> Row:
    """Relative error of ΔW for random offsets, in the worst of three layers, as kept in memory in the model's dtype."""
    base = setting.build_base()
    with basis_cache("off"):
        model = adapt(copy.deepcopy(base), "SVF")
    ours, two_sided = [], []
    generator = torch.Generator().manual_seed(setting.seed)
    for name in (f"model.layers.0.{'mlp' if 'down' in layer else 'self_attn'}.{layer}" for layer in CHECKED_LAYERS):
        layer = model.base_model.model.get_submodule(name)
        offset = layer.svf_offset["default"].weight
        offset.data = (torch.randn(offset.shape, generator=generator) * OFFSET_STD).to(offset.device)
        weight = base.get_submodule(name).weight.detach()
        exact = _two_sided_change(weight.double(), offset.detach(), torch.float64)
        ours.append(_relative_error(layer.get_delta_weight("default"), exact))
        two_sided.append(_relative_error(_two_sided_change(weight.float(), offset.detach(), setting.dtype), exact))
    return Row(
        "error of ΔW against a float64 SVD",
        str(setting),
        {"SVF": Spread.exact(max(ours)), "U, S, V": Spread.exact(max(two_sided))},
        max(two_sided),
        note="goal: the error of a float32 SVD; both with factors kept in the dtype of the model",
    )


def _two_sided_change(weight: torch.Tensor, offset: torch.Tensor, kept: torch.dtype) -> torch.Tensor:
    """U diag(σ ⊙ offset) Vᵀ in float64, from factors that were kept in `kept`."""
    left, singular_values, right = torch.linalg.svd(weight, full_matrices=False)
    left, right = left.to(kept).double(), right.to(kept).double()
    return (left * (singular_values.double() * offset.double())) @ right


def _relative_error(change: torch.Tensor, exact: torch.Tensor) -> float:
    return float(torch.linalg.norm(change.double() - exact) / torch.linalg.norm(exact))
