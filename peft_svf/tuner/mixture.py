"""Mixtures of adapters: z' = Σ αₖ zₖ in one layer (Transformer², arXiv 2501.06252, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch.nn.functional import pad

from peft_svf.tuner.config import SVFConfig
from peft_svf.tuner.layer import SVFLayer, stack_offsets


def check_mixture(
    configs: Mapping[str, SVFConfig], adapters: list[str], weights: list[float], new_name: str, normalize: bool
) -> list[float]:
    """The weights of a mixture, divided by their sum if `normalize`.

    Raises:
        ValueError: An unknown adapter, a taken name, adapters that are more than offsets, or unusable weights.
    """
    if new_name in configs:
        raise ValueError(f"there is already an adapter named '{new_name}'; choose another name or delete it")
    unknown = [name for name in adapters if name not in configs]
    if unknown or not adapters:
        raise ValueError(f"cannot mix {unknown or 'no adapters at all'}: loaded are {', '.join(configs)}")
    if len(adapters) != len(weights) or not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"`weights` needs one finite number for each of {adapters}, got {weights}")
    in_full = [name for name in adapters if configs[name].modules_to_save or configs[name].trainable_token_indices]
    if in_full:
        raise ValueError(
            f"cannot mix {in_full}: they also hold whole modules or token embeddings (`modules_to_save`, "
            "`trainable_token_indices`), which are no singular values"
        )
    total = sum(weights) if normalize else 1
    if not total:
        raise ValueError(f"the weights {weights} sum to 0 and cannot be normalized")
    return [weight / total for weight in weights]


@torch.no_grad()
def mix_offsets(layer: SVFLayer, adapters: list[str], weights: list[float], residual: bool) -> torch.Tensor:
    """The offset of a mixture in one layer; adapters that do not adapt the layer count as z = 1.

    Returns:
        `torch.Tensor`: Σ αₖ offsetₖ, shape (k,), if `residual`; else Σ αₖ offsetₖ + Σα − 1, which moves every
        component, shape (r,).
    """
    present = [(w, layer.offset(name)) for w, name in zip(weights, adapters, strict=True) if name in layer.svf_offset]
    offsets = stack_offsets([offset.float() for _, offset in present])  # (K, k)
    mixture = torch.tensordot(torch.tensor([weight for weight, _ in present], device=offsets.device), offsets, dims=1)
    if residual or sum(weights) == 1:
        return mixture
    return pad(mixture, (0, layer.components - mixture.shape[-1])) + (sum(weights) - 1)
