"""Which matrices of an expert go to which matrices of another model: by role and relative depth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from transformers import AutoConfig

from peft_svf.experts.expert import Expert
from peft_svf.experts.transfer.interpolation import combined, neighbours, resample, spectra_distance
from peft_svf.experts.transfer.matrices import BaseMatrix
from peft_svf.experts.transfer.places import FUSED, Place
from peft_svf.experts.transfer.report import MatrixTransfer, TransferReport


NO_BASE = "The source's singular values are not at hand, so the distances of the spectra are unknown"
STACKED = "fused experts of a mixture-of-experts layer have no counterparts in another model"


@dataclass(frozen=True)
class Source:
    """
    An expert as what is transferred from.

    Args:
        expert ([`Expert`]): The expert.
        matrices (`Mapping[str, BaseMatrix]`): Its base model's, if that is at hand.
    """

    expert: Expert
    matrices: Mapping[str, BaseMatrix] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.expert.source

    @cached_property
    def offsets(self) -> dict[str, torch.Tensor]:
        """Those of matrices, by name; stacks of matrices are left out."""
        return {name: offset for name, offset in self.expert.offsets.items() if offset.dim() == 1}

    @cached_property
    def ranks(self) -> dict[str, int]:
        """How many singular values the weights have, as far as that is known."""
        config = self.expert.config
        limited = bool(config.rank or config.rank_pattern)
        found = {}
        for name, offset in self.offsets.items():
            if name in self.matrices:
                found[name] = self.matrices[name].rank
            elif name in self.expert.fingerprint:
                found[name] = int(min(self.expert.fingerprint[name][:2]))
            elif not limited:
                found[name] = len(offset)
        return found

    @cached_property
    def places(self) -> dict[Place, str]:
        """The matrices by where they stand."""
        return {Place.of(name): name for name in self.offsets}

    def roles(self) -> str:
        """What the expert adapts, for messages."""
        return ", ".join(dict.fromkeys(place.role for place in map(Place.of, self.expert.offsets)))

    def layers(self, tower: str) -> int:
        """How many layers the tower has: in the base model or its configuration, or else as far as it is adapted."""
        counted = count_layers([*self.matrices], tower)
        adapted = count_layers([*self.expert.offsets, *self.expert.fingerprint], tower)
        if not counted and tower == "text":
            counted = _configured_layers(self.expert)
        return max(counted, adapted)


class Matching:
    """
    Every matrix of the target with what it takes from the expert.

    Args:
        source ([`Source`]): The expert.
        matrices (`Mapping[str, BaseMatrix]`): The target's.
        stacked (`list[str]`): The target's fused experts, by parameter name.
        same_base (`bool`): Whether the target is the expert's own base model; names then decide, not places.
    """

    def __init__(
        self, source: Source, matrices: Mapping[str, BaseMatrix], stacked: list[str], same_base: bool
    ) -> None:
        self.source, self.stacked, self.same_base = source, stacked, same_base
        adapts_head = any(place.role == "lm_head" for place in source.places)
        self.matrices = {n: m for n, m in matrices.items() if adapts_head or m.place.role != "lm_head"}
        self.target_layers = {tower: count_layers([*matrices], tower) for tower in self._towers()}
        self.source_layers = {
            tower: count if same_base else source.layers(tower) for tower, count in self.target_layers.items()
        }

    def _towers(self) -> list[str]:
        return list(dict.fromkeys(matrix.place.tower for matrix in self.matrices.values()))

    def target_roles(self) -> str:
        """What the target has, for messages."""
        names = [*self.matrices, *self.stacked]
        return ", ".join(dict.fromkeys(Place.of(name).role for name in names)) or "no linear layers"

    def report(self) -> TransferReport:
        """What becomes of every matrix of both."""
        matrices = [self._matrix(matrix) for matrix in self.matrices.values()]
        matrices += [MatrixTransfer(name, "unmatched", 0, reason=STACKED) for name in self.stacked]
        used = {name for matrix in matrices for name in matrix.sources}
        unused = {name: self._why_unused(name) for name in self.source.expert.offsets if name not in used}
        layers = {tower: (self.source_layers[tower], count) for tower, count in self.target_layers.items() if count}
        return TransferReport(tuple(matrices), unused, layers, self.same_base, self._notes(layers))

    def _notes(self, layers: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
        notes = [
            f"Layers of the {tower} tower: {source} in the source, {target} in the target, interpolated by relative "
            "depth"
            for tower, (source, target) in layers.items()
            if source != target and source
        ]
        if self.same_base:
            notes.append(
                "The target is the expert's own base model: transfer is unnecessary, the offsets stay as they are"
            )
        elif not self.source.matrices:
            notes.append(f"{NO_BASE}; give the source model to know them")
        return tuple(notes)

    def _matrix(self, matrix: BaseMatrix) -> MatrixTransfer:
        weights, reason = self._sources(matrix)
        if not weights:
            return MatrixTransfer(matrix.name, "unmatched", matrix.rank, reason=reason)
        ranks = {name: self.source.ranks[name] for name in weights}
        whole = len(weights) == 1 and set(weights.values()) == {1.0}
        is_same = whole and set(ranks.values()) == {matrix.rank}
        parts = [resample(self.source.offsets[name], rank, matrix.rank) for name, rank in ranks.items()]
        if not is_same and not reason:
            reason = "other rank" if whole else "between two layers"
        return MatrixTransfer(
            matrix.name,
            "matched" if is_same else "interpolated",
            matrix.rank,
            weights,
            ranks,
            max(map(len, parts)),
            self._distance(matrix, weights),
            "" if is_same else reason,
        )

    def _sources(self, matrix: BaseMatrix) -> tuple[dict[str, float], str]:
        """The expert's matrices with their weights, or why there are none; beside weights, what is special there."""
        if self.same_base:
            adapted = matrix.name in self.source.offsets
            return ({matrix.name: 1.0}, "") if adapted else ({}, "the expert does not adapt it")
        place, places = matrix.place, self.source.places
        if place.is_routed:
            return {}, "the routed experts of two models do not correspond to each other"
        counterparts = [own for own in places if (own.tower, own.role) == (place.tower, place.role)]
        if not counterparts:
            return {}, self._why_no_role(place)
        if place.layer is None:
            near = {None: 1.0}
        else:
            count = self.target_layers[place.tower], self.source_layers[place.tower]
            near = dict(neighbours(place.layer, *count))  # type: ignore[arg-type]
        weights = {
            places[own]: weight
            for layer, weight in near.items()
            if (own := Place(place.tower, place.role, layer)) in places
        }
        if not weights:
            return {}, f"the expert adapts no {place.role} in layer {' or '.join(map(str, near))}"
        if unknown := [name for name in weights if name not in self.source.ranks]:
            return {}, f"how many singular values '{unknown[0]}' has is not known; give the source model"
        return weights, "" if len(weights) == len(near) else "one of the two layers is not adapted"

    def _why_no_role(self, place: Place) -> str:
        """Why the expert has nothing for a matrix."""
        own = {p.role for p in self.source.places if p.tower == place.tower}
        if parts := own & set(FUSED.get(place.role, ())):
            return f"it is {place.role}, which the expert adapts apart ({', '.join(sorted(parts))})"
        if fused := [role for role, parts in FUSED.items() if role in own and place.role in parts]:
            return f"the expert adapts {fused[0]} as one matrix"
        where = "" if place.tower == "text" else f" in a {place.tower} tower"
        return f"the expert adapts no {place.role}{where}"

    def _why_unused(self, name: str) -> str:
        """Why a matrix of the expert goes nowhere."""
        place = Place.of(name)
        if self.source.expert.offsets[name].dim() > 1:
            return STACKED
        if place.is_routed:
            return "the routed experts of two models do not correspond to each other"
        towers = {m.place.tower for m in self.matrices.values() if m.place.role == place.role}
        if place.tower in towers:
            return "no layer of the target is nearest to it in relative depth"
        return f"the target has no {place.role}" + (f" in a {place.tower} tower" if towers else " of its own")

    def _distance(self, matrix: BaseMatrix, weights: Mapping[str, float]) -> float | None:
        """Of the target's spectrum to the source's, the weighted mean of two layers' normalised ones."""
        if self.same_base:
            return 0.0
        if not all(name in self.source.matrices for name in weights):
            return None
        spectra = {name: self.source.matrices[name].spectrum.to(torch.float64) for name in weights}
        parts = {name: resample(s, len(s), matrix.rank) for name, s in spectra.items()}
        mixed = combined({name: part / part.sum() for name, part in parts.items()}, weights)
        distance = spectra_distance(mixed, matrix.spectrum)
        return distance if math.isfinite(distance) else None


def count_layers(names: list[str], tower: str) -> int:
    """One more than the largest layer number among modules of a tower; 0 if there is none."""
    places = [Place.of(name) for name in names]
    return max((1 + p.layer for p in places if p.tower == tower and p.layer is not None), default=0)


def _configured_layers(expert: Expert) -> int:
    """What the base model's config.json says, if it is on this machine; 0 otherwise."""
    if not expert.base_model:
        return 0
    sides = {side for sketch in expert.fingerprint.values() for side in sketch[:2]}
    try:
        found = AutoConfig.from_pretrained(expert.base_model, revision=expert.base_revision, local_files_only=True)
        config = found.get_text_config()
        is_it = float(config.hidden_size) in sides  # a relative path may lead to another model by now
        return int(config.num_hidden_layers) if is_it else 0
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return 0
