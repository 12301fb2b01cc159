"""Experts trained with the paper's released code (github.com/SakanaAI/self-adaptive-llms), converted once.

The code scales every weight whose name contains "mlp" (policy/base.py, utils.py `compose_new_params`):

    W' = U diag(S ⊙ m) Vᵀ · ΣS / Σ(S ⊙ m),   m = sigmoid(p) · max_mult

so that z = m · ΣS / Σ(S ⊙ m) in W' = U Σ diag(z) Vᵀ, in descending order of the singular values as here. Whatever m is
multiplied by cancels: `max_mult`, and the `norm_coeffs` of a few-shot search. It saves three kinds of files:

- `learnable_params.pt`: the logits p by parameter name.
- `policy_params.pt` of a training: the logits by number, in the order of the base model's parameters.
- `policy_params.pt` of a few-shot search (policy/weighted_combination.py): coefficients α, and the vectors of the
  experts that are mixed, m = Σₖ αₖ wₖ. The code takes the experts' logits for wₖ as they are, without sigmoid; that is
  what this file means, so it is what is converted.

Files are pickles, which can run code. They are read by `torch.load(weights_only=True)`, which runs none.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from peft_svf.experts.base_commit import base_commit
from peft_svf.experts.errors import ExpertError
from peft_svf.experts.expert import Expert
from peft_svf.spectrum import cached_singular_basis, weight_sketch
from peft_svf.tuner.config import SVFConfig
from peft_svf.tuner.layer import basis_dtype
from peft_svf.tuner.names import in_layer


Mask = Literal["sigmoid", "identity"]

LARGEST_FILE = 256 * 2**20  # bytes; the paper's experts have less than one million logits, 2 MB
SECONDS_WITHOUT_PROGRESS_BAR = 2.0
_BY_NUMBER = re.compile(r"learnable_params_module_list\.(\d+)")
_COEFFICIENTS, _COMBINED = "adaptive_weights", re.compile(r"weights_(\d+)_k_(\w+)")


@dataclass(frozen=True)
class _Vectors:
    """What a file holds: vectors by module name, float64, of which `mask` makes m."""

    kind: str
    vectors: dict[str, torch.Tensor]
    mask: Mask


def import_released_expert(
    path: str | Path,
    base_model: PreTrainedModel,
    *,
    base_revision: str | None = None,
    mask: Mask | None = None,
    round_mask: bool = False,
    layers: Sequence[int] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Expert:
    """
    Convert a checkpoint of the paper's released code to an expert.

    Args:
        path (`str` or `Path`): `policy_params.pt`, `learnable_params.pt`, or their `_latest` forms.
        base_model (`PreTrainedModel`): The base model it was trained on, unquantized and without adapters. Its
            singular values are needed, and decomposing its MLP weights takes minutes for billions of parameters; they
            are kept in the cache, so that loading the expert is fast.
        base_revision (`str`, *optional*): Commit of the base model on the Hub; by default what the model knows of it.
        mask (`"sigmoid"` or `"identity"`, *optional*):
            How vectors become m. By default `"sigmoid"`, and `"identity"` for the file of a few-shot search. Say
            `"identity"` for a `learnable_params.pt` that a few-shot search has saved: the file does not tell.
        round_mask (`bool`, *optional*, defaults to `False`):
            Round sigmoid(p) to bfloat16, as the released code does before it uses it. That changes z by up to 0.2 %;
            the formula itself has no such rounding.
        layers (`Sequence[int]`, *optional*):
            The layers that a file with fewer vectors by number than the base model has belongs to, for experts of a
            changed code that adapted some layers only (the released one adapts all). By name no such help is needed:
            what is not in the file is left as in the base model.
        metadata (`Mapping[str, Any]`, *optional*): Facts of the expert, like its name and label. `origin` is added.

    Returns:
        [`Expert`]: W' is that of the formula to 1e-6, in float64.

    Raises:
        ExpertError: There is no such file, it is none of the three kinds or holds more than tensors, a vector is not
            finite or has a length that its weight does not have; or it belongs to another base model.
    """
    source = Path(path)
    matrices = _mlp_matrices(base_model)
    tensors = read_tensors(source)
    if layers is not None:
        wanted = set(layers)
        matrices = {name: m for name, m in matrices.items() if (place := in_layer(name)) and place.layer in wanted}
    found = _vectors(tensors, matrices, source)
    if mask is not None:
        found = _Vectors(found.kind, found.vectors, _checked_mask(mask, found))
    if round_mask and found.mask == "identity":
        raise ExpertError("`round_mask` rounds sigmoid(p), which this checkpoint has none of; leave it out.")
    offsets, sketches = {}, {}
    for name, vector in logging.tqdm(found.vectors.items(), desc="Converting", delay=SECONDS_WITHOUT_PROGRESS_BAR):
        singular_values, sketches[name] = _singular_values(name, matrices[name])
        offsets[name] = _offset(name, vector, singular_values, found.mask, round_mask)
    config = SVFConfig(
        task_type="CAUSAL_LM",
        target_modules=sorted(offsets),
        base_model_name_or_path=str(base_model.config._name_or_path) or None,
        revision=base_revision or base_commit(base_model.config),
        base_fingerprint=sketches,
        inference_mode=True,
    )
    facts = {**(metadata or {}), "origin": _origin(source, found, round_mask, len(matrices))}
    return Expert(offsets, config, facts, source=f"the expert of {source.name}")


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """
    The tensors of a checkpoint by name; nothing in it is executed.

    Raises:
        ExpertError: The file is not there, larger than 256 MB, not of the kind `torch.save` writes, or holds anything
            but dense floating-point tensors by name.
    """
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        call = re.search(r"(?:GLOBAL|global) `?([\w.]+)", str(error))
        raise ExpertError(
            f"{path} holds more than tensors{f', namely {call[1]}' if call else ''}, and reading that could run code. "
            "It was refused, and nothing of it was run. Do not load it in any other way unless you trust its author."
        ) from error
    except Exception as error:  # damaged files and forged ones raise anything
        raise ExpertError(f"{path} cannot be read as a checkpoint of torch.save: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ExpertError(f"{path} holds {type(content).__name__}, not tensors by name; {_KINDS}.")
    return {str(name): _checked_tensor(name, tensor, path) for name, tensor in content.items()}


_KINDS = "the released code's experts are policy_params.pt and learnable_params.pt"


def _check_archive(path: Path) -> None:
    """`torch.save` writes archives without compression, so a small file cannot become a large one in memory."""
    if not path.is_file():
        raise ExpertError(f"There is no file {path}.")
    if path.stat().st_size > LARGEST_FILE:
        raise ExpertError(f"{path} is larger than {LARGEST_FILE // 2**20} MB, which no expert is; {_KINDS}.")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise ExpertError(
            f"{path} is no checkpoint of torch.save (torch 1.6 or newer), or damaged; other pickles are not read."
        ) from error
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if packed or sum(entry.file_size for entry in entries) > LARGEST_FILE:
        raise ExpertError(f"{path} is packed as torch.save does not pack; it was not read.")


def _checked_tensor(name: Any, tensor: Any, path: Path) -> torch.Tensor:
    dense = (
        isinstance(name, str)
        and type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.is_floating_point()
    )
    if not dense:
        raise ExpertError(f"{path} holds {type(tensor).__name__} as {name!r}, not only vectors by name; {_KINDS}.")
    # A tensor can be a view that repeats one number a trillion times
    if tensor.numel() * tensor.element_size() > LARGEST_FILE:
        raise ExpertError(f"{path}: '{name}' has {tensor.numel():,} numbers, which no expert has.")
    if not torch.isfinite(tensor).all():
        raise ExpertError(f"{path}: '{name}' has NaN or infinite values; the training failed, or the file is damaged.")
    return tensor.detach()


def _mlp_matrices(base_model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """The layers whose weights the released code adapts, in its order: that of the state dict."""
    modules = dict(base_model.named_modules())
    if any(isinstance(module, BaseTunerLayer) for module in modules.values()):
        raise ExpertError("The model has adapters in it; give the plain base model, as from_pretrained returns it.")
    if getattr(base_model.config, "quantization_config", None) is not None:
        raise ExpertError("The base model is quantized; its singular values are needed: load it unquantized.")
    names = [key.removesuffix(".weight") for key in base_model.state_dict() if "mlp" in key]
    found = {name: modules[name] for name in names if isinstance(modules.get(name), nn.Linear | Conv1D)}
    if not found:
        raise ExpertError('The model has no linear layer with "mlp" in its name, which is what the code adapts.')
    return found


def _vectors(
    tensors: Mapping[str, torch.Tensor], matrices: Mapping[str, nn.Linear | Conv1D], source: Path
) -> _Vectors:
    """Tell the three kinds of files apart, and give every vector the name of its module."""
    mask: Mask = "sigmoid"
    if _COEFFICIENTS in tensors:
        kind, vectors, mask = "few-shot search", _combine(tensors, matrices, source), "identity"
    elif all(_BY_NUMBER.fullmatch(key) for key in tensors):
        kind, vectors, mask = "policy_params", _by_number(tensors, matrices, source), "sigmoid"
    elif all("mlp" in key and key.endswith(".weight") for key in tensors):
        named = {key.removesuffix(".weight"): tensor for key, tensor in tensors.items()}
        kind, vectors, mask = "learnable_params", named, "sigmoid"
    else:
        raise ExpertError(f"{source} holds {', '.join(sorted(tensors)[:3])}, which is no expert; {_KINDS}.")
    for name, vector in vectors.items():
        _check_length(name, vector, matrices, source)
    return _Vectors(kind, {name: vector.to(torch.float64) for name, vector in vectors.items()}, mask)


def _by_number(
    tensors: Mapping[str, torch.Tensor], matrices: Mapping[str, Any], source: Path
) -> dict[str, torch.Tensor]:
    ordered = [tensors.get(f"learnable_params_module_list.{index}") for index in range(len(tensors))]
    if len(tensors) != len(matrices) or any(vector is None for vector in ordered):
        raise ExpertError(
            f"{source} belongs to another base model: it has {len(tensors)} vectors, without names, and the model "
            f"{len(matrices)} MLP weights. If only some layers were trained, say which: `layers`."
        )
    return {name: vector for name, vector in zip(matrices, ordered, strict=True) if vector is not None}


def _combine(
    tensors: Mapping[str, torch.Tensor], matrices: Mapping[str, Any], source: Path
) -> dict[str, torch.Tensor]:
    """Σₖ αₖ wₖ of a few-shot search, whose coefficients are one for each expert, or for each expert and weight."""
    names = {f"{name}.weight".replace(".", "_"): name for name in matrices}
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        if key != _COEFFICIENTS:
            match = _COMBINED.fullmatch(key)
            if match is None or match[2] not in names:
                raise ExpertError(f"{source} belongs to another base model: it has no weight for {key!r}.")
            parts.setdefault(names[match[2]], {})[int(match[1])] = tensor
    coefficients = tensors[_COEFFICIENTS].to(torch.float64)
    shapes = {(len(part), 1) for part in parts.values()} | {(len(part), len(parts)) for part in parts.values()}
    if coefficients.dim() != 2 or not parts or tuple(coefficients.shape) not in shapes:
        raise ExpertError(f"{source}: coefficients of shape {tuple(coefficients.shape)} do not fit its experts.")
    combined = {}
    for name, column in zip(parts, coefficients.expand(-1, len(parts)).T, strict=True):
        if sorted(parts[name]) != list(range(len(column))):
            raise ExpertError(f"{source}: of '{name}' it has the experts {sorted(parts[name])}, not {len(column)}.")
        for part in parts[name].values():
            _check_length(name, part, matrices, source)
        combined[name] = sum(column[k] * part.to(torch.float64) for k, part in sorted(parts[name].items()))
    return combined


def _check_length(name: str, vector: torch.Tensor, matrices: Mapping[str, Any], source: Path) -> None:
    if name not in matrices:
        raise ExpertError(f"{source} belongs to another base model, or to other `layers`: there is no '{name}'.")
    shape = tuple(matrices[name].weight.shape)
    if tuple(vector.shape) != (min(shape),):
        raise ExpertError(
            f"{source} belongs to another base model: '{name}' has {min(shape)} singular values, the file a vector of "
            f"shape {tuple(vector.shape)}."
        )


def _checked_mask(mask: Mask, found: _Vectors) -> Mask:
    if mask not in ("sigmoid", "identity"):
        raise ExpertError(f"`mask` is 'sigmoid' or 'identity', got {mask!r}.")
    if mask != found.mask and found.kind != "learnable_params":
        raise ExpertError(f"A file of the kind {found.kind} has the mask '{found.mask}'; leave `mask` out.")
    return mask


def _singular_values(name: str, module: nn.Linear | Conv1D) -> tuple[torch.Tensor, list[float]]:
    """S, shape (k,), in float64 on the CPU, and the sketch of the weight."""
    weight = (module.weight.T if isinstance(module, Conv1D) else module.weight).detach()
    try:
        sketch = weight_sketch(weight)
        basis = cached_singular_basis(weight, sketch, basis_dtype(weight.dtype))
    except ValueError as error:
        raise ExpertError(f"'{name}' of the base model has no singular values: {error}") from error
    return basis.singular_values.cpu().to(torch.float64), sketch


def _offset(
    name: str, vector: torch.Tensor, singular_values: torch.Tensor, mask: Mask, round_mask: bool
) -> torch.Tensor:
    """z − 1 = m ΣS / Σ(S ⊙ m) − 1, shape (k,), float32."""
    scale = torch.sigmoid(vector) if mask == "sigmoid" else vector
    if round_mask:
        scale = scale.to(torch.bfloat16).to(torch.float64)
    z = scale * (singular_values.sum() / (singular_values * scale).sum())
    offset = (z - 1).to(torch.float32)
    if not torch.isfinite(offset).all():
        raise ExpertError(f"The vector of '{name}' scales its nuclear norm to zero, which no factor can bring back.")
    return offset


def _origin(source: Path, found: _Vectors, round_mask: bool, matrices: int) -> dict[str, Any]:
    m = "sigmoid(p)" if found.mask == "sigmoid" else "p" if found.kind == "learnable_params" else "Σ αₖ wₖ"
    return {
        "operation": "import",
        "formula": f"z = m · Σσ / Σ(σ·m), m = {m}",
        "sources": [{"name": source.name, "sha256": hashlib.sha256(source.read_bytes()).hexdigest()}],
        "settings": {
            "code": "github.com/SakanaAI/self-adaptive-llms",
            "kind": found.kind,
            "mask": found.mask,
            "round_mask": round_mask,
            "matrices": f"{len(found.vectors)} of {matrices}",
        },
    }
