"""Merged export: an expert, or a mixture of several, as an ordinary checkpoint that needs neither PEFT nor peft_svf.

Of every adapted weight, W' = U Σ diag(z) Vᵀ (Transformer², arXiv 2501.06252, section 3.1) is computed in float64 and
rounded once, to the dtype of the checkpoint. The model in memory is read only: nothing is merged into it.

Such a folder is what `transformers`, vLLM and other tools load as any model. For GGUF (llama.cpp, Ollama, LM Studio)
there is no other way than through it, with llama.cpp's own converter:

    python llama.cpp/convert_hf_to_gguf.py FOLDER --outfile expert.gguf --outtype bf16

(From llama.cpp's documentation; its repository cannot be reached from where this project is tested, so it was not run.
It knows the tokenizers of published models by name and refuses others, like the playground's.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from peft_svf.experts.bank import ExpertBank
from peft_svf.experts.bank_config import BASE_LABEL
from peft_svf.experts.bank_loading import adapter_types, processing_of
from peft_svf.experts.base_state import plain_state_dict, without_wrappers
from peft_svf.experts.errors import ExpertError
from peft_svf.experts.files import make_readable, replaced_folder
from peft_svf.experts.lora_export import SAME_WEIGHT
from peft_svf.experts.route_weights import RouteWeights
from peft_svf.spectrum import SingularBasis, singular_basis, sketch_distance, sketch_of_stack, weight_sketch
from peft_svf.spectrum import weight_change as change_of
from peft_svf.tuner.adapted import adapted_name
from peft_svf.tuner.distributed import refuse_merging_into_shards
from peft_svf.tuner.layer import SVFLayer
from peft_svf.tuner.mixed_batch import MixedBatch


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SECONDS_WITHOUT_PROGRESS_BAR = 2.0


@dataclass(frozen=True)
class MergeError:
    """How far the written weights are from W' = U Σ diag(z) Vᵀ, computed in float64: what rounding them cost.

    Attributes:
        total (`float`): Of all adapted weights together, ‖written − W'‖_F / ‖W'‖_F.
        of_change (`float`): The same distance relative to what the expert changes, ‖written − W'‖_F / ‖W' − W‖_F; 0
            for an expert that changes nothing.
        modules (`dict[str, float]`): ‖written − W'‖_F / ‖W'‖_F of every adapted weight, by its name in the base model.
    """

    total: float
    of_change: float
    modules: dict[str, float]


@dataclass(frozen=True)
class MergedCheckpoint:
    """What [`save_merged`] wrote.

    Attributes:
        folder (`Path`): The checkpoint.
        size (`int`): Bytes of all its files.
        dtype (`torch.dtype`): That of the adapted weights.
        error ([`MergeError`], *optional*): `None` with `exact=False`, which has no W' to compare with.
    """

    folder: Path
    size: int
    dtype: torch.dtype
    error: MergeError | None


class _Sums(NamedTuple):
    missed: float  # ‖written − W'‖²
    whole: float  # ‖W'‖²
    change: float  # ‖W' − W‖²


def save_merged(
    model: PeftModel | ExpertBank,
    folder: str | Path,
    expert: str | Mapping[str, float] | RouteWeights = "default",
    *,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin | None = None,
    dtype: torch.dtype | None = None,
    exact: bool = True,
) -> MergedCheckpoint:
    """
    Save the base model with an expert, or a mixture, in its weights: safetensors, configurations and tokenizer.

    The model is not changed, and may answer in other threads meanwhile. The merged weights are copies in CPU memory,
    as large together as the adapted ones.

    Args:
        model (`PeftModel` or [`ExpertBank`]): The base model with the expert.
        folder (`str` or `Path`): A new or empty folder, written as a whole or not at all.
        expert (`str`, `Mapping[str, float]` or `Route`, *optional*, defaults to `"default"`):
            An expert; or a mixture like `{"math": 0.7, "code": 0.3}`, whose rest stays with the base model; or a
            [`~peft_svf.dispatch.Route`] of one row, also with weights of each layer.
        tokenizer (`PreTrainedTokenizerBase` or `ProcessorMixin`, *optional*):
            Tokenizer or processor to save with it; by default the bank's, or that of the base model's checkpoint.
        dtype (`torch.dtype`, *optional*): Of all weights in the checkpoint; by default each weight's own.
        exact (`bool`, *optional*, defaults to `True`):
            Decompose every adapted weight again, in float64, which takes as long as putting the first expert on the
            model did. `False` takes the singular bases that the model computes with; of a bfloat16 model they are in
            bfloat16, which adds about 2e-3 of the change W' − W, less than rounding W' does, and nothing is measured.

    Returns:
        [`MergedCheckpoint`]: The folder, its size and the error.

    Raises:
        ExpertError: There is no such expert; the base model is quantized, sharded, offloaded or has an expert merged;
            the weights do not fit into `dtype`; `folder` is not empty.
    """
    target = Path(folder).absolute()
    check_empty(target)
    peft_model = _peft_model_of(model)
    if tokenizer is None:
        tokenizer = (model.processor or model.tokenizer) if isinstance(model, ExpertBank) else processing_of(model)
    state, error = merged_state_dict(model, expert, dtype=dtype, exact=exact)
    base = peft_model.get_base_model()
    with replaced_folder(target) as staging:
        base.save_pretrained(staging, state_dict=state)
        if dtype is not None:
            _name_dtype(staging / "config.json", dtype)
        tokenizer.save_pretrained(staging)
        make_readable(staging)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return MergedCheckpoint(target, size, base.dtype if dtype is None else dtype, error)


@torch.no_grad()
def merged_state_dict(
    model: PeftModel | ExpertBank,
    expert: str | Mapping[str, float] | RouteWeights = "default",
    *,
    dtype: torch.dtype | None = None,
    exact: bool = True,
) -> tuple[dict[str, torch.Tensor], MergeError | None]:
    """
    The weights of the base model with an expert or mixture in them, under the base model's own names.

    Arguments and errors as for [`save_merged`].

    Returns:
        `tuple[dict[str, torch.Tensor], MergeError or None]`: The state dict, in which adapted weights are new tensors
        on the CPU and the others those of the model (unless `dtype` is another), and the error.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ExpertError(f"`dtype` of a merged checkpoint is one of {', '.join(map(_name, DTYPES))}, got {dtype}.")
    peft_model = _peft_model_of(model)
    batch = _mixture(peft_model, expert)
    base = peft_model.get_base_model()
    _check_exactly_mergeable(peft_model, base)
    try:
        state = plain_state_dict(base, batch)
        layers = {without_wrappers(adapted_name(n, m)): m for n, m in base.named_modules() if isinstance(m, SVFLayer)}
        batch.check_groups(list(layers.values()))
        tables = {name: batch.offsets(layer) for name, layer in layers.items()}  # (1, k), or (1, experts, k)
    except ValueError as error:
        raise ExpertError(f"The mixture cannot be merged: {error}") from error
    sums: dict[str, _Sums] = {}
    state = _cast(state, dtype)
    for name, table in logging.tqdm(tables.items(), desc="Merging", delay=SECONDS_WITHOUT_PROGRESS_BAR):
        if table is not None:
            key = name if name in state else f"{name}.weight"
            state[key], sums[name] = _merge(name, layers[name], table[0], dtype, exact)
    return state, _error(sums) if exact else None


def check_empty(folder: Path) -> None:
    """Raise an `ExpertError` if a checkpoint in `folder` would lie beside, or replace, something else."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ExpertError(f"{folder} is not empty; choose a new folder.")


def _peft_model_of(model: PeftModel | ExpertBank) -> PeftModel:
    inner: Any = model.model if isinstance(model, ExpertBank) else model
    inner = getattr(inner, "_orig_mod", inner)  # torch.compile's wrapper
    if "SVF" not in adapter_types(inner).values():
        raise ExpertError("The model has no expert to merge: the base model's own checkpoint is all there is.")
    return inner


def _mixture(model: PeftModel, expert: str | Mapping[str, float] | RouteWeights) -> MixedBatch:
    """The one mixture that `expert` stands for."""
    if isinstance(expert, str):
        expert = {expert: 1.0}
    if not isinstance(expert, Mapping):
        batch = MixedBatch(expert.experts, expert.weights, expert.groups, expert.residual)
        if batch.rows != 1 and not batch.is_uniform:
            raise ExpertError(f"A merged model has one mixture, but the route has {batch.rows} rows; choose one.")
    else:
        weights = {name: float(weight) for name, weight in expert.items() if name != BASE_LABEL}
        if not all(map(math.isfinite, weights.values())):
            raise ExpertError(f"The weights of a mixture are finite numbers, got {dict(expert)}.")
        batch = MixedBatch(tuple(weights), torch.tensor([list(weights.values())]))
    experts = [name for name, kind in adapter_types(model).items() if kind == "SVF"]
    if unknown := [name for name in batch.adapters if name not in experts]:
        raise ExpertError(f"There is no expert '{unknown[0]}' to merge; the model has {', '.join(experts)}.")
    if not batch.adapters or (batch.residual and not batch.weights.any()):
        raise ExpertError("This is the base model itself, which needs no export: use its own checkpoint.")
    return batch


def _check_exactly_mergeable(model: PeftModel, base: PreTrainedModel) -> None:
    if merged := model.get_model_status().merged_adapters:
        raise ExpertError(f"The experts {', '.join(merged)} are merged into the model; call unmerge_adapter() first.")
    layers = [module for module in base.modules() if isinstance(module, SVFLayer)]
    quantized = getattr(base.config, "quantization_config", None) is not None or any(
        layer.quantization_backend is not None for layer in layers
    )
    if quantized:
        raise ExpertError(
            "The base model is quantized, and a merged weight would be rounded to its few bits again, with an error "
            "as large as what an expert changes. Load the unquantized checkpoint of the base model, the expert onto "
            "it, export that, and quantize the result if need be."
        )
    try:
        refuse_merging_into_shards(base)
    except (ValueError, RuntimeError) as error:
        raise ExpertError(str(error)) from error
    if offloaded := [name for name, parameter in base.named_parameters() if parameter.is_meta]:
        raise ExpertError(f"{offloaded[0]} is offloaded; load the whole model into memory before exporting.")


def _cast(state: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The floating-point tensors in another dtype; what shares memory goes on sharing it."""
    if dtype is None:
        return dict(state)
    made: dict[tuple[int, torch.Size], torch.Tensor] = {}
    result = {}
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            result[key] = tensor
            continue
        identity = tensor.data_ptr(), tensor.shape
        if identity not in made:
            made[identity] = tensor.detach().to(dtype)
            _check_fits(key, tensor, made[identity])
        result[key] = made[identity]
    return result


def _merge(
    name: str, layer: SVFLayer, offset: torch.Tensor, dtype: torch.dtype | None, exact: bool
) -> tuple[torch.Tensor, _Sums]:
    """W' of one layer in the layout of its base layer, on the CPU."""
    weight = layer.to_matrix(layer.unmerged_weight()).detach()  # (out, in), or (experts, rows, columns)
    written, sums = [], []
    for matrix, basis, numbers in _matrices(layer, weight, offset, exact):
        change = change_of(matrix, basis, numbers)
        merged = matrix.to(change) + change
        rounded = merged.to(weight.dtype if dtype is None else dtype)
        _check_fits(name, merged, rounded)
        difference = rounded.to(merged) - merged
        sums.append(_Sums(*(float(each.norm().square()) for each in (difference, merged, change))))
        written.append(rounded.cpu())
    total = _Sums(*map(sum, zip(*sums, strict=True)))
    result = torch.stack(written) if layer.stack else written[0]
    return layer.to_matrix(result).contiguous(), total


def _matrices(
    layer: SVFLayer, weight: torch.Tensor, offset: torch.Tensor, exact: bool
) -> Iterator[tuple[torch.Tensor, SingularBasis, torch.Tensor]]:
    """The matrices of a layer, one or a stack, each with the leading columns of its basis and its offset."""
    layer.require_basis()
    own, singular_values = layer.svf_basis, layer.svf_singular_values
    if not layer.stack:
        weight, offset, own, singular_values = (each[None] for each in (weight, offset, own, singular_values))
    count = offset.shape[-1]
    # Where the basis was brought along, from other weights than these, the expert is defined by that one.
    again = exact and sketch_distance(layer.svf_sketch or [], _sketch(weight, layer)) <= SAME_WEIGHT
    for index, matrix in enumerate(weight):
        if again:
            basis = singular_basis(matrix)
            matrix = matrix.to(basis.vectors.device)
        else:
            basis = SingularBasis(layer.svf_side, own[index], singular_values[index])
        vectors = basis.vectors[:, :count]
        if exact and vectors.device.type != "mps":  # which has no float64
            vectors = vectors.to(torch.float64)
        numbers = offset[index].to(vectors.device, torch.promote_types(vectors.dtype, torch.float32))
        yield matrix, SingularBasis(basis.side, vectors, basis.singular_values), numbers


def _sketch(weight: torch.Tensor, layer: SVFLayer) -> list[float]:
    sketches = [weight_sketch(matrix) for matrix in weight]
    return sketch_of_stack(sketches) if layer.stack else sketches[0]


def _check_fits(name: str, before: torch.Tensor, after: torch.Tensor) -> None:
    if not torch.isfinite(after).all():
        reason = (
            f"has values that {_name(after.dtype)} cannot hold; choose bfloat16 or float32 as dtype"
            if torch.isfinite(before).all()
            else "has NaN or infinite values; the expert or the base checkpoint is damaged"
        )
        raise ExpertError(f"The merged weight '{name}' {reason}.")


def _error(sums: Mapping[str, _Sums]) -> MergeError:
    def relative(missed: float, whole: float) -> float:
        return math.sqrt(missed / whole) if whole else 0.0

    missed, whole, change = (sum(column) for column in zip(*sums.values(), strict=True)) if sums else (0.0, 0.0, 0.0)
    modules = {name: relative(each.missed, each.whole) for name, each in sums.items()}
    return MergeError(relative(missed, whole), relative(missed, change), modules)


def _name_dtype(path: Path, dtype: torch.dtype) -> None:
    """Let config.json name the dtype of the tensors; transformers has written that of the model in memory."""
    config = json.loads(path.read_text("utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part.get("dtype") is not None:
            part["dtype"] = _name(dtype)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
