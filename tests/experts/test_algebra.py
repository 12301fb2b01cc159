"""Algebra of experts: its laws on random offsets, and mixtures against the live model and a dense float64 formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from peft_svf import ExpertBank, SVFConfig
from peft_svf.experts import Expert, ExpertError, algebra
from peft_svf.playground import BANK_FOLDER


SHAPES = {"layers.0.up": (7, 5), "layers.0.down": (4, 9), "layers.1.up": (6, 6)}  # (out, in)
IDS = torch.arange(5, 29).reshape(2, 12)


def sketch(name: str, base: float = 1.0) -> list[float]:
    return [*map(float, SHAPES[name]), 10 * base, 1.0, -2.0 * base, 3.0, 4.0]


def expert(seed: int, modules: tuple[str, ...] = tuple(SHAPES), rank: int | None = None, **facts: Any) -> Expert:
    """Random offsets; with a `rank`, of the leading components only."""
    generator = torch.Generator().manual_seed(seed)
    lengths = {name: min(*SHAPES[name], rank or 99) for name in modules}
    offsets = {name: torch.randn(length, generator=generator) for name, length in lengths.items()}
    config = SVFConfig(target_modules=set(modules), rank=rank, base_fingerprint={n: sketch(n) for n in modules})
    return Expert(offsets, config, {"name": f"expert {seed}", **facts}, source=f"expert {seed}")


def dense(one: Expert) -> torch.Tensor:
    """All offsets of all modules as one vector in float64, zeros where the expert has none."""
    parts = []
    for name, shape in SHAPES.items():
        values = torch.zeros(min(shape), dtype=torch.float64)
        if name in one.offsets:
            values[: len(one.offsets[name])] = one.offsets[name].double()
        parts.append(values)
    return torch.cat(parts)


def close(left: Expert, right: Expert | torch.Tensor) -> None:
    right = dense(right) if isinstance(right, Expert) else right
    torch.testing.assert_close(dense(left), right, rtol=1e-6, atol=1e-6)


modules_of_expert = st.sets(st.sampled_from(list(SHAPES)), min_size=1).map(lambda names: tuple(sorted(names)))
experts = st.builds(expert, st.integers(0, 99), modules_of_expert, st.sampled_from([None, 2, 4]))
numbers = st.floats(-3, 3, allow_nan=False).map(lambda x: round(x, 3))
few = settings(max_examples=25, report_multiple_bugs=False)
pytestmark = pytest.mark.filterwarnings("ignore:.*no fingerprint in common")


@few
@given(experts, experts, numbers, numbers)
def test_a_mixture_is_the_weighted_sum_of_offsets_whatever_the_experts_adapt(a, b, s, t):
    close(algebra.mix([a, b], [s, t]), s * dense(a) + t * dense(b))
    close(algebra.mix([a, b], [s, t]), algebra.mix([b, a], [t, s]))


@few
@given(experts, experts, experts, numbers, numbers)
def test_nested_mixtures_are_flat_mixtures(a, b, c, s, t):
    inner = algebra.mix([a, b], [s, 1 - s])
    close(algebra.mix([inner, c], [t, 1 - t]), algebra.mix([a, b, c], [t * s, t * (1 - s), 1 - t]))
    paper = algebra.mix([algebra.mix([a, b], [s, t], residual=False), c], [0.5, 0.5])
    if set(a.offsets) | set(b.offsets) == set(SHAPES):  # else a module of c alone has no surplus inside
        z = s * (1 + dense(a)) + t * (1 + dense(b))
        close(paper, 0.5 * z + 0.5 * (1 + dense(c)) - 1)


@few
@given(experts, experts, numbers)
def test_identities_hold_bit_for_bit(a, b, t):
    for same in (
        algebra.mix([a, b], [1, 0]),
        algebra.mix([b, a], [0, 1]),
        algebra.interpolate(a, b, 0),
        algebra.interpolate(b, a, 1),
        algebra.scale(a, 1),
        algebra.negate(algebra.negate(a)),
        algebra.reverse(algebra.reverse(a)),
        algebra.average([a]),
        algebra.top_components(a, 99),
        algebra.top_components(a, 1.0),
    ):
        assert same.offsets.keys() == a.offsets.keys()
        assert all(torch.equal(same.offsets[name], a.offsets[name]) for name in a.offsets)
    assert not dense(algebra.difference(a, a)).any()
    assert not dense(algebra.mix([a, algebra.negate(a)], [t, t])).any()
    close(algebra.mix([algebra.difference(a, b), b], [1, 1]), a)
    close(algebra.interpolate(a, b, t), algebra.interpolate(b, a, 1 - t))
    close(algebra.scale(a, t), algebra.mix([a, b], [t, 0]))


@few
@given(experts, experts, numbers, numbers)
def test_the_papers_convention_mixes_z(a, b, s, t):
    """z' = Σ αₖ zₖ for every singular value of a module that any of the experts adapts."""
    mixed = algebra.mix([a, b], [s, t], residual=False)
    surplus = 0 if abs(s + t - 1) < 1e-9 else s + t - 1
    for name in set(a.offsets) | set(b.offsets):
        r = min(SHAPES[name])
        z = sum(
            w * (1 + torch.nn.functional.pad(e.offsets[name].double(), (0, r - len(e.offsets[name]))))
            if name in e.offsets
            else torch.full((r,), w, dtype=torch.float64)
            for w, e in ((s, a), (t, b))
        )
        found = mixed.offsets.get(name, torch.zeros(r)).double()
        expected = z - 1
        assert not surplus or len(found) == r
        torch.testing.assert_close(1 + found, 1 + expected[: len(found)], rtol=1e-5, atol=1e-5)
        assert expected[len(found) :].abs().max() < 1e-9 if len(found) < r else True


def test_normalized_weights_sum_to_one_and_both_conventions_agree():
    a, b = expert(1), expert(2)
    for residual in (True, False):
        close(algebra.mix([a, b], [3, 1], residual, normalize=True), 0.75 * dense(a) + 0.25 * dense(b))
    with pytest.raises(ExpertError, match="sum to 0 and cannot be normalized"):
        algebra.mix([a, b], [1, -1], normalize=True)


def test_weights_by_layer_follow_the_longest_beginning_that_fits():
    a, b = expert(1), expert(2)
    mixed = algebra.mix([a, b], {"layers": [1, 0], "layers.0.down": [0.2, 0.3]})
    close(mixed, torch.cat([dense(a)[:5], (0.2 * dense(a) + 0.3 * dense(b))[5:9], dense(a)[9:]]))
    assert mixed.metadata["origin"]["sources"][1]["weight"] == {"layers": 0.0, "layers.0.down": 0.3}
    with pytest.raises(ExpertError, match=r"No weights .* module 'layers\.1\.up'; they are for layers\.0"):
        algebra.mix([a, b], {"layers.0": [1, 0]})


def test_what_only_some_experts_adapt_is_saved_with_a_configuration_that_names_it(tmp_path):
    a, b = expert(1, ("layers.0.up",), rank=2), expert(2, ("layers.0.down", "layers.0.up"))
    mixed = algebra.mix([a, b], [0.5, 0.5])
    assert {name: len(offset) for name, offset in mixed.offsets.items()} == {"layers.0.up": 5, "layers.0.down": 4}
    assert mixed.fingerprint == b.fingerprint
    again = Expert.from_pretrained(mixed.save_pretrained(tmp_path / "mixed"))
    assert again.config.target_modules == {"layers.0.up", "layers.0.down"} and again.config.rank is None
    assert again.metadata == mixed.metadata and again.fingerprint_id == mixed.fingerprint_id
    assert all(torch.equal(again.offsets[name], offset) for name, offset in mixed.offsets.items())


@pytest.mark.parametrize("keep", [1, 3, 0.3, 0.9])
@pytest.mark.parametrize("with_sigma", [False, True])
def test_top_components_keep_the_fewest_that_hold_the_share(keep, with_sigma):
    a = expert(3)
    sigma = {name: torch.rand(9, generator=torch.Generator().manual_seed(1)) * 3 for name in SHAPES}
    kept = algebra.top_components(a, keep, sigma if with_sigma else None)
    for name, offset in a.offsets.items():
        sizes = offset.double().abs() * (sigma[name][: len(offset)].double() if with_sigma else 1)
        left = kept.offsets[name] != 0
        assert torch.equal(kept.offsets[name], offset * left)
        assert sizes[left].min() >= max(sizes[~left].tolist(), default=0)
        if isinstance(keep, int):
            assert left.sum() == min(keep, len(offset))
        else:
            energy = sizes.square()
            assert energy[left].sum() >= keep * energy.sum() - 1e-9
            assert energy[left].sum() - energy[left].min() < keep * energy.sum()


@few
@given(experts, st.integers(0, 2**40))
def test_shuffling_keeps_the_values_of_every_matrix_and_follows_the_seed(a, seed):
    shuffled, again = algebra.shuffle(a, seed), algebra.shuffle(a, seed)
    for name, offset in a.offsets.items():
        assert torch.equal(shuffled.offsets[name].sort().values, offset.sort().values)
        assert torch.equal(shuffled.offsets[name], again.offsets[name])


def test_shuffles_differ_between_seeds_and_are_the_same_on_every_machine():
    a = expert(5)
    assert len({tuple(dense(algebra.shuffle(a, seed)).tolist()) for seed in range(20)}) == 20
    steps = a.with_offsets({"layers.1.up": torch.arange(6.0)})
    assert algebra.shuffle(steps, 7).offsets["layers.1.up"].tolist() == [2.0, 0.0, 1.0, 4.0, 5.0, 3.0]
    fused = stack(torch.arange(12.0).reshape(2, 6))
    for row, values in zip(algebra.shuffle(fused, 1).offsets["experts"], fused.offsets["experts"], strict=True):
        assert torch.equal(row.sort().values, values) and not torch.equal(row, values)


def test_random_offsets_have_mean_and_deviation_of_the_matrix():
    long = Expert({"w": torch.randn(20_000) * 0.3 + 0.1, "v": torch.full((50,), 0.2)}, SVFConfig(target_modules=["w"]))
    drawn = algebra.random_like(long, 3)
    for measure in (torch.mean, torch.std):
        assert measure(drawn.offsets["w"]).item() == pytest.approx(measure(long.offsets["w"]).item(), abs=0.01)
    assert drawn.offsets["v"].tolist() == pytest.approx([0.2] * 50)  # no deviation, so none is drawn
    assert torch.equal(drawn.offsets["w"], algebra.random_like(long, 3).offsets["w"])
    assert algebra.cosine_similarity([algebra.scale(long, 1), drawn])[0, 1] < 0.2
    assert not torch.equal(drawn.offsets["w"], algebra.random_like(long, 4).offsets["w"])


def test_average_and_spread_are_those_of_numpy_style_statistics():
    seeds = [expert(1), expert(2, rank=2), expert(3, ("layers.1.up",))]
    stacked = torch.stack([dense(one) for one in seeds])
    close(algebra.average(seeds), stacked.mean(0))
    spread = torch.cat([algebra.spread(seeds)[name] for name in SHAPES])
    torch.testing.assert_close(spread.double(), stacked.std(0), rtol=1e-6, atol=1e-6)
    assert not any(each.any() for each in algebra.spread(seeds[:1]).values())


@few
@given(st.lists(experts, min_size=1, max_size=4))
def test_cosine_is_that_of_the_offsets_symmetric_and_one_on_the_diagonal(several):
    cosine = algebra.cosine_similarity(several)
    assert torch.equal(cosine, cosine.T) and torch.equal(cosine.diagonal(), torch.ones(len(several)).double())
    for i, a in enumerate(several):
        for j, b in enumerate(several):
            expected = torch.nn.functional.cosine_similarity(dense(a), dense(b), dim=0)
            assert cosine[i, j].item() == pytest.approx(expected.item(), abs=1e-9)
    flipped = algebra.cosine_similarity([several[0], algebra.negate(several[0]), algebra.scale(several[0], 0)])
    assert flipped[0].tolist() == pytest.approx([1, -1, 0])


def test_overlap_counts_common_top_components_and_chance_is_what_unrelated_experts_reach():
    made = [expert(seed) for seed in range(60)]
    found, chance = algebra.overlap(made, 0.4), algebra.chance_overlap(made, 0.4)
    counts = {name: math.ceil(0.4 * min(shape)) for name, shape in SHAPES.items()}  # 2, 2, 3
    tops = [{(n, i) for n, c in counts.items() for i in one.offsets[n].abs().topk(c).indices.tolist()} for one in made]
    for i, j in ((0, 1), (3, 9), (7, 7)):
        assert found[i, j].item() == pytest.approx(len(tops[i] & tops[j]) / sum(counts.values()))
    assert chance == pytest.approx((4 / 5 + 4 / 4 + 9 / 6) / 7)
    unrelated = (found.sum() - 60) / (60 * 59)
    assert unrelated.item() == pytest.approx(chance, abs=0.02)
    assert torch.equal(found, found.T) and found.diagonal().tolist() == [1.0] * 60
    assert algebra.overlap([made[0], algebra.scale(made[1], 0)])[0, 1] == 0
    with pytest.raises(ExpertError, match=r"`share` is in \(0, 1\]"):
        algebra.overlap(made, 0)


def test_the_origin_says_how_an_expert_was_made_and_no_result_is_inherited():
    a, b = expert(1, task="gsm8k", results=[{"n": 3}], repo_id="user/a"), expert(2)
    mixed = algebra.mix([a, b], [0.7, 0.3], metadata={"label": "both", "description": "a little of each"})
    assert mixed.metadata.keys() == {"label", "description", "origin"}
    assert mixed.metadata["origin"] == {
        "operation": "mix",
        "formula": "offset' = Σ αₖ offsetₖ",
        "sources": [
            {"name": "expert 1", "fingerprint_id": a.fingerprint_id, "weight": 0.7, "repo_id": "user/a"},
            {"name": "expert 2", "fingerprint_id": b.fingerprint_id, "weight": 0.3},
        ],
        "settings": {"residual": True, "normalize": False},
    }
    shuffled = algebra.shuffle(mixed, 4).metadata["origin"]
    assert (shuffled["operation"], shuffled["settings"]) == ("shuffle", {"seed": 4})
    assert shuffled["sources"][0]["origin"] == mixed.metadata["origin"]


def based_on(base: float) -> Expert:
    other = expert(9)
    other.config.base_fingerprint = {name: sketch(name, base) for name in SHAPES}
    return other


def test_the_formula_says_that_weights_were_normalized():
    mixed = algebra.mix([expert(1), expert(2)], [0.6, 0.9], normalize=True)
    by_hand = algebra.mix([expert(1), expert(2)], [0.6 / 1.5, 0.9 / 1.5])
    assert mixed.metadata["origin"]["formula"] == "offset' = Σ αₖ offsetₖ / Σα"
    assert all(torch.allclose(value, by_hand.offsets[name]) for name, value in mixed.offsets.items())


OPERATIONS: dict[str, Callable[[Expert, Expert], Any]] = {
    "mix": lambda a, b: algebra.mix([a, b], [1, 1]),
    "interpolate": lambda a, b: algebra.interpolate(a, b, 0.5),
    "difference": algebra.difference,
    "average": lambda a, b: algebra.average([a, b]),
    "cosine": lambda a, b: algebra.cosine_similarity([a, b]),
    "overlap": lambda a, b: algebra.overlap([a, b]),
    "spread": lambda a, b: algebra.spread([a, b]),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_experts_of_other_bases_are_refused_and_rounding_warns(operation):
    with pytest.raises(ExpertError, match=r"different base models: 'layers\.0\.up' differs by 5\.0e-01 of its norm"):
        OPERATIONS[operation](expert(1), based_on(2.0))
    with pytest.warns(UserWarning, match="slightly different weights of one base model: .* differ by 1.0e-03"):
        OPERATIONS[operation](expert(1), based_on(1.001))


def test_shapes_that_differ_are_named_and_what_cannot_be_compared_warns():
    other = expert(9)
    other.config.base_fingerprint = {"layers.0.up": [7.0, 6.0, *sketch("layers.0.up")[2:]]}
    with pytest.raises(ExpertError, match=r"'layers\.0\.up' is 7×6 in one and 7×5 in the other"):
        algebra.mix([expert(1), other], [1, 1])
    with pytest.warns(UserWarning, match="no fingerprint in common"):
        algebra.mix([expert(1, ("layers.0.up",)), expert(2, ("layers.1.up",))], [1, 1])


def stack(offsets: torch.Tensor, **settings: Any) -> Expert:
    """An expert of a fused parameter of two matrices."""
    config = SVFConfig(target_modules=None, target_parameters=["experts.w"], **settings)
    config.base_fingerprint = {"experts.w": [16.0, 6.0, 1.0, 1.0, 2.0, 3.0, 4.0]}
    return Expert({"experts": offsets}, config, source="fused")


def test_fused_experts_mix_matrix_by_matrix_but_not_with_other_ranks():
    torch.manual_seed(0)
    a, b = stack(torch.randn(2, 6)), stack(torch.randn(2, 6))
    mixed = algebra.mix([a, b], [2, 0.5], residual=False)
    expected = 2 * (1 + a.offsets["experts"]) + 0.5 * (1 + b.offsets["experts"]) - 1
    torch.testing.assert_close(mixed.offsets["experts"], expected)
    assert mixed.config.target_parameters == ["experts.w"]
    short = stack(torch.randn(2, 3), rank=3)
    close_to = algebra.mix([a, short], [1, 1]).offsets["experts"]  # described by the first
    torch.testing.assert_close(close_to[:, 3:], a.offsets["experts"][:, 3:])
    with pytest.raises(ExpertError, match="nothing says how many it has"):
        algebra.mix([short], [2], residual=False)
    with pytest.raises(ExpertError, match="another number of fused experts"):
        algebra.mix([a, stack(torch.randn(3, 6))], [1, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: algebra.mix([], []), "no experts"),
        (lambda a: algebra.average([]), "no experts"),
        (lambda a: algebra.mix([a], [1, 2]), "mixture of 1 experts takes 1 finite weights"),
        (lambda a: algebra.mix([a], [math.nan]), "finite weights"),
        (lambda a: algebra.mix([a], ["much"]), "weights are numbers"),
        (lambda a: algebra.scale(a, math.inf), "finite weights"),
        (lambda a: algebra.scale(a, 3e38), "not finite"),
        (lambda a: algebra.mix(["math"], [1]), "takes Expert objects, not 'math'"),
        (lambda a: algebra.top_components(a, 0), "`keep` is"),
        (lambda a: algebra.top_components(a, 1.5), "`keep` is"),
        (lambda a: algebra.top_components(a, True), "`keep` is"),
        (lambda a: algebra.top_components(a, 1, {"layers.0.up": torch.ones(9)}), r"none for 'layers\.0\.down'"),
    ],
)
def test_bad_arguments_are_named(call, message):
    big = expert(1)
    big = big.with_offsets({name: offset * 9 for name, offset in big.offsets.items()})
    with pytest.raises(ExpertError, match=message):
        call(big)


def test_more_than_offsets_is_refused():
    from dataclasses import replace

    whole = replace(expert(1), others={"base_model.model.score.weight": torch.ones(2)})
    with pytest.raises(ExpertError, match=r"has trained more than offsets \(base_model\.model\.score\.weight\)"):
        algebra.scale(whole, 2)


@pytest.fixture(scope="module")
def playground() -> ExpertBank:
    return ExpertBank.from_pretrained(BANK_FOLDER)


@torch.no_grad()
@pytest.mark.parametrize("residual", [True, False])
def test_a_mixed_expert_computes_what_the_live_route_and_the_dense_formula_compute(playground, residual):
    """On the playground's trained model: logits against `bank.routed`, weights against U Σ diag(Σ αₖ zₖ) Vᵀ."""
    weights = {"math": 0.7, "code": 0.3} if residual else {"math": 0.9, "code": 0.4}
    sources = [Expert.from_pretrained(BANK_FOLDER / name) for name in weights]
    mixed = algebra.mix(sources, list(weights.values()), residual)
    name = f"mixed_{residual}"
    playground.add(name, mixed)
    with playground.routed(name) as model:
        found = model(IDS).logits
    if residual:
        with playground.routed(weights) as model:
            torch.testing.assert_close(found, model(IDS).logits, rtol=1e-4, atol=1e-4)
    with playground.routed("others") as model:
        assert (model(IDS).logits - found).abs().max() > 0.1
    base = load_file(BANK_FOLDER / "base" / "model.safetensors")
    layers = {layer.svf_name: layer for layer in playground.model.modules() if hasattr(layer, "svf_name")}
    for module in ("model.layers.0.mlp.down_proj", "model.layers.3.self_attn.k_proj"):
        u, s, vh = torch.linalg.svd(base[f"{module}.weight"].double(), full_matrices=False)
        z = sum(w * e.z[module].double() for w, e in zip(weights.values(), sources, strict=True))
        z = z + (1 - sum(weights.values()) if residual else 0)
        change = u @ torch.diag(s * (z - 1)) @ vh
        torch.testing.assert_close(layers[module].get_delta_weight(name).double(), change, rtol=1e-4, atol=1e-5)
