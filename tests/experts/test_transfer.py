"""Transfer to another base model: the right offsets at the right places, an honest report, and a target left alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from peft_svf import SVFConfig
from peft_svf.experts import Expert, ExpertError
from peft_svf.experts.expert import leading_ranks
from peft_svf.experts.transfer import MatrixTransfer, transfer
from peft_svf.experts.transfer.interpolation import neighbours, resample, spectra_distance
from peft_svf.experts.transfer.places import Place


Build = Callable[..., LlamaForCausalLM]
WIDE = {"hidden_size": 40, "intermediate_size": 72}


def expert_of(model: Any, seed: int = 0, **options: Any) -> Expert:
    """An expert with random offsets on `model`, which is left without adapters."""
    adapted = get_peft_model(model, SVFConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "svf_offset" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    found = Expert.from_model(adapted, metadata={"name": "sums", "task": "adding", "steps": 3})
    adapted.unload()
    return found


def by_name(matrices: tuple[MatrixTransfer, ...]) -> dict[str, MatrixTransfer]:
    return {matrix.name: matrix for matrix in matrices}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()


def mixtral() -> MixtralForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(vocab_size=97, **sizes, num_key_value_heads=2, num_local_experts=2))


# ---------------------------------------------------------------- interpolation
@pytest.mark.parametrize(("rank", "new"), [(8, 8), (8, 13), (13, 8), (2, 7), (7, 2), (128, 112), (1, 4), (4, 1)])
def test_resampling_is_linear_in_relative_rank(rank: int, new: int) -> None:
    values = torch.randn(rank, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    found = resample(values, rank, new)
    expected = np.interp(np.linspace(0, 1, new), np.linspace(0, 1, rank), values.numpy())
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-12)
    assert found[0] == values[0] and (new == 1 or found[-1] == values[-1])
    if rank == new:
        assert torch.equal(found, values)


@pytest.mark.parametrize(("count", "rank", "new"), [(3, 9, 17), (5, 9, 7), (1, 9, 20), (9, 9, 4)])
def test_leading_components_reach_as_far_as_they_did(count: int, rank: int, new: int) -> None:
    values = torch.arange(1.0, count + 1, dtype=torch.float64) ** 2
    found = resample(values, rank, new)
    reached = [j for j in range(new) if Fraction(j, new - 1) <= Fraction(count - 1, rank - 1)]
    places = [j / (new - 1) * (rank - 1) for j in reached]
    np.testing.assert_allclose(found.numpy(), np.interp(places, range(count), values.numpy()), atol=1e-12)


@pytest.mark.parametrize(("length", "other"), [(1, 1), (1, 5), (5, 1), (4, 4), (3, 2), (2, 3), (6, 4), (32, 28)])
def test_neighbours_lie_at_the_relative_position(length: int, other: int) -> None:
    for index in range(length):
        weights = neighbours(index, length, other)
        position = Fraction(index * (other - 1), length - 1) if length > 1 else 0
        assert sum(weights.values()) == pytest.approx(1) and len(weights) == (1 if position == int(position) else 2)
        assert sum(layer * weight for layer, weight in weights.items()) == pytest.approx(float(position))
        assert all(abs(layer - position) < 1 for layer in weights)


def test_distance_of_spectra_knows_shape_and_not_scale() -> None:
    one = torch.tensor([4.0, 3.0, 1.0], dtype=torch.float64)
    assert spectra_distance(7 * one, one) == pytest.approx(0, abs=1e-15)
    shares, others = np.array([0.5, 0.375, 0.125]), np.array([0.6, 0.3, 0.1])
    expected = np.linalg.norm(others - shares) / np.linalg.norm(shares)
    assert spectra_distance(torch.tensor([6.0, 3.0, 1.0]), one) == pytest.approx(expected)
    assert spectra_distance(torch.tensor([4.0, 3.5, 3.0, 2.0, 1.0]), one) == pytest.approx(0, abs=1e-15)


# ---------------------------------------------------------------- places
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.11.self_attn.q_proj", ("text", "q_proj", 11)),
        ("model.language_model.layers.0.mlp.down_proj", ("text", "down_proj", 0)),
        ("model.vision_tower.encoder.layers.2.self_attn.q_proj", ("vision", "q_proj", 2)),
        ("transformer.h.3.attn.c_attn", ("text", "fused query, key and value", 3)),
        ("transformer.h.3.attn.c_proj", ("text", "o_proj", 3)),
        ("transformer.h.3.mlp.c_proj", ("text", "down_proj", 3)),
        ("transformer.h.1.mlp.fc_in", ("text", "up_proj", 1)),
        ("gpt_neox.layers.1.attention.dense", ("text", "o_proj", 1)),
        ("gpt_neox.layers.1.mlp.dense_h_to_4h", ("text", "up_proj", 1)),
        ("model.decoder.layers.4.self_attn.out_proj", ("text", "o_proj", 4)),
        ("model.decoder.layers.4.fc2", ("text", "down_proj", 4)),
        ("model.decoder.layers.4.encoder_attn.q_proj", ("text", "cross attention's q_proj", 4)),
        ("model.layers.2.self_attn.qkv_proj", ("text", "fused query, key and value", 2)),
        ("model.layers.2.mlp.gate_up_proj", ("text", "fused gate and up", 2)),
        ("model.layers.2.mlp.experts.5.w1", ("text", "a routed expert's gate_proj", 2)),
        ("model.layers.2.mlp.shared_expert.up_proj", ("text", "shared expert's up_proj", 2)),
        ("backbone.layers.7.mixer.out_proj", ("text", "mixer.out_proj", 7)),
        ("lm_head", ("text", "lm_head", None)),
        ("embed_out", ("text", "lm_head", None)),
    ],
)
def test_places_are_read_from_names(name: str, place: tuple[str, str, int | None]) -> None:
    assert Place.of(name) == Place(*place)


# ---------------------------------------------------------------- transfer
def test_equal_shapes_take_the_offsets_as_they_are(tiny_llama: Build) -> None:
    expert, target = expert_of(tiny_llama()), tiny_llama(seed=1)
    made = transfer(expert, target)
    assert made.report.totals == {"matched": 14, "interpolated": 0, "unmatched": 0, "unused": 0}
    assert not made.report.same_base and made.report.median_spectra_distance is None
    assert made.expert.offsets.keys() == expert.offsets.keys()
    assert all(torch.equal(made.expert.offsets[name], offset) for name, offset in expert.offsets.items())
    weights = {name: target.get_submodule(name).weight.detach().double() for name in made.expert.z}
    merged = made.expert.put_into(target, "moved").merge_and_unload()
    for name, weight in weights.items():  # W' = U Σ diag(z) Vᵀ of the target's own decomposition
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        expected = (u * s * made.expert.z[name].double()) @ vt
        torch.testing.assert_close(merged.get_submodule(name).weight.double(), expected, atol=1e-5, rtol=1e-5)


def test_other_ranks_are_interpolated(tiny_llama: Build) -> None:
    expert, target = expert_of(tiny_llama()), tiny_llama(seed=1, **WIDE)
    made = transfer(expert, target)
    assert made.report.totals == {"matched": 0, "interpolated": 14, "unmatched": 0, "unused": 0}
    for name, offset in expert.offsets.items():
        rank = min(target.get_submodule(name).weight.shape)
        expected = np.interp(np.linspace(0, 1, rank), np.linspace(0, 1, len(offset)), offset.double().numpy())
        np.testing.assert_allclose(made.expert.offsets[name].numpy(), expected, atol=1e-7)
        assert by_name(made.report.matrices)[name].source_ranks == {name: len(offset)}
    made.expert.put_into(target, "moved")


def test_other_depths_are_interpolated_between_layers(tiny_llama: Build) -> None:
    expert, target = expert_of(tiny_llama()), tiny_llama(seed=1, num_hidden_layers=3)
    made = transfer(expert, target)
    assert made.report.layers == {"text": (2, 3)} and "2 in the source, 3 in the target" in made.report.to_text()
    for role in ("self_attn.q_proj", "mlp.down_proj"):
        first, last = (expert.offsets[f"model.layers.{layer}.{role}"] for layer in (0, 1))
        found = [made.expert.offsets[f"model.layers.{layer}.{role}"] for layer in (0, 1, 2)]
        assert torch.equal(found[0], first) and torch.equal(found[2], last)
        torch.testing.assert_close(found[1], (first + last) / 2)
    shallow = transfer(expert_of(target), tiny_llama(seed=2, num_hidden_layers=2)).report
    assert shallow.totals["unused"] == 7
    assert "no layer of the target is nearest" in shallow.unused["model.layers.1.mlp.up_proj"]


def test_layers_that_are_not_adapted_count_as_unchanged(tiny_llama: Build) -> None:
    source = tiny_llama(num_hidden_layers=3)
    expert = expert_of(source, layers_to_transform=[0], target_modules=["up_proj"])
    made = transfer(expert, tiny_llama(seed=1, num_hidden_layers=5), source_model=source)  # of three layers, not one
    found = by_name(made.report.matrices)
    offset = expert.offsets["model.layers.0.mlp.up_proj"]
    assert torch.equal(made.expert.offsets["model.layers.0.mlp.up_proj"], offset)
    torch.testing.assert_close(made.expert.offsets["model.layers.1.mlp.up_proj"], offset / 2)
    assert set(made.expert.offsets) == {f"model.layers.{layer}.mlp.up_proj" for layer in (0, 1)}
    assert found["model.layers.4.mlp.up_proj"].reason == "the expert adapts no up_proj in layer 2"
    assert found["model.layers.4.mlp.gate_proj"].reason == "the expert adapts no gate_proj"


def test_leading_components_stay_leading(tiny_llama: Build) -> None:
    expert, target = expert_of(tiny_llama(), rank=8), tiny_llama(seed=1, **WIDE)
    made = transfer(expert, target)
    name = "model.layers.0.mlp.up_proj"
    assert len(made.expert.offsets[name]) == math.floor(7 / 31 * 39) + 1
    adapted = made.expert.put_into(target, "moved")
    assert torch.equal(Expert.from_model(adapted, "moved").offsets[name], made.expert.offsets[name])


def test_to_its_own_base_an_expert_needs_no_transfer(tiny_llama: Build) -> None:
    expert = expert_of(tiny_llama(), layers_to_transform=[1])
    made = transfer(expert, tiny_llama())
    assert made.report.same_base and "transfer is unnecessary" in made.report.to_text()
    assert made.expert.offsets.keys() == expert.offsets.keys()
    assert all(torch.equal(made.expert.offsets[name], offset) for name, offset in expert.offsets.items())
    assert made.report.median_spectra_distance == 0


def test_controls_keep_what_they_say(tiny_llama: Build) -> None:
    expert, target = expert_of(tiny_llama()), tiny_llama(seed=1, **WIDE)
    ordered = transfer(expert, target).expert.offsets
    shuffled, again, other = (
        transfer(expert, target, control="shuffled", seed=seed).expert.offsets for seed in (0, 0, 1)
    )
    backwards = transfer(expert, target, control="reversed").expert.offsets
    drawn = transfer(expert, target, control="random").expert
    for name, offset in ordered.items():
        assert torch.equal(shuffled[name].sort().values, offset.sort().values)
        assert torch.equal(shuffled[name], again[name]) and not torch.equal(shuffled[name], offset)
        assert not torch.equal(shuffled[name], other[name])
        assert torch.equal(backwards[name], offset.flip(0))
        assert not torch.isclose(drawn.offsets[name].sort().values, offset.sort().values).any(0).all()
    pairs = [(drawn.offsets[name], offset) for name, offset in ordered.items()]
    ratio = torch.cat([one for one, _ in pairs]).std() / torch.cat([offset for _, offset in pairs]).std()
    assert 0.8 < ratio < 1.25
    assert drawn.metadata["origin"]["settings"]["control"] == "random"
    assert "A control" in drawn.metadata["origin"]["statement"]
    with pytest.raises(ExpertError, match="no control 'sorted': choose shuffled, reversed, random"):
        transfer(expert, target, control="sorted")  # type: ignore[arg-type]


def test_facts_say_where_it_comes_from_and_claim_no_training(tiny_llama: Build, tmp_path: Any) -> None:
    expert = expert_of(tiny_llama())
    made = transfer(expert, tiny_llama(seed=1)).expert
    assert (made.metadata["name"], made.metadata["task"]) == ("sums, transferred", "adding")
    assert "steps" not in made.metadata
    origin = made.metadata["origin"]
    assert origin["operation"] == "transfer" and origin["sources"][0]["fingerprint_id"] == expert.fingerprint_id
    loaded = Expert.from_pretrained(made.save_pretrained(tmp_path / "moved"))
    assert loaded.metadata == json.loads(json.dumps(made.metadata)) and loaded.fingerprint_id == made.fingerprint_id
    with pytest.raises(ExpertError, match="another base model"):
        made.put_into(tiny_llama(), "moved")


# ---------------------------------------------------------------- report
def test_distances_are_those_of_the_singular_values(tiny_llama: Build) -> None:
    source, target = tiny_llama(), tiny_llama(seed=1, num_hidden_layers=3, **WIDE)
    report = transfer(expert_of(source), target, source_model=source).report
    found = by_name(report.matrices)["model.layers.1.self_attn.k_proj"]
    layers = [target.model.layers[1], *source.model.layers]
    own, *others = (torch.linalg.svdvals(one.self_attn.k_proj.weight.detach().double()).numpy() for one in layers)
    stretched = [np.interp(np.linspace(0, 1, len(own)), np.linspace(0, 1, len(o)), o) for o in others]
    mixed = sum(s / s.sum() for s in stretched) / 2
    expected = np.linalg.norm(mixed - own / own.sum()) / np.linalg.norm(own / own.sum())
    assert found.spectra_distance == pytest.approx(expected, rel=1e-5)
    assert found.sources == {f"model.layers.{layer}.self_attn.k_proj": 0.5 for layer in (0, 1)}
    assert json.loads(json.dumps(report.to_dict()))["totals"]["interpolated"] == 21
    assert len([line for line in report.to_text().splitlines() if line.startswith("model.")]) == 21


def test_the_source_model_must_be_the_experts_base(tiny_llama: Build) -> None:
    with pytest.raises(ExpertError, match=r"is not the base model of .*its 'model\..*' is another"):
        transfer(expert_of(tiny_llama()), tiny_llama(seed=1), source_model=tiny_llama(seed=2))


def test_another_family_gets_what_has_a_counterpart(tiny_llama: Build) -> None:
    made = transfer(expert_of(tiny_llama()), gpt2())
    found = by_name(made.report.matrices)
    assert found["transformer.h.1.mlp.c_fc"].sources == {"model.layers.1.mlp.up_proj": 1.0}
    assert found["transformer.h.0.mlp.c_proj"].sources == {"model.layers.0.mlp.down_proj": 1.0}
    assert found["transformer.h.0.attn.c_proj"].sources == {"model.layers.0.self_attn.o_proj": 1.0}
    assert "adapts apart (k_proj, q_proj, v_proj)" in found["transformer.h.0.attn.c_attn"].reason
    assert made.report.unused["model.layers.0.mlp.gate_proj"] == "the target has no gate_proj of its own"
    assert made.report.totals["unmatched"] == 2 and "c_attn" not in " ".join(made.expert.offsets)
    made.expert.put_into(gpt2(), "moved")  # Conv1D stores (in, out)


def test_what_fits_nowhere_is_refused(tiny_llama: Build) -> None:
    with pytest.raises(
        ExpertError, match=r"adapts q_proj, the target has fused query, key and value, o_proj, up_proj"
    ):
        transfer(expert_of(tiny_llama(), target_modules=["q_proj"]), gpt2())


def test_fused_experts_go_nowhere(tiny_llama: Build) -> None:
    options = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    report = transfer(expert_of(mixtral(), **options), tiny_llama(seed=1)).report
    assert "fused experts" in report.unused["model.layers.0.mlp.experts"]
    assert not transfer(expert_of(mixtral(), **options), mixtral()).report.same_base
    target = transfer(expert_of(tiny_llama()), mixtral()).report
    assert "fused experts" in by_name(target.matrices)["model.layers.0.mlp.experts.gate_up_proj"].reason
    only = expert_of(mixtral(), target_modules=None, target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(ExpertError, match=r"Nothing of .* fits"):
        transfer(only, tiny_llama(seed=1))


def test_more_than_offsets_is_refused(tiny_llama: Build) -> None:
    model = get_peft_model(tiny_llama(), SVFConfig(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    with pytest.raises(ExpertError, match="transfer works on offsets only"):
        transfer(Expert.from_model(model), tiny_llama(seed=1))


# ---------------------------------------------------------------- the target
@pytest.mark.parametrize("merged", [False, True])
def test_adapters_of_the_target_make_no_difference_and_stay(
    tiny_llama: Build, add_experts: Callable[..., PeftModel], merged: bool
) -> None:
    expert = expert_of(tiny_llama())
    expected = transfer(expert, tiny_llama(seed=1))
    target = add_experts(tiny_llama(seed=1))
    if merged:
        target.merge_adapter(["math"])
    before = {name: value.clone() for name, value in target.state_dict().items()}
    modules, active = list(target.modules()), list(target.active_adapters)
    found = transfer(expert, target, source_model=tiny_llama())
    assert [m.sources for m in found.report.matrices] == [m.sources for m in expected.report.matrices]
    assert found.expert.fingerprint == expected.expert.fingerprint
    assert list(target.modules()) == modules and target.active_adapters == active
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    if not merged:
        assert found.expert.put_into(target, "moved") is target


def test_a_merged_adapter_of_another_method_is_refused(tiny_llama: Build) -> None:
    target = get_peft_model(tiny_llama(seed=1), LoraConfig(target_modules=["q_proj"]))
    assert "model.layers.0.self_attn.q_proj" in transfer(expert_of(tiny_llama()), target).expert.offsets
    target.merge_adapter()
    with pytest.raises(ExpertError, match=r"'model.layers.0.self_attn.q_proj' has a merged adapter; unmerge it"):
        transfer(expert_of(tiny_llama()), target)


def test_weights_that_are_not_there_are_named(tiny_llama: Build) -> None:
    target = tiny_llama(seed=1)
    target.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.empty(48, 32, device="meta"))
    modules = list(target.modules())
    with pytest.raises(ExpertError, match=r"'model.layers.1.mlp.up_proj' is on the meta device"):
        transfer(expert_of(tiny_llama()), target)
    assert list(target.modules()) == modules


def test_the_ranks_of_a_transferred_expert_are_those_of_whole_names() -> None:
    ranks = leading_ranks(
        {"layers.0.up": torch.zeros(3), "layers.1.up": torch.zeros(8)}, {"layers.0.up": 8, "layers.1.up": 8}
    )
    assert get_pattern_key(list(ranks), "layers.0.up") in ranks
    assert get_pattern_key(list(ranks), "vision.layers.0.up") not in ranks
    assert len(ranks) == 1
