"""Spectra: the singular values of a model's weights, read from a live model or weight by weight from a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_svf.experts.errors import ExpertError
from peft_svf.experts.expert import Expert
from peft_svf.spectrum import sketch_distance, weight_sketch
from peft_svf.spectrum.fingerprint import sketch_of_stack
from peft_svf.tuner.adapted import adapted_name
from peft_svf.tuner.base_check import OTHER_MODEL
from peft_svf.tuner.checkpoint_weights import CheckpointWeights
from peft_svf.tuner.layer import SVFLayer
from peft_svf.tuner.names import in_layer, name_in_base


PAPER_COMPONENTS = 256  # of which the paper says how little they hold
PAPER_RANK = 4096  # of the square matrices of Llama-3-8B, of which it says so
_STACK = re.compile(r"\.experts\.[^.]+$")  # a fused parameter: one matrix for each expert of a mixture of experts


@dataclass(frozen=True)
class Spectra:
    """
    The singular values of the weights of a model.

    Args:
        singular_values (`Mapping[str, torch.Tensor]`):
            By module name, in descending order; shape (r,), or (E, r) for fused parameters; float64 on the CPU.
        sketches (`Mapping[str, tuple[list[float], ...]]`, *optional*):
            Fingerprints of the weight as it is stored and, where it may be stored the other way round, transposed.
        source (`str`, *optional*): What was read, for messages.
    """

    singular_values: Mapping[str, Tensor]
    sketches: Mapping[str, tuple[list[float], ...]] = field(default_factory=dict)
    source: str = "the model"

    def components(self) -> int:
        """The 256 components of the paper, or as large a part (a sixteenth) of the largest rank of a smaller model."""
        largest = max(values.shape[-1] for values in self.singular_values.values())
        return min(PAPER_COMPONENTS, max(1, largest * PAPER_COMPONENTS // PAPER_RANK))

    def shares(self, components: int | None = None) -> dict[str, float]:
        """
        How much of each weight its largest components hold: Σ σᵢ over the first `components`, as a share of all.

        The paper (Transformer², arXiv 2501.06252, appendix, Figures 10 and 11) calls this the captured variance; it
        sums σ, not σ².

        Args:
            components (`int`, *optional*, defaults to [`~Spectra.components`]): How many components.

        Returns:
            `dict[str, float]`: In [0, 1] by module name; of a fused parameter, the mean over its matrices.
        """
        count = components or self.components()
        return {
            name: float((values[..., :count].sum(-1) / values.sum(-1)).mean())
            for name, values in self.singular_values.items()
        }

    def statement(self, components: int | None = None) -> str:
        """What the paper says of its models ("the top 256 components hold less than 50 %"), counted for this one."""
        count = components or self.components()
        shares = list(self.shares(count).values())
        below = sum(share < 0.5 for share in shares)
        return (
            f"The largest {count} singular values hold {100 * sum(shares) / len(shares):.0f} % of the sum of all, on "
            f"average over {len(shares)} matrices, and less than 50 % in {below} of them."
        )


def read_spectra(
    source: nn.Module | str | Path, names: Collection[str] | None = None, show_progress: bool = False
) -> Spectra:
    """
    Read or compute singular values, of one weight after another.

    A live model with SVF adapters has those of the adapted weights. Others are computed in float64 from the smaller
    Gram matrix; those below 1e-8 of the largest are not exact. That takes about n³ / 10¹⁰ seconds on one core for
    rank n: some seconds a matrix for rank 4,096.

    Args:
        source (`nn.Module`, `str` or `Path`): A model, the folder of a checkpoint in safetensors, or, with `names`,
            its id on the Hub.
        names (`Collection[str]`, *optional*):
            Modules or fused parameters, as the base model calls them. Defaults to the adapted ones of a live model,
            else to all matrices in its layers.
        show_progress (`bool`, *optional*, defaults to `False`): Whether to show a bar.

    Raises:
        ValueError: There is no such weight, it is quantized, on the meta device or not finite, or there is no matrix.
    """
    from tqdm import tqdm

    live = isinstance(source, nn.Module)
    weights = _of_model(source, names) if isinstance(source, nn.Module) else _of_checkpoint(source, names)
    values: dict[str, Tensor] = {}
    sketches: dict[str, tuple[list[float], ...]] = {}
    for name, weight in tqdm(weights, desc="Singular values", disable=not show_progress, leave=False):
        if isinstance(weight, SVFLayer):
            values[name] = weight.svf_singular_values.detach().to("cpu", torch.float64)
            sketches[name] = (weight.svf_sketch,) if weight.svf_sketch else ()
        else:
            _check(name, weight)
            values[name], sketches[name] = singular_values(weight), _sketches(weight)
    if not values:
        raise ValueError(f"There are no matrices in the layers of {'the model' if live else source}.")
    return Spectra(values, sketches, "the model" if live else str(source))


def singular_values(weight: Tensor) -> Tensor:
    """Singular values of a matrix or of a stack of matrices, shape (…, r), descending, float64 on the CPU."""
    if weight.dim() == 3:
        return torch.stack([singular_values(matrix) for matrix in weight])
    matrix = weight.detach().to("cpu", torch.float64)
    scale = matrix.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    matrix = matrix / scale
    gram = matrix.T @ matrix if matrix.shape[1] <= matrix.shape[0] else matrix @ matrix.T
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).sqrt() * scale


def relative_changes(expert: Expert, spectra: Spectra) -> dict[str, float]:
    """
    How much an expert changes each weight of its base model: ‖ΔW‖ / ‖W‖ = √(Σ ((z − 1) σ)² / Σ σ²), Frobenius norms.

    A z far from 1 on a small singular value counts little here, one on a large singular value much.

    Args:
        expert ([`~peft_svf.experts.Expert`]): The expert.
        spectra ([`Spectra`]): Of its base model, with its modules.

    Returns:
        `dict[str, float]`: By module name.

    Raises:
        ExpertError: A module is missing, or the model is not the one that the expert was trained on.
    """
    changes = {}
    for name, offset in expert.offsets.items():
        _check_same(name, expert, spectra)
        values = spectra.singular_values[name]
        moved = offset.to(torch.float64) * values[..., : offset.shape[-1]]
        changes[name] = float(moved.norm() / values.norm())
    return changes


def _of_model(model: nn.Module, names: Collection[str] | None) -> Iterator[tuple[str, Tensor | SVFLayer]]:
    """The wanted weights of a live model, by name in the base model; adapted ones as their layer, which knows more."""
    found: dict[str, Tensor | SVFLayer] = {}
    for path, module in model.named_modules():
        name = name_in_base(path)
        if isinstance(module, SVFLayer):
            found[name_in_base(adapted_name(path, module))] = module
        elif isinstance(module, (nn.Linear, Conv1D)) and not path.endswith(".base_layer"):
            found[name] = module.weight
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 3 and _STACK.search(f".{name}.{key}"):
                found.setdefault(f"{name.replace('.base_layer', '')}.{key}", parameter)
    if names is not None:
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(f"The model has no linear layer or fused parameter '{missing[0]}'.")
        chosen = list(names)
    else:
        adapted = [name for name, weight in found.items() if isinstance(weight, SVFLayer)]
        chosen = adapted or [name for name in found if in_layer(name)]
    for name in chosen:
        yield name, _with_spectrum(found[name])


def _with_spectrum(weight: Tensor | SVFLayer) -> Tensor | SVFLayer:
    """An adapted layer without its basis yet (`save_basis=True`) takes it over first."""
    if isinstance(weight, SVFLayer):
        weight.require_basis()
    return weight


def _of_checkpoint(source: str | Path, names: Collection[str] | None) -> Iterator[tuple[str, Tensor]]:
    checkpoint = CheckpointWeights(str(source))
    wanted = _matrices(Path(source)) if names is None else dict.fromkeys(names, "")
    for name in wanted:
        yield name, checkpoint.read_parameter(name if _STACK.search(name) else f"{name}.weight")


def _matrices(folder: Path) -> list[str]:
    """Modules and fused parameters in the layers of a checkpoint, by the headers of its files alone."""
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}: the spectra of all matrices need a checkpoint in a folder.")
    names: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        for key, shape in shapes.items():
            stack = len(shape) == 3 and _STACK.search(key)
            if in_layer(key) and (stack or (len(shape) == 2 and key.endswith(".weight"))):
                names.append(key if stack else key.removesuffix(".weight"))
    return sorted(names)


def _check(name: str, weight: Tensor) -> None:
    if weight.is_meta or not weight.is_floating_point() or weight.dim() not in (2, 3) or not weight.numel():
        raise ValueError(
            f"The weight of '{name}' has no singular values here ({weight.dtype}, shape {tuple(weight.shape)}, on "
            f"{weight.device}): read the unquantized checkpoint of the model instead."
        )
    if not torch.isfinite(weight).all():
        raise ValueError(f"The weight of '{name}' holds values that are not finite; get the checkpoint again.")


def _sketches(weight: Tensor) -> tuple[list[float], ...]:
    """As stored, and transposed: GPT-2's weights are stored as (in, out), and fingerprints are of (out, in)."""
    if weight.dim() == 3:
        return (sketch_of_stack([weight_sketch(matrix) for matrix in weight]),)
    return weight_sketch(weight), weight_sketch(weight.T)


def _check_same(name: str, expert: Expert, spectra: Spectra) -> None:
    if name not in spectra.singular_values:
        raise ExpertError(f"{spectra.source} has no '{name}', which {expert.source} adapts; give its base model.")
    expected, found = expert.fingerprint.get(name), spectra.sketches.get(name, ())
    rank, trained = spectra.singular_values[name].shape[-1], expert.offsets[name].shape[-1]
    distance = min((sketch_distance(sketch, expected) for sketch in found), default=0.0) if expected else 0.0
    if distance > OTHER_MODEL or trained > rank:
        why = f"differs by {distance:.1e} of its norm" if distance < 2 else "has another shape"
        raise ExpertError(
            f"{expert.source} was trained on another base model than {spectra.source}: '{name}' {why}; give "
            f"{expert.base_model or 'the model it was trained on'}."
        )
