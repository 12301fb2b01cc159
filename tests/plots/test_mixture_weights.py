"""Mixture weights as bars: one a task or layer, their parts the weights, nothing scaled."""

from __future__ import annotations

import math
from typing import Any

import pytest

from peft_svf.plots import mixture_weights_figure


TASKS = {"MATH": {"gsm8k": 0.26, "mbpp": 0.26, "arc": 0.48}, "ARC-C": {"arc": 0.5, "gsm8k": 0.2}}


@pytest.fixture(autouse=True)
def matplotlib() -> None:
    pytest.importorskip("matplotlib")


def bars(figure: Any) -> dict[str, list[tuple[float, float]]]:
    """Bottom and height of each part, by expert."""
    return {
        container.get_label(): [(bar.get_y(), bar.get_height()) for bar in container]
        for container in figure.axes[0].containers
    }


def test_parts_are_stacked_in_the_order_of_the_experts() -> None:
    figure = mixture_weights_figure(TASKS, "adapted")
    found = bars(figure)
    assert list(found) == ["gsm8k", "mbpp", "arc"]
    assert found["gsm8k"] == [(0, 0.26), (0, 0.2)]
    assert found["mbpp"] == [(0.26, 0.26), (0.2, 0)]  # the second task does not use it
    assert found["arc"] == [(0.52, 0.48), (0.2, 0.5)]
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["MATH", "ARC-C"]
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["0.20", "0.26", "0.26", "0.48", "0.50"]


def test_one_mixture_and_negative_weights() -> None:
    found = bars(mixture_weights_figure({"math": 0.75, "code": -0.25, "$x$": 0.5}))
    assert found == {"math": [(0, 0.75)], "code": [(0, -0.25)], r"\$x\$": [(0.75, 0.5)]}


def test_layers_have_their_numbers() -> None:
    groups = {f"model.layers.{i}": {"math": 0.5, "code": 0.5} for i in range(40)}
    figure = mixture_weights_figure({**groups, "lm_head": {"math": 1.0}})
    labels = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert labels[:3] == ["0", "2", "4"] and labels[-1] == "lm_head" and figure.axes[0].get_xlabel() == "layer"
    matrices = {f"model.layers.0.mlp.{name}": {"math": 1.0} for name in ("up_proj", "down_proj")}
    labels = [text.get_text() for text in mixture_weights_figure(matrices).axes[0].get_xticklabels()]
    assert labels == list(matrices)  # two of one layer: the number alone would be both


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "no weights to draw"),
        ([0.5, 0.5], "no weights to draw"),
        ({"math": {}}, "no weights of 'math'"),
        ({"math": 0.5, "MATH": {"math": 0.5}}, "not both at once"),
        ({"MATH": {"math": math.nan}}, "expert 'math' of 'MATH' must be a finite number, got nan"),
        ({"math": "0.5"}, "must be a finite number, got '0.5'"),
        ({"math": 10**400}, "must be a finite number"),
    ],
)
def test_what_are_no_weights_is_refused(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixture_weights_figure(weights)
