"""The levers: group means against numpy, what the heat map shows, and its file."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

from peft_svf.experts import Expert
from peft_svf.plots import levers, levers_figure, plot_levers


ROLES = ["self_attn.q_proj", "mlp.up_proj"]


def grid(layers: int, k: int) -> dict[str, tuple[int, ...]]:
    return {f"model.layers.{i}.{role}": (k,) for i in range(layers) for role in ROLES}


class TestNumbers:
    def test_groups_are_parts_of_equal_length_from_the_largest_singular_value(
        self, make_expert: Callable[..., Expert]
    ) -> None:
        expert = make_expert(grid(3, 100))
        found = levers(expert, groups=4)
        for row in range(3):
            for column, role in enumerate(ROLES):
                values = expert.offsets[f"model.layers.{row}.{role}"].numpy().astype(float).reshape(4, 25)
                numpy.testing.assert_allclose(found.mean[row, column], values.mean(1), atol=1e-12)
                numpy.testing.assert_allclose(found.rms[row, column], numpy.sqrt((values**2).mean(1)), atol=1e-12)
                numpy.testing.assert_allclose(found.size[row, column], abs(values).mean(1), atol=1e-12)

    def test_every_component_is_in_exactly_one_group(self, make_expert: Callable[..., Expert]) -> None:
        for k in (8, 11, 97):
            one_by_one = make_expert({f"layers.{i}.up": numpy.eye(k)[i].tolist() for i in range(k)})
            mean = levers(one_by_one).mean[:, 0]  # (k, 8): 1 / length of the group that holds component i, else 0
            assert ((mean > 0).sum(1) == 1).all()
            numpy.testing.assert_allclose(mean.sum(0), numpy.ones(8))  # so each group counts its components once
            lengths = (1 / mean[mean > 0]).round()
            assert lengths.max() - lengths.min() <= 1

    def test_fused_parameters_and_numbered_experts_are_averages(self, make_expert: Callable[..., Expert]) -> None:
        fused = make_expert({"model.layers.0.mlp.experts.up": (5, 16)})
        (rows,) = fused.offsets.values()
        single = make_expert(
            {f"model.layers.0.mlp.experts.{i}.up": row.tolist() for i, row in enumerate(rows)},
        )
        expected = rows.numpy().astype(float).reshape(5, 8, 2).mean((0, 2))
        numpy.testing.assert_allclose(levers(fused).mean[0, 0], expected, atol=1e-8)
        numpy.testing.assert_allclose(levers(single).mean[0, 0], expected, atol=1e-8)

    def test_few_components_fill_all_groups_and_missing_modules_are_nan(
        self, make_expert: Callable[..., Expert]
    ) -> None:
        found = levers(make_expert({"model.layers.0.mlp.up_proj": [0.5, -0.5], "lm_head": (8,)}))
        assert found.mean[0, 0].tolist() == [0.5] * 4 + [-0.5] * 4
        assert found.layers == ("0", "outside") and bool(found.mean[1, 0].isnan().all())

    def test_nothing_to_draw_is_an_error(self, make_expert: Callable[..., Expert]) -> None:
        with pytest.raises(ValueError, match="no offsets"):
            levers(make_expert({}))
        with pytest.raises(ValueError, match="at least 1"):
            levers(make_expert(grid(1, 8)), groups=0)


class TestPicture:
    """Needs matplotlib, the extra `plots`."""

    @pytest.fixture(autouse=True)
    def matplotlib(self) -> None:
        pytest.importorskip("matplotlib")

    def test_colours_are_the_means_and_white_is_the_base_model(self, make_expert: Callable[..., Expert]) -> None:
        expert = make_expert(grid(3, 64))
        found = levers(expert)
        mean, size, *bars = levers_figure(expert, "math").axes
        (image,) = mean.images
        numpy.testing.assert_array_equal(image.get_array(), found.mean.flatten(1).numpy())
        low, high = image.get_clim()
        assert high == -low == float(found.mean.abs().max())
        assert numpy.allclose(image.cmap(0.5)[:3], 0.97, atol=0.03)  # nearly white
        (sizes,) = size.images
        assert sizes.get_clim() == (0, float(found.rms.max())) and len(bars) == 2
        numpy.testing.assert_array_equal(sizes.get_array(), found.rms.flatten(1).numpy())

    def test_names_of_layers_and_modules(self, make_expert: Callable[..., Expert]) -> None:
        figure = levers_figure(make_expert({**grid(2, 16), "lm_$head$": (16,)}), statistic="mean")
        axes = figure.axes[0]
        assert [text.get_text() for text in axes.get_yticklabels()] == ["0", "1", "outside"]
        assert [text.get_text() for text in axes.get_xticklabels()] == ["q_proj", "up_proj", r"lm_\$head\$"]
        assert list(axes.get_xticks()) == [3.5, 11.5, 19.5]  # the middles of eight groups each
        assert len(figure.axes) == 2  # one heat map and its scale

    def test_an_expert_that_does_nothing_is_drawn_without_pyplot(
        self, make_expert: Callable[..., Expert], tmp_path: Path
    ) -> None:
        had = "matplotlib.pyplot" in sys.modules
        plot_levers(make_expert({"lm_head": [0.0] * 16}), tmp_path / "nothing.png", statistic="mean")
        assert ("matplotlib.pyplot" in sys.modules) == had

    def test_another_statistic_is_refused(self, make_expert: Callable[..., Expert]) -> None:
        with pytest.raises(ValueError, match="'both', 'mean' or 'rms', got 'median'"):
            levers_figure(make_expert(grid(1, 8)), statistic="median")  # type: ignore[arg-type]

    def test_the_same_expert_gives_the_same_bytes(self, make_expert: Callable[..., Expert], tmp_path: Path) -> None:
        paths = [tmp_path / f"{name}.svg" for name in "ab"]  # which by default holds the date and random names
        for path in paths:
            plot_levers(make_expert(grid(1, 8)), path, statistic="mean")
        assert paths[0].read_bytes() == paths[1].read_bytes()

    def test_eighty_layers_fit_into_a_small_picture_of_800_pixels(
        self, make_expert: Callable[..., Expert], tmp_path: Path
    ) -> None:
        plot_levers(make_expert(grid(80, 16)), tmp_path / "levers.png")
        data = (tmp_path / "levers.png").read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert width == 800 and height < 1400 and len(data) < 150_000


def test_missing_matplotlib_is_named(make_expert: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install peft-svf\[plots\]"):
        levers_figure(make_expert(grid(1, 8)))
