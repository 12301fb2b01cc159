"""`transfer`: the offsets of an expert on the singular values of another base model, in their order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from peft_svf.experts.algebra.common import name_of, origin_of
from peft_svf.experts.base_commit import base_commit
from peft_svf.experts.errors import ExpertError
from peft_svf.experts.expert import Expert, leading_ranks
from peft_svf.experts.transfer.controls import CONTROLS, Control, controlled
from peft_svf.experts.transfer.interpolation import combined, resample
from peft_svf.experts.transfer.matching import Matching, Source
from peft_svf.experts.transfer.matrices import BaseMatrix, fused_experts_of, matrices_of
from peft_svf.experts.transfer.report import TransferReport
from peft_svf.spectrum import sketch_distance
from peft_svf.tuner.base_check import OTHER_MODEL, OTHER_ROUNDING
from peft_svf.tuner.bases import common_source
from peft_svf.tuner.config import SVFConfig


FORMULA = (
    "offset'[j] = offset at relative rank j / (r' - 1), linear between components in singular-value order, and linear "
    "between the two layers nearest to relative depth l / (L' - 1), role by role"
)
# Facts that hold on any base model; what was trained and measured on the old one does not come along.
KEPT_FACTS = ("name", "label", "description", "task", "reward", "license", "language")
STATEMENT = "Transferred from another base model; nothing was trained on this one."


@dataclass(frozen=True)
class Transfer:
    """
    An expert on another base model, and what it is made of.

    Args:
        expert ([`Expert`]): For the target, with the target's fingerprint.
        report ([`TransferReport`]): What was matched with what.
    """

    expert: Expert
    report: TransferReport


def transfer(
    expert: Expert,
    target: PreTrainedModel | PeftModel,
    *,
    control: Control | None = None,
    seed: int = 0,
    source_model: PreTrainedModel | PeftModel | None = None,
) -> Transfer:
    """
    Use an expert of one base model on another (Transformer², arXiv 2501.06252, section 4.2 and Tables 5 and 9).

    A matrix of the target takes the offsets of the expert's matrix of the same role (q_proj, up_proj, ...) at the same
    relative depth, in the order of the singular values. Where depths differ, the offsets of the two nearest layers
    are interpolated; where ranks differ, by relative rank ([`~peft_svf.experts.transfer.interpolation.resample`]);
    a layer that the expert does not adapt counts as offset 0. What has no counterpart stays as the base model has it.

    Nothing says that the n-th singular values of two models mean the same. So compare with the controls, on prompts
    that nothing was chosen by: in the paper plain transfer gains nothing on the training tasks (Table 9).

    Args:
        expert ([`Expert`]): What to transfer.
        target (`PreTrainedModel` or `PeftModel`):
            The other base model. It is only read; its adapters, merged SVF adapters too, make no difference.
        control (`"shuffled"`, `"reversed"` or `"random"`, *optional*):
            A transfer to compare with: the same matrices, offsets in another order or of no order at all.
        seed (`int`, *optional*, defaults to 0): Of the controls `"shuffled"` and `"random"`.
        source_model (`PreTrainedModel` or `PeftModel`, *optional*):
            The expert's base model, for the distances of the spectra in the report. They take the singular values of
            all matrices of both models, which otherwise are not needed.

    Returns:
        [`Transfer`]: Of the expert's base model itself as target, the same offsets, exactly, and a note that transfer
        was not necessary.

    Raises:
        ExpertError: Nothing matches, the expert holds more than offsets, `source_model` is another model than the
            expert's, or weights of the target cannot be read.
    """
    if control is not None and control not in CONTROLS:
        raise ExpertError(f"There is no control {control!r}: choose {', '.join(CONTROLS)}, or none.")
    expert.check_only_offsets("transfer")
    matrices = matrices_of(target)
    source = Source(expert, {} if source_model is None else _source_matrices(expert, source_model))
    matching = Matching(source, matrices, fused_experts_of(target), _is_same_base(expert, matrices))
    report = matching.report()
    offsets = {
        matrix.name: _offset(source, matrix.sources, matrix.rank) for matrix in report.matrices if matrix.sources
    }
    if not offsets:
        raise ExpertError(
            f"Nothing of {source.name} fits the target {_name_of(target)!r}: the expert adapts "
            f"{source.roles() or 'no module of a known place'}, the target has {matching.target_roles()}."
        )
    made = _made(expert, target, matrices, offsets, control, seed, report)
    return Transfer(controlled(made, control, seed), report)


def _offset(source: Source, weights: Mapping[str, float], rank: int) -> torch.Tensor:
    parts = {name: resample(source.offsets[name], source.ranks[name], rank) for name in weights}
    if len(parts) == 1 and set(weights.values()) == {1.0}:
        return next(iter(parts.values()))
    return combined(parts, weights)


def _made(
    expert: Expert,
    target: PreTrainedModel | PeftModel,
    matrices: Mapping[str, BaseMatrix],
    offsets: Mapping[str, torch.Tensor],
    control: str | None,
    seed: int,
    report: TransferReport,
) -> Expert:
    """The expert for the target, with what it is made of among its facts."""
    config = SVFConfig(
        task_type=expert.config.task_type,
        base_model_name_or_path=_name_of(target),
        revision=base_commit(_config_of(target)),
        target_modules=sorted(offsets),
        rank_pattern=leading_ranks(offsets, {name: matrices[name].rank for name in offsets}),
        inference_mode=True,
        basis_source=common_source({name: matrices[name].layer for name in offsets}),
        base_fingerprint={name: matrices[name].sketch for name in offsets},
    )
    kept = {key: expert.metadata[key] for key in KEPT_FACTS if expert.metadata.get(key) is not None}
    settings = {"control": control, "seed": seed, "same_base": report.same_base, **report.totals}
    kept["name"] = f"{name_of(expert)}, transferred" + (f" ({control})" if control else "")
    origin = origin_of("transfer", FORMULA, [expert], settings)
    origin["statement"] = STATEMENT + (f" A control: {CONTROLS[control]}." if control else "")
    made = {name: offset.to(torch.float32) for name, offset in offsets.items()}
    return Expert(made, config, {**kept, "origin": origin}, {}, f"{expert.source}, transferred")


def _source_matrices(expert: Expert, model: PreTrainedModel | PeftModel) -> dict[str, BaseMatrix]:
    """The weights of the expert's base model; raises an `ExpertError` if `model` is another one."""
    matrices = matrices_of(model)
    for name, sketch in expert.fingerprint.items():
        if name not in expert.offsets or expert.offsets[name].dim() > 1:
            continue
        found = matrices.get(name)
        if found is None or sketch_distance(sketch, found.sketch) > OTHER_MODEL:
            raise ExpertError(
                f"The source model {_name_of(model)!r} is not the base model of {expert.source}: its '{name}' is "
                f"{'missing' if found is None else 'another'}; give {expert.base_model!r}, or leave it out."
            )
    return matrices


def _is_same_base(expert: Expert, matrices: Mapping[str, BaseMatrix]) -> bool:
    """Whether every weight that the expert adapts is one of the target's, by name and fingerprint."""
    sketches = {name: expert.fingerprint.get(name) for name in expert.offsets}
    return all(
        sketch is not None and name in matrices and sketch_distance(sketch, matrices[name].sketch) <= OTHER_ROUNDING
        for name, sketch in sketches.items()
    )


def _config_of(model: PreTrainedModel | PeftModel) -> Any:
    return (model.get_base_model() if isinstance(model, PeftModel) else model).config


def _name_of(model: PreTrainedModel | PeftModel) -> str:
    return str(getattr(_config_of(model), "_name_or_path", "") or "")
