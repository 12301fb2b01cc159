"""A folder for mergekit: every expert as a checkpoint or LoRA of its own, and the recipe that merges them.

    FOLDER/mergekit.yaml       # the recipe; mergekit takes its relative paths from where it runs: FOLDER
    FOLDER/math/, FOLDER/code/ # merged checkpoints, or LoRAs

    cd FOLDER && mergekit-yaml mergekit.yaml merged

An SVF mixture is linear in the weights, so `task_arithmetic` with the weights α gives W + Σ αₖ (W'ₖ − W), which is
what `bank.routed(α)` computes, up to the rounding of the checkpoints. mergekit's other methods (ties, dare and so on)
are what such a folder is for.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
import yaml  # type: ignore[import-untyped]

from peft_svf.experts.bank import ExpertBank
from peft_svf.experts.bank_config import BASE_FOLDER
from peft_svf.experts.bank_saving import base_reference
from peft_svf.experts.base_state import plain_state_dict
from peft_svf.experts.errors import ExpertError
from peft_svf.experts.files import make_readable, replaced_folder
from peft_svf.experts.lora_export import LoraError, save_as_lora
from peft_svf.experts.merged_export import MergeError, check_empty, save_merged


MergeMethod: TypeAlias = Literal["task_arithmetic", "linear", "ties", "dare_linear", "dare_ties"]

RECIPE = "mergekit.yaml"
SPARSE: tuple[MergeMethod, ...] = ("ties", "dare_linear", "dare_ties")  # methods with a `density`


@dataclass(frozen=True)
class MergekitFolder:
    """What [`save_for_mergekit`] wrote.

    Attributes:
        folder (`Path`): Holds `mergekit.yaml` and a folder for each expert.
        size (`int`): Bytes of all files.
        errors (`dict[str, MergeError | LoraError | None]`): Of every expert: of its checkpoint, or of its LoRA.
        command (`str`): What runs the merge.
    """

    folder: Path
    size: int
    errors: dict[str, MergeError | LoraError | None]
    command: str


def save_for_mergekit(
    bank: ExpertBank,
    folder: str | Path,
    weights: Mapping[str, float] | None = None,
    *,
    merge_method: MergeMethod = "task_arithmetic",
    density: float | None = None,
    lora_rank: int | float | None = None,
    dtype: torch.dtype | None = None,
    exact: bool = True,
    include_base: bool = False,
) -> MergekitFolder:
    """
    Write experts of a bank so that mergekit can merge them with one another, or with other models.

    Args:
        bank ([`ExpertBank`]): The experts.
        folder (`str` or `Path`): A new or empty folder, written as a whole or not at all.
        weights (`Mapping[str, float]`, *optional*):
            Which experts, and their weight in the recipe; by default all, in equal shares. The recipe is a text file:
            weights can be changed there.
        merge_method (`str`, *optional*, defaults to `"task_arithmetic"`):
            `"task_arithmetic"`, `"linear"` (both are the mixture that the bank computes), `"ties"`, `"dare_linear"` or
            `"dare_ties"`.
        density (`float`, *optional*): Share of the changed weights that ties and dare keep, in (0, 1]; mergekit keeps
            all by default.
        lora_rank (`int` or `float`, *optional*):
            Write LoRAs of this rank, or with this share of ‖W' − W‖², instead of merged checkpoints; see
            [`save_as_lora`]. Small, but not exact: read the errors.
        dtype (`torch.dtype`, *optional*): Of merged checkpoints; by default that of the base model.
        exact (`bool`, *optional*, defaults to `True`): See [`save_merged`].
        include_base (`bool`, *optional*, defaults to `False`):
            Write the base model too. Otherwise the recipe names the place that it was loaded from.

    Returns:
        [`MergekitFolder`]: The folder, its size, the errors and the command.

    Raises:
        ExpertError: An unknown expert, a weight or density that cannot be, `folder` is not empty, there is no place
            of the base model to name, or see [`save_merged`].
        ValueError: `lora_rank` cannot be, see [`save_as_lora`].
    """
    target = Path(folder).absolute()
    check_empty(target)
    weights = _checked_weights(bank, weights)
    recipe = _recipe(_base_name(bank, target, include_base), weights, merge_method, density, lora_rank is not None)
    written = bank.base_model.dtype if dtype is None else dtype
    recipe |= {"dtype": "float32", "out_dtype": str(written).removeprefix("torch.")}
    errors: dict[str, MergeError | LoraError | None] = {}
    with replaced_folder(target) as staging:
        for name in weights:
            if lora_rank is None:
                errors[name] = save_merged(bank, staging / name, name, dtype=dtype, exact=exact).error
            else:
                errors[name] = save_as_lora(staging / name, bank.model, lora_rank, name)
        if include_base:
            _save_base(bank, staging / BASE_FOLDER)
        command = f"cd {shlex.quote(str(target))} && mergekit-yaml {RECIPE} merged"
        command += " --lora-merge-cache lora-cache" if lora_rank is not None else ""
        text = f"# {command}\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}"
        (staging / RECIPE).write_text(text, "utf-8")
        make_readable(staging)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    return MergekitFolder(target, size, errors, command)


def _checked_weights(bank: ExpertBank, weights: Mapping[str, float] | None) -> dict[str, float]:
    if not bank.experts:
        raise ExpertError("The bank has no experts to export.")
    if weights is None:
        weights = dict.fromkeys(bank.experts, 1 / len(bank.experts))
    for name, weight in weights.items():
        if name not in bank.experts:
            raise ExpertError(f"There is no expert '{name}' to export; the bank has {', '.join(bank.experts)}.")
        if not math.isfinite(weight):
            raise ExpertError(f"The weight of '{name}' is not a finite number: {weight}.")
    if not weights:
        raise ExpertError(f"Name at least one expert to export; the bank has {', '.join(bank.experts)}.")
    return {name: float(weight) for name, weight in weights.items()}


def _base_name(bank: ExpertBank, target: Path, include_base: bool) -> str:
    """The base model as mergekit names models: a folder, or an id on the Hub with "@revision"."""
    if include_base:
        return f"./{BASE_FOLDER}"  # "./": mergekit would ask the Hub whether it has a model "base"
    base = base_reference(bank, target)
    if "+" in base or "@" in base:
        raise ExpertError(f"mergekit takes the + and @ in {base!r} for something else; pass include_base=True.")
    revision = None if Path(base).is_dir() else bank.base_revision
    return f"{base}@{revision}" if revision else base


def _recipe(
    base: str, weights: Mapping[str, float], merge_method: MergeMethod, density: float | None, is_lora: bool
) -> dict[str, Any]:
    if merge_method not in get_args(MergeMethod):
        raise ExpertError(f"`merge_method` is one of {', '.join(get_args(MergeMethod))}, got {merge_method!r}.")
    if density is not None and (merge_method not in SPARSE or not 0 < density <= 1):
        raise ExpertError(f"`density` is a share in (0, 1] and for {', '.join(SPARSE)} only, got {density}.")
    keeps = {} if density is None else {"density": density}
    models = [
        {"model": f"{base}+./{name}" if is_lora else f"./{name}", "parameters": {"weight": weight, **keeps}}
        for name, weight in weights.items()
    ]
    if merge_method == "linear":  # which has no base model: that is one of the models, with the rest of the weight
        rest = {"model": base, "parameters": {"weight": 1 - sum(weights.values())}}
        return {"merge_method": merge_method, "models": [rest, *models], "parameters": {"normalize": False}}
    return {"merge_method": merge_method, "base_model": base, "models": models}


def _save_base(bank: ExpertBank, folder: Path) -> None:
    bank.base_model.save_pretrained(folder, state_dict=plain_state_dict(bank.base_model))
    (bank.processor or bank.tokenizer).save_pretrained(folder)
