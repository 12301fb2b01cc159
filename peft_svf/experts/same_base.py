"""Whether experts belong to one base model, by their fingerprints alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable

from peft_svf.experts.errors import ExpertError
from peft_svf.spectrum import sketch_distance
from peft_svf.tuner.base_check import OTHER_MODEL, OTHER_ROUNDING
from peft_svf.tuner.config import SVFConfig


def check_same_base(experts: Iterable[tuple[str, SVFConfig]]) -> None:
    """
    Compare the fingerprints of experts; no base model is needed.

    Args:
        experts (`Iterable[tuple[str, SVFConfig]]`): What messages call each expert, and its configuration.

    Warns:
        Once, with the largest difference, if their base models are the same up to rounding; and for an expert that
        adapts none of the modules of those before it, so that nothing can be compared.

    Raises:
        ExpertError: A weight has another shape in two of them, or differs by more than 1e-2 of its norm.
    """
    known: dict[str, tuple[str, list[float]]] = {}  # module name to the first expert that has it, and its sketch
    largest, where = 0.0, ""
    for number, (expert, config) in enumerate(experts):
        fingerprint = config.base_fingerprint or {}
        common = [module for module in fingerprint if module in known]
        if number and not common:
            warnings.warn(
                f"{expert} has no fingerprint in common with those before it, so nothing tells whether it belongs to "
                "their base model",
                stacklevel=3,
            )
        for module in common:
            other, sketch = known[module]
            distance = sketch_distance(fingerprint[module], sketch)
            if distance > OTHER_MODEL:
                raise ExpertError(
                    f"{expert} and {other} belong to different base models: '{module}' "
                    f"{_difference(fingerprint[module], sketch, distance)}. Experts can only be combined on one base."
                )
            if distance > largest:
                largest, where = distance, f"'{module}' of {expert} and {other}"
        known |= {module: (expert, sketch) for module, sketch in fingerprint.items() if module not in known}
    if largest > OTHER_ROUNDING:
        warnings.warn(
            f"these experts were trained on slightly different weights of one base model: {where} differ by "
            f"{largest:.1e} of the norm, as by rounding or quantization; the result is as inexact as that",
            stacklevel=3,
        )


def _difference(sketch: list[float], other: list[float], distance: float) -> str:
    if math.isfinite(distance):
        return f"differs by {distance:.1e} of its norm"
    return f"is {sketch[0]:.0f}×{sketch[1]:.0f} in one and {other[0]:.0f}×{other[1]:.0f} in the other"
