"""What a transfer matches with what, known before anything is written: matrix by matrix, in words and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

from peft_svf.text_table import table


Status = Literal["matched", "interpolated", "unmatched"]


@dataclass(frozen=True)
class MatrixTransfer:
    """
    What becomes of one matrix of the target.

    Args:
        name (`str`): Of its module in the target.
        status (`str`):
            `"matched"`: the offsets of one matrix of the same rank, as they are. `"interpolated"`: of another rank, or
            of the two layers nearest in relative depth. `"unmatched"`: nothing fits, it stays as in the base model.
        rank (`int`): Its number of singular values.
        sources (`Mapping[str, float]`): Matrices of the expert, with their weights, which sum to 1 unless a layer
            that belongs to them is not adapted.
        source_ranks (`Mapping[str, int]`): Their numbers of singular values.
        components (`int`): How many leading singular values are adapted.
        spectra_distance (`float`, *optional*):
            ‖s − t‖₂ / ‖t‖₂ of its singular values t and the source's s, see
            [`~peft_svf.experts.transfer.interpolation.spectra_distance`]; `None` if those are unknown.
        reason (`str`): Why it is unmatched or interpolated; empty for what is matched.
    """

    name: str
    status: Status
    rank: int
    sources: Mapping[str, float] = field(default_factory=dict)
    source_ranks: Mapping[str, int] = field(default_factory=dict)
    components: int = 0
    spectra_distance: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class TransferReport:
    """
    What fits, what does not, and why.

    Args:
        matrices (`tuple[MatrixTransfer, ...]`): Every matrix of the target that could be adapted.
        unused (`Mapping[str, str]`): The expert's matrices that go nowhere, with the reason.
        layers (`Mapping[str, tuple[int, int]]`): By tower ("text", "vision", ...), how many the two models have.
        same_base (`bool`): Whether the target is the base model that the expert was trained on.
        notes (`tuple[str, ...]`): What else is to be known.
    """

    matrices: tuple[MatrixTransfer, ...]
    unused: Mapping[str, str]
    layers: Mapping[str, tuple[int, int]]
    same_base: bool = False
    notes: tuple[str, ...] = ()

    @property
    def totals(self) -> dict[str, int]:
        """How many of the target are matched, interpolated and unmatched, and how many of the expert go nowhere."""
        counts = Counter(matrix.status for matrix in self.matrices)
        statuses: tuple[Status, ...] = ("matched", "interpolated", "unmatched")
        return {**{status: counts[status] for status in statuses}, "unused": len(self.unused)}

    @property
    def median_spectra_distance(self) -> float | None:
        """Of the matrices for which it is known; `None` if it is for none."""
        known = [matrix.spectra_distance for matrix in self.matrices if matrix.spectra_distance is not None]
        return median(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """All of it, of JSON types."""
        return {
            "same_base": self.same_base,
            "totals": self.totals,
            "median_spectra_distance": self.median_spectra_distance,
            "layers": {tower: {"source": source, "target": target} for tower, (source, target) in self.layers.items()},
            "notes": list(self.notes),
            "matrices": [asdict(matrix) for matrix in self.matrices],
            "unused": dict(self.unused),
        }

    def to_text(self) -> str:
        """A table with a line for every matrix, then the totals."""
        rows: list[tuple[str, ...]] = [("target", "rank", "", "source", "rank", "spectra")]
        rows += [_row(matrix) for matrix in self.matrices]
        lines = [table(rows, indent="")]
        if self.unused:
            lines += ["", "Goes nowhere:", table([*self.unused.items()], indent="")]
        totals = self.totals
        lines += ["", ", ".join(f"{totals[status]} {status}" for status in ("matched", "interpolated", "unmatched"))]
        lines[-1] += f" matrices of the target; {totals['unused']} of the expert go nowhere"
        distance = self.median_spectra_distance
        lines.append(f"Median distance of the spectra: {'unknown' if distance is None else f'{distance:.3f}'}")
        return "\n".join([*lines, *self.notes])


def _row(matrix: MatrixTransfer) -> tuple[str, ...]:
    if matrix.status == "unmatched":
        return matrix.name, str(matrix.rank), matrix.status, matrix.reason, "", ""
    several = len(matrix.sources) > 1
    sources = " + ".join(f"{weight:.2f} {name}" if several else name for name, weight in matrix.sources.items())
    ranks = ", ".join(dict.fromkeys(map(str, matrix.source_ranks.values())))
    distance = "unknown" if matrix.spectra_distance is None else f"{matrix.spectra_distance:.3f}"
    return matrix.name, str(matrix.rank), matrix.status, sources, ranks, distance
