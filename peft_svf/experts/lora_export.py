"""LoRA from an expert: the best approximation at every rank and its error, without decomposing anything again.

The change of a weight, ΔW = W' − W = U diag(σ · offset) Vᵀ, is a singular value decomposition already, up to order
and signs. Its best approximation of rank k keeps the k largest |σ · offset| and misses exactly the others (Eckart and
Young 1936). In the one-sided form UΣ is W Q and ΣVᵀ is Qᵀ W, so that with the kept columns Q_k

    input side  (in ≤ out):  B A = (W Q_k diag(offset_k)) Q_kᵀ
    output side (out < in):  B A = Q_k (diag(offset_k) Q_kᵀ W)

PEFT's own `peft.tuners.lora.conversion` gives the same approximation for any method, at the price of a decomposition
of every ΔW.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_svf.experts.bank_config import BASE_FOLDER
from peft_svf.experts.files import make_readable, replaced_folder
from peft_svf.spectrum import sketch_distance, weight_sketch
from peft_svf.tuner.adapted import adapted_layers
from peft_svf.tuner.config import SVFConfig
from peft_svf.tuner.layer import SVFLayer
from peft_svf.tuner.names import PEFT_PREFIX, name_in_base


SAME_WEIGHT = 1e-6  # relative difference up to which a basis counts as that of the weight


@dataclass(frozen=True)
class LoraError:
    """How far a LoRA is from the expert that it was made from: the relative error ‖ΔW − B A‖_F / ‖ΔW‖_F.

    Attributes:
        total (`float`): Of all weights together, the square root of Σ ‖ΔW − B A‖² / Σ ‖ΔW‖².
        modules (`dict[str, float]`): Of every weight, by its module's name in the base model.
    """

    total: float
    modules: dict[str, float]


class _Approximation(NamedTuple):
    lora_A: torch.Tensor  # (k, in)
    lora_B: torch.Tensor  # (out, k)
    missed: float  # ‖ΔW − B A‖²
    whole: float  # ‖ΔW‖²


@torch.no_grad()
def convert_to_lora(
    model: nn.Module, rank: int | float, adapter_name: str = "default"
) -> tuple[LoraConfig, dict[str, torch.Tensor], LoraError]:
    """
    Convert an expert to a LoRA of the given rank, the best there is, and say how far it is from the expert.

    The expert is converted at the strength it has, from the base weights without any adapter merged. What it holds
    besides offsets (`modules_to_save`, `trainable_token_indices`) goes into the LoRA as it is. The scaling of the LoRA
    is 1. To lose nothing, merge the expert instead.

    Args:
        model (`nn.Module`): A model with SVF adapters.
        rank (`int` or `float`):
            A whole number is the rank of every matrix; one with fewer components gets all of them. A float in (0, 1]
            is the share of ‖ΔW‖²_F to keep: every matrix gets the smallest rank that keeps it, written into
            `rank_pattern` and `alpha_pattern`. Serving engines are happier with one rank for all.
        adapter_name (`str`, *optional*, defaults to `"default"`): The expert.

    Returns:
        `tuple[LoraConfig, dict[str, torch.Tensor], LoraError]`: The configuration, the tensors of a LoRA checkpoint
        (float32, or float64 on a float64 base) and the error. The error follows from σ · offset alone; it is that of
        exact arithmetic, to which a basis stored in bfloat16 adds about 2e-3 of ‖ΔW‖.

    Raises:
        ValueError: There is no such expert, it adapts fused expert parameters, `rank` cannot be, an offset is not
            finite, or a base weight cannot be read.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    config, layers = _find_expert(model, adapter_name)
    _check_rank(rank, layers)
    parts = {name: _approximate(name, layer, adapter_name, rank) for name, layer in layers.items()}
    state_dict = {}
    for name, part in parts.items():
        state_dict[f"{PEFT_PREFIX}{name}.lora_A.weight"] = part.lora_A
        state_dict[f"{PEFT_PREFIX}{name}.lora_B.weight"] = part.lora_B
    state_dict |= _modules_in_full(model, adapter_name)
    ranks = {name: len(part.lora_A) for name, part in parts.items()}
    return _lora_config(model, config, layers, ranks), state_dict, _relative_error(parts)


def save_as_lora(path: str | Path, model: nn.Module, rank: int | float, adapter_name: str = "default") -> LoraError:
    """
    Save an expert as a LoRA checkpoint that loads without peft_svf, and say how far it is from the expert.

    Args:
        path (`str` or `Path`): The folder to write, as a whole or not at all. An earlier LoRA in it is replaced.
        model, rank, adapter_name: See [`convert_to_lora`].

    Returns:
        `LoraError`: The relative error of every matrix and of all together.

    Raises:
        FileExistsError: `path` holds anything but a LoRA, for instance the expert itself.
        ValueError: See [`convert_to_lora`].
    """
    target = Path(path).absolute()
    _check_replaceable(target)
    config, state_dict, error = convert_to_lora(model, rank, adapter_name)
    with replaced_folder(target) as staging:
        save_file(state_dict, staging / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(staging))
        make_readable(staging)
    return error


def _find_expert(model: nn.Module, adapter_name: str) -> tuple[SVFConfig, dict[str, SVFLayer]]:
    """The configuration of an adapter and its layers by their name in the base model."""
    configs = getattr(model, "peft_config", {})
    layers = adapted_layers(model, adapter_name)
    if adapter_name not in configs or not isinstance(configs[adapter_name], SVFConfig) or not layers:
        experts = [name for name, config in configs.items() if isinstance(config, SVFConfig)]
        raise ValueError(f"there is no SVF adapter named '{adapter_name}'; loaded are {', '.join(experts) or 'none'}")
    config = configs[adapter_name]
    fused = [name for name, layer in layers.items() if not layer.supports_lora_conversion(adapter_name)]
    fused = fused or list(config.target_parameters or ())
    if fused:
        raise ValueError(
            f"the fused expert parameters that '{adapter_name}' adapts ({', '.join(fused)}) cannot be converted to "
            "LoRA; merge the adapter, or train one without `target_parameters`"
        )
    return config, {name_in_base(name): layer for name, layer in layers.items()}


def _check_rank(rank: int | float, layers: dict[str, SVFLayer]) -> None:
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise ValueError(f"`rank` must be a whole number, or a float in (0, 1], got {rank!r}")
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise ValueError(f"a float as `rank` is the share of ‖ΔW‖² to keep, in (0, 1], got {rank}")
        return
    largest = max(layer.components for layer in layers.values())
    if not 1 <= rank <= largest:
        raise ValueError(
            f"`rank` must be between 1 and {largest}, the most singular values that an adapted weight has, got "
            f"{rank}; `rank=1.0` takes as many as there are"
        )


def _approximate(name: str, layer: SVFLayer, adapter_name: str, rank: int | float) -> _Approximation:
    weight, vectors, offset = _read(name, layer, adapter_name)
    sizes = (_singular_values(layer, weight, vectors) * offset).abs()  # of the components of ΔW, (k,)
    order = sizes.argsort(descending=True, stable=True)
    energy = sizes[order].square()
    count = min(rank, len(sizes)) if isinstance(rank, int) else _count_for_share(energy, rank)
    kept = order[:count]
    # Both factors carry the root of every component: neither leaves the range of float16, and both move at the same
    # pace if the LoRA is trained on.
    root = sizes[kept].sqrt()
    root[root == 0] = 1
    columns = vectors[:, kept.to(vectors.device)]  # (r, count)
    inner = columns * root.to(weight)
    outer = _project(layer, weight, columns) * (offset[kept] / root).to(weight)
    lora_A, lora_B = (inner.T, outer) if layer.svf_side == "input" else (outer.T, inner)
    return _Approximation(lora_A.contiguous(), lora_B.contiguous(), float(energy[count:].sum()), float(energy.sum()))


def _read(name: str, layer: SVFLayer, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The base weight (out, in) and Q (r, k), in float32 or better, and the offset (k,) in float64 on the CPU."""
    try:
        layer.require_basis()
        weight = layer.to_matrix(layer.unmerged_weight())
    except (TypeError, RuntimeError) as error:  # opaque quantization formats, a basis that was never loaded
        raise ValueError(f"'{name}' cannot be converted to LoRA: {error}") from error
    if weight.is_meta:
        raise ValueError(f"the weight of '{name}' is offloaded; load the whole model into memory before exporting")
    offset = layer.offset(adapter_name).cpu().to(torch.float64)  # not every device has float64
    if not torch.isfinite(offset).all():
        raise ValueError(
            f"the offsets of '{name}' hold NaN or infinite values; the adapter '{adapter_name}' is broken"
        )
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(dtype), layer.svf_basis[:, : len(offset)].to(dtype), offset


def _singular_values(layer: SVFLayer, weight: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """σ, shape (k,), float64 on the CPU, or ‖W q‖ where Q comes from other weights than these (a quantized base).

    With orthonormal q, ‖Σ W qᵢ offsetᵢ qᵢᵀ‖² is Σ ‖W qᵢ‖² offsetᵢ² whether they are singular vectors of W or not.
    """
    if sketch_distance(layer.svf_sketch or [], weight_sketch(weight)) <= SAME_WEIGHT:
        return layer.svf_singular_values[: vectors.shape[1]].cpu().to(torch.float64)
    return _project(layer, weight, vectors).norm(dim=0).cpu().to(torch.float64)


def _project(layer: SVFLayer, weight: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """W Q or Wᵀ Q, with the columns of Q on the layer's side."""
    return (weight if layer.svf_side == "input" else weight.T) @ vectors


def _count_for_share(energy: torch.Tensor, share: float) -> int:
    """The smallest number of leading entries that hold `share` of the sum; 1 if the sum is 0."""
    cumulated = energy.cumsum(0)
    return int(torch.searchsorted(cumulated, share * cumulated[-1])) + 1


def _modules_in_full(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """What the adapter saves besides offsets: `modules_to_save`, trained tokens, resized embeddings."""
    return {
        PEFT_PREFIX + key.removeprefix(PEFT_PREFIX): tensor.detach().clone()
        for key, tensor in get_peft_model_state_dict(model, adapter_name=adapter_name).items()
        if ".svf_" not in key
    }


def _lora_config(
    model: nn.Module, config: SVFConfig, layers: dict[str, SVFLayer], ranks: dict[str, int]
) -> LoraConfig:
    # `r` is the largest rank and `lora_alpha` equal to it, so that readers which ignore the patterns (vLLM) allocate
    # enough and scale by 1. "^": PEFT takes patterns for endings, and one module's name may end with another's.
    largest = max(ranks.values())
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != largest}
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=_target_modules(model, layers),
        fan_in_fan_out=any(isinstance(layer.get_base_layer(), Conv1D) for layer in layers.values()),
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        task_type=config.task_type,
        base_model_name_or_path=_base_checkpoint(model, config),
        revision=config.revision,
        inference_mode=True,
    )


def _base_checkpoint(model: nn.Module, config: SVFConfig) -> str | None:
    """What the LoRA belongs to. An expert of a bank says "base": outside the bank that would be a model on the Hub."""
    named = config.base_model_name_or_path
    if named not in (None, BASE_FOLDER):
        return str(named)
    loaded = str(getattr(getattr(model, "config", None), "_name_or_path", None) or "")
    return str(Path(loaded).absolute()) if loaded and Path(loaded).is_dir() else loaded or named


def _target_modules(model: nn.Module, layers: dict[str, SVFLayer]) -> list[str]:
    """Short names such as "q_proj" where they mean the adapted modules and no others; full names otherwise."""
    endings = {name.rpartition(".")[2] for name in layers}
    named = {name_in_base(name) for name, _ in model.named_modules()}
    others = any(name.rpartition(".")[2] in endings for name in named - layers.keys())
    return sorted(layers) if others else sorted(endings)


def _relative_error(parts: dict[str, _Approximation]) -> LoraError:
    def relative(missed: float, whole: float) -> float:
        return math.sqrt(missed / whole) if whole else 0.0

    return LoraError(
        total=relative(sum(part.missed for part in parts.values()), sum(part.whole for part in parts.values())),
        modules={name: relative(part.missed, part.whole) for name, part in parts.items()},
    )


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    found = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if found and not (found <= {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME} and _peft_type(folder / CONFIG_NAME) == "LORA"):
        raise FileExistsError(f"{folder} holds {', '.join(sorted(found)[:5])}, not only a LoRA; choose a new folder")


def _peft_type(path: Path) -> str | None:
    try:
        return json.loads(path.read_text("utf-8")).get("peft_type")
    except (OSError, ValueError, AttributeError):
        return None
