"""Set-up: how long it takes to find the singular bases of a whole model, and how exact they are."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import torch
from models import METHODS, adapt, adapted_linears, basis_cache
from report import Row
from timing import Spread, ratios
from torch import nn

from peft_svf.spectrum import singular_basis, weight_change
from quantities.setting import Setting


SETUP_TIME = 1 / 2  # of torch.linalg.svd
CACHE_TIME = 1 / 10  # of computing
CHECKED_LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")  # square, and wide ones
OFFSET_STD = 0.1
MOST_ROUNDS = 2  # these timings take long, and differ little


def measure(setting: Setting) -> Iterator[Row]:
    """Set-up against torch.linalg.svd in float32, from the cache against without it, and the error of ΔW."""
    base = setting.build_base()
    yield from _time_setup(setting, base)
    yield from _compare_errors(setting, base)


def _time_setup(setting: Setting, base: nn.Module) -> Iterator[Row]:
    weights = [linear.weight.detach() for linear in adapted_linears(base).values()]
    grams = [_smaller_gram(weight.double()) for weight in weights]
    with tempfile.TemporaryDirectory() as folder:
        filled = str(Path(folder) / "filled")
        empty = (str(Path(folder) / str(number)) for number in count())
        _set_up(base, "SVF", filled)
        candidates: dict[str, Callable[[], object]] = {
            "svd": lambda: [torch.linalg.svd(weight.float(), full_matrices=False) for weight in weights],
            "eigh": lambda: [torch.linalg.eigh(gram) for gram in grams],
            "SVF from cache": lambda: _set_up(base, "SVF", filled),
            "SVF": lambda: _set_up(base, "SVF", next(empty)),
            **{name: (lambda name=name: _set_up(base, name, "off")) for name in METHODS if name != "SVF"},
        }
        seconds = setting.time(candidates, most=MOST_ROUNDS, warm_up=False)
    to_svd = ratios(seconds, "svd")
    yield Row(
        "set-up of the whole model, × of torch.linalg.svd in float32",
        str(setting),
        {**{name: to_svd[name] for name in METHODS}, "U, S, V": to_svd["svd"]},
        SETUP_TIME,
        f"float64 eigh alone, without which there is no exact basis, takes {to_svd['eigh']} ×",
        f"{Spread.of(seconds['SVF']).median:.2g} s with writing to the cache",
    )
    yield Row(
        "set-up from the cache, × of computing",
        str(setting),
        {"SVF": ratios(seconds, "SVF")["SVF from cache"]},
        CACHE_TIME,
        "the rest of the set-up, which the cache does not save, takes as long as computing at this size",
    )


def _smaller_gram(weight: torch.Tensor) -> torch.Tensor:
    return weight.T @ weight if weight.shape[1] <= weight.shape[0] else weight @ weight.T


def _set_up(base: nn.Module, method: str, cache: str) -> None:
    with basis_cache(cache):
        adapt(base, method).unload()


def _compare_errors(setting: Setting, base: nn.Module) -> Iterator[Row]:
    """Relative error of ΔW for random offsets, in the worst of three layers."""
    adapted = setting.adapted("SVF").base_model.model.model.layers[0]
    errors = [
        _errors(adapted.get_submodule(name), base.model.layers[0].get_submodule(name).weight.detach(), setting)
        for name in CHECKED_LAYERS
    ]
    computed, computed_svd, kept, kept_svd = (Spread.exact(max(column)) for column in zip(*errors, strict=True))
    yield Row(
        "error of ΔW, beside a float32 SVD",
        str(setting),
        {"SVF": computed, "U, S, V": computed_svd},
        computed_svd.median,
        note="both against a float64 SVD",
    )
    dtype = str(setting.dtype).removeprefix("torch.")
    yield Row(
        "error of ΔW with factors kept in the dtype of the model",
        str(setting),
        {"SVF": kept, "U, S, V": kept_svd},
        note=f"of get_delta_weight(); rounded to {dtype}, as the weights are",
    )


def _errors(layer: nn.Module, weight: torch.Tensor, setting: Setting) -> tuple[float, float, float, float]:
    """Errors of ΔW: SVF and a float32 SVD as computed, then both with factors in the dtype of the model."""
    offset = layer.svf_offset["default"].weight
    generator = torch.Generator().manual_seed(setting.seed)
    offset.data = (torch.randn(offset.shape, generator=generator) * OFFSET_STD).to(offset.device)
    offset = offset.detach()
    exact = _two_sided_change(torch.linalg.svd(weight.double(), full_matrices=False), offset)
    factors = torch.linalg.svd(weight.float(), full_matrices=False)
    changes = (
        weight_change(weight.double(), singular_basis(weight), offset.double()),
        _two_sided_change(factors, offset),
        layer.get_delta_weight("default"),
        _two_sided_change([factor.to(setting.dtype) for factor in factors], offset),
    )
    return tuple(float(torch.linalg.norm(change.double() - exact) / torch.linalg.norm(exact)) for change in changes)


def _two_sided_change(factors: list[torch.Tensor], offset: torch.Tensor) -> torch.Tensor:
    """U diag(σ ⊙ offset) Vᵀ in float64."""
    left, singular_values, right = (factor.double() for factor in factors)
    return (left * (singular_values * offset.double())) @ right
