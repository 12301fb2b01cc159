"""The text table of the levers: every character for a tiny expert, and its numbers against numpy."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import pytest

from peft_svf.experts import Expert
from peft_svf.plots import lever_totals, levers_table


TINY = {
    "model.layers.0.mlp.up_proj": [0.5, -0.25, 0.0],
    "model.layers.1.mlp.up_proj": [0.0, 0.0, 0.0],
    "model.layers.1.self_attn.q_proj": [-0.125, 0.125],
    "lm_head": [0.25],
}
TABLE = """\
9 scales z of singular values, in 4 matrices; z = 1 is the base model
mean of z − 1 +0.0556, root mean square 0.2125, furthest +0.5000
70.0 % of all |z − 1| is in the first tenth of the components (44.4 % if all moved alike)

Mean of z − 1
    layer   q_proj  up_proj  lm_head
        0           +0.0833
        1   0.0000   0.0000
  outside                    +0.2500

Furthest from z = 1: z − 1, #component (#1 is the largest singular value)
    layer     q_proj    up_proj    lm_head
        0             +0.500 #1
        1  −0.125 #1   0.000 #1
  outside                        +0.250 #1

Most moved components
  module                           component   z − 1
  model.layers.0.mlp.up_proj       #1         +0.500
  lm_head                          #1         +0.250
  model.layers.0.mlp.up_proj       #2         −0.250
  model.layers.1.self_attn.q_proj  #1         −0.125
  model.layers.1.self_attn.q_proj  #2         +0.125"""


def test_every_character_for_a_tiny_expert(make_expert: Callable[..., Expert]) -> None:
    assert levers_table(make_expert(TINY)) == TABLE


def test_totals_against_numpy(make_expert: Callable[..., Expert]) -> None:
    expert = make_expert({f"model.layers.{i}.mlp.experts.up": (4, 37) for i in range(3)})
    totals = lever_totals(expert, most=5)
    values = numpy.stack([offset.numpy() for offset in expert.offsets.values()]).astype(float)  # (3, 4, 37)
    assert (totals.matrices, totals.components) == (12, 444)
    assert totals.mean == pytest.approx(values.mean()) and totals.rms == pytest.approx(numpy.sqrt((values**2).mean()))
    assert totals.first_tenth == pytest.approx(abs(values[..., :4]).sum() / abs(values).sum())  # 4 = ⌈37 / 10⌉
    assert totals.even_tenth == pytest.approx(4 / 37)
    order = numpy.argsort(-abs(values), axis=None)[:5]
    for found, place in zip(totals.largest, order, strict=True):
        layer, matrix, component = numpy.unravel_index(place, values.shape)
        assert found.module == f"model.layers.{layer}.mlp.experts.up"
        assert (found.matrix, found.component) == (matrix, component + 1)
        assert found.offset == pytest.approx(values.flat[place])


def test_components_of_fused_parameters_name_their_matrix(make_expert: Callable[..., Expert]) -> None:
    text = levers_table(make_expert({"model.layers.0.mlp.experts.up": [[0.0, 0.1], [0.0, -0.3]]}))
    assert "−0.300 #2/1" in text and "#2 of matrix 1" in text and "#component/matrix" in text


def test_an_expert_that_does_nothing_is_called_that(make_expert: Callable[..., Expert]) -> None:
    assert "nothing has moved: this expert is the base model" in levers_table(make_expert({"lm_head": [0.0, 0.0]}))


def test_small_changes_are_shown_with_their_digits(make_expert: Callable[..., Expert]) -> None:
    assert "−0.0000123 #2" in levers_table(make_expert({"lm_head": [1e-6, -1.23e-5]}))


def test_many_kinds_of_modules_are_shown_in_blocks(make_expert: Callable[..., Expert]) -> None:
    text = levers_table(make_expert({f"model.layers.0.m{i}": (4,) for i in range(10)}))
    assert text.count("layer  ") == 4 and max(map(len, text.splitlines())) < 120


def test_no_offsets_are_an_error(make_expert: Callable[..., Expert]) -> None:
    with pytest.raises(ValueError, match="the expert made up has no offsets"):
        levers_table(make_expert({}))
