"""Spectra: singular values against numpy, from live models and checkpoints, and what they say of an expert."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from peft_svf import SVFConfig
from peft_svf.experts import Expert, ExpertError
from peft_svf.playground import BANK_FOLDER
from peft_svf.plots import Spectra, plot_spectra, read_spectra, relative_changes, spectra_figure


BASE = BANK_FOLDER / "base"


@pytest.fixture(scope="module")
def spectra() -> Spectra:
    """Of the playground's base model, read from its folder."""
    return read_spectra(BASE)


@pytest.fixture(scope="module")
def math() -> Expert:
    return Expert.from_pretrained(BANK_FOLDER / "math")


@pytest.fixture
def adapted(tiny_llama: Callable[..., nn.Module]) -> Iterator[nn.Module]:
    """A tiny model with an SVF adapter on two kinds of modules."""
    yield get_peft_model(tiny_llama(), SVFConfig(target_modules=["q_proj", "up_proj"]))


class TestReading:
    def test_a_live_model_without_adapters_against_numpy(self, tiny_llama: Callable[..., nn.Module]) -> None:
        model = tiny_llama()
        found = read_spectra(model)
        assert len(found.singular_values) == 14  # seven matrices in each of two layers, not lm_head
        for name, values in found.singular_values.items():
            weight = model.get_submodule(name).weight.detach().double().numpy()
            numpy.testing.assert_allclose(values, numpy.linalg.svd(weight, compute_uv=False), atol=1e-7)

    def test_a_live_model_with_adapters_gives_those_of_the_adapted_weights(
        self, adapted: nn.Module, tiny_llama: Callable[..., nn.Module]
    ) -> None:
        found, plain = read_spectra(adapted), read_spectra(tiny_llama())
        assert {name.rpartition(".")[2] for name in found.singular_values} == {"q_proj", "up_proj"}
        for name, values in found.singular_values.items():
            numpy.testing.assert_allclose(values, plain.singular_values[name], atol=1e-5)
        k_proj = "model.layers.0.self_attn.k_proj"  # not adapted, but asked for
        numpy.testing.assert_array_equal(
            read_spectra(adapted, [k_proj]).singular_values[k_proj], plain.singular_values[k_proj]
        )

    def test_a_checkpoint_gives_what_the_model_gives(
        self, tiny_llama: Callable[..., nn.Module], tmp_path: Path
    ) -> None:
        model = tiny_llama()
        model.save_pretrained(tmp_path)
        found, live = read_spectra(tmp_path), read_spectra(model)
        assert set(found.singular_values) == set(live.singular_values)
        for name, values in found.singular_values.items():
            numpy.testing.assert_array_equal(values, live.singular_values[name])

    def test_fused_parameters_have_the_spectra_of_all_their_matrices(self, tmp_path: Path) -> None:
        stack = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
        name = "model.layers.0.mlp.experts.gate_up_proj"
        save_file({name: stack, "model.layers.0.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
        (values,) = read_spectra(tmp_path).singular_values.values()
        expected = numpy.linalg.svd(stack.double().numpy(), compute_uv=False)
        numpy.testing.assert_allclose(values, expected, atol=1e-7)
        assert list(read_spectra(tmp_path, [name]).singular_values) == [name]

    @pytest.mark.parametrize(
        ("names", "message"),
        [(["lm_heat"], "no linear layer or fused parameter 'lm_heat'"), ([], "no matrices in the layers")],
    )
    def test_what_is_not_there_is_named(
        self, tiny_llama: Callable[..., nn.Module], names: list[str], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            read_spectra(tiny_llama(), names)

    def test_weights_without_singular_values_are_refused(self, tmp_path: Path) -> None:
        with torch.device("meta"):
            model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(4, 4)})])})
        with pytest.raises(ValueError, match=r"'layers\.0\.up' has no singular values here .* on meta"):
            read_spectra(model)
        save_file({"layers.0.up.weight": torch.full((4, 4), torch.nan)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="not finite"):
            read_spectra(tmp_path)
        with pytest.raises(ValueError, match=r"neither model\.safetensors"):
            read_spectra(BANK_FOLDER / "math")


class TestNumbers:
    def test_shares_and_the_statement(self) -> None:
        values = torch.tensor([8.0, 4.0, 2.0, 2.0], dtype=torch.float64)
        found = Spectra({"a": values, "b": torch.ones(2, 4, dtype=torch.float64)})
        assert found.shares(1) == {"a": 0.5, "b": 0.25}
        assert found.statement(1) == (
            "The largest 1 singular values hold 38 % of the sum of all, on average over 2 matrices, and less than "
            "50 % in 1 of them."
        )

    @pytest.mark.parametrize(("rank", "components"), [(4096, 256), (8192, 256), (2048, 128), (64, 4), (8, 1)])
    def test_the_largest_components_are_as_many_as_in_the_paper_or_as_large_a_part(
        self, rank: int, components: int
    ) -> None:
        assert Spectra({"a": torch.ones(rank)}).components() == components

    def test_relative_changes_are_those_of_the_weights(self, adapted: nn.Module) -> None:
        weights = {name: module.weight.double() for name, module in _linear(adapted)}
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "svf_offset" in name:
                    parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
        expert = Expert.from_model(adapted)
        found = relative_changes(expert, read_spectra(adapted))
        adapted.merge_adapter()
        merged = {name: module.weight.double() for name, module in _linear(adapted)}
        expected = {n: float((merged[n] - weights[n]).norm() / weights[n].norm()) for n in weights}
        assert found == pytest.approx(expected, rel=1e-4) and min(found.values()) > 0.1

    def test_transposed_weights_are_recognised(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
        )
        model.save_pretrained(tmp_path)
        expert = Expert.from_model(get_peft_model(model, SVFConfig(target_modules=["c_attn"])))
        assert list(relative_changes(expert, read_spectra(tmp_path, expert.offsets)).values()) == [0.0]

    def test_another_base_model_is_refused(self, math: Expert, tiny_llama: Callable[..., nn.Module]) -> None:
        model = tiny_llama(hidden_size=128, intermediate_size=352, num_hidden_layers=4)  # of the same shapes
        with pytest.raises(ExpertError, match="trained on another base model than the model"):
            relative_changes(math, read_spectra(model))
        with pytest.raises(ExpertError, match=r"has no 'model\.layers\.0"):
            relative_changes(math, read_spectra(model, ["model.layers.1.mlp.up_proj"]))


class TestPicture:
    """Needs matplotlib, the extra `plots`."""

    @pytest.fixture(autouse=True)
    def matplotlib(self) -> None:
        pytest.importorskip("matplotlib")

    def test_lines_are_those_of_the_spectra(self, spectra: Spectra) -> None:
        values, sums, layers = spectra_figure(spectra, "the playground").axes
        roles = [line.get_label() for line in sums.lines][:7]
        assert roles == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        up = [spectra.singular_values[f"model.layers.{i}.mlp.up_proj"] for i in range(4)]
        line = values.lines[roles.index("up_proj")]
        ends = torch.stack([one[[0, -1]] / one[0] for one in up]).mean(0)
        assert line.get_ydata()[[0, -1]] == pytest.approx(ends.numpy())
        halves = torch.stack([one[:64].sum() / one.sum() for one in up]).mean().item()  # 64 of 128
        cumulative = sums.lines[roles.index("up_proj")]
        assert numpy.interp(50, cumulative.get_xdata(), cumulative.get_ydata()) == pytest.approx(
            100 * halves, abs=0.02
        )
        shares = [100 * float(one[:8].sum() / one.sum()) for one in up]
        assert layers.lines[roles.index("up_proj")].get_ydata() == pytest.approx(shares)
        assert [text.get_text() for text in layers.get_xticklabels()] == ["0", "1", "2", "3"]

    def test_the_statement_is_below(self, spectra: Spectra, tmp_path: Path) -> None:
        figure = spectra_figure(spectra, components=16)
        assert figure.get_supxlabel() == spectra.statement(16)
        plot_spectra(spectra, tmp_path / "spectra.png")
        assert (tmp_path / "spectra.png").read_bytes().startswith(b"\x89PNG")

    def test_no_component_is_an_error(self, spectra: Spectra) -> None:
        with pytest.raises(ValueError, match="at least 1, got 0"):
            spectra_figure(spectra, components=0)


def _linear(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The adapted linear layers, by name in the base model."""
    marker = ".base_layer"
    return [
        (name.removesuffix(marker).removeprefix("base_model.model."), module)
        for name, module in model.named_modules()
        if name.endswith(marker)
    ]
