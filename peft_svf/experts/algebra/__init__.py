"""Algebra of experts: offsets z − 1 mixed, scaled, compared and shuffled, without the base model.

The components of a weight are its singular values, so experts of one base model live in one space: what an expert does
not adapt has offset 0, and one that adapts only the leading components is padded with zeros. Every function returns a
new [`Expert`] or plain numbers, computes in float64, and refuses experts of different base models
([`~peft_svf.experts.same_base.check_same_base`]) and what is more than offsets (`modules_to_save`, trained tokens).
The metadata of a result holds its `origin`; task and results of the sources are not true of it and stay behind.
"""

from peft_svf.experts.algebra.common import check_experts, name_of
from peft_svf.experts.algebra.comparison import chance_overlap, cosine_similarity, overlap, spread
from peft_svf.experts.algebra.components import random_like, reverse, shuffle, top_components
from peft_svf.experts.algebra.mixing import average, difference, interpolate, mix, negate, scale
from peft_svf.experts.same_base import check_same_base


__all__ = [
    "average",
    "chance_overlap",
    "check_experts",
    "check_same_base",
    "cosine_similarity",
    "difference",
    "interpolate",
    "mix",
    "name_of",
    "negate",
    "overlap",
    "random_like",
    "reverse",
    "scale",
    "shuffle",
    "spread",
    "top_components",
]
