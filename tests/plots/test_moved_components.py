"""Which components moved: the numbers, one line an expert and kind of module, whatever the experts adapt."""

from __future__ import annotations

from collections.abc import Callable

import numpy
import pytest

from peft_svf.experts import Expert
from peft_svf.plots import moved_components, moved_components_figure


def test_numbers_are_means_over_layers_and_ranks(make_expert: Callable[..., Expert]) -> None:
    expert = make_expert({f"model.layers.{i}.mlp.up_proj": (64,) for i in range(3)})
    values = numpy.stack([offset.numpy() for offset in expert.offsets.values()]).astype(float)
    expected = abs(values).mean(0).reshape(16, 4).mean(1)
    numpy.testing.assert_allclose(moved_components(expert, 16)["up_proj"], expected, atol=1e-12)


def test_a_panel_for_each_kind_of_module_and_a_line_for_each_expert(make_expert: Callable[..., Expert]) -> None:
    pytest.importorskip("matplotlib")
    math = make_expert({"layers.0.up_proj": (32,), "layers.0.q_proj": (32,)})
    code = make_expert({"layers.0.up_proj": (20,), "lm_head": [2.0] * 8}, seed=1)
    figure = moved_components_figure({"math": math, "$code$": code}, "both")
    panels = {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}
    assert {name: len(axes.lines) for name, axes in panels.items()} == {"q_proj": 1, "up_proj": 2, "lm_head": 1}
    first, second = panels["up_proj"].lines
    numpy.testing.assert_array_equal(first.get_ydata(), moved_components(math)["up_proj"])
    numpy.testing.assert_array_equal(second.get_ydata(), moved_components(code)["up_proj"])
    assert first.get_color() != second.get_color() and first.get_linestyle() != second.get_linestyle()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["math", r"\$code\$"]
    for axes in panels.values():  # one scale for all, which shows all
        assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 2


def test_experts_without_names_are_told_apart(make_expert: Callable[..., Expert]) -> None:
    pytest.importorskip("matplotlib")
    experts = [make_expert({"lm_head": (8,)}, name="math"), make_expert({"lm_head": (8,)}, name="math")]
    legend = moved_components_figure(experts).legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["1: math", "2: math"]
    assert not moved_components_figure(experts[0]).legends


def test_no_expert_is_an_error() -> None:
    with pytest.raises(ValueError, match="no expert to draw"):
        moved_components_figure([])
