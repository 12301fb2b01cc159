"""Numerics of one weight matrix: its singular basis, on disk too, and its fingerprint. Knows nothing of PEFT."""

from peft_svf.spectrum.basis import Side, SingularBasis, singular_basis, weight_change
from peft_svf.spectrum.cache import cached_singular_basis
from peft_svf.spectrum.fingerprint import sketch_distance, sketch_of_stack, weight_sketch


__all__ = [
    "Side",
    "SingularBasis",
    "cached_singular_basis",
    "singular_basis",
    "sketch_distance",
    "sketch_of_stack",
    "weight_change",
    "weight_sketch",
]
