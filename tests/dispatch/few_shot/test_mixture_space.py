"""Mixture space: candidates become the weights and routes of the written formulas."""

from __future__ import annotations

import pytest
import torch

from peft_svf.dispatch.few_shot.mixture_space import MixtureSpace


EXPERTS = ("math", "code", "reasoning")
GROUPS = ("model.layers.0", "model.layers.1")


def random_candidates(space: MixtureSpace, rows: int = 40, spread: float = 1.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, space.dimension, generator=generator, dtype=torch.float64) * spread


def by_hand(space: MixtureSpace, candidate: list[float]) -> list[list[float]]:
    """The weights of each group of one candidate, number by number."""
    weights = []
    for group in range(max(1, len(space.groups))):
        own = [min(max(c, space.limits[0]), space.limits[1]) for c in candidate[group * 3 : group * 3 + 3]]
        total = sum(own)
        if space.normalized:
            own = [c / total for c in own] if total else [1 / 3] * 3
        elif not space.residual:
            wanted = min(max(total, space.sum_limits[0]), space.sum_limits[1])
            own = [c * wanted / total for c in own] if total else [wanted / 3] * 3
        weights.append(own)
    return weights


@pytest.mark.parametrize("groups", [(), GROUPS])
@pytest.mark.parametrize("normalized, residual", [(True, False), (False, False), (False, True)])
def test_weights_are_those_of_the_formulas(groups: tuple[str, ...], normalized: bool, residual: bool):
    space = MixtureSpace(EXPERTS, groups, normalized, residual)
    candidates = random_candidates(space)
    expected = torch.tensor([by_hand(space, row) for row in candidates.tolist()], dtype=torch.float64)
    if not groups:
        expected = expected[:, 0]
    torch.testing.assert_close(space.weights(candidates), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("normalized, residual", [(True, False), (False, False), (False, True)])
def test_the_route_makes_the_singular_values_of_the_paper(normalized: bool, residual: bool):
    """z' = Σ α z; what the route's convention makes of the experts' offsets must be that z' − 1."""
    space = MixtureSpace(EXPERTS, (), normalized, residual)
    z = 1 + torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 3  # (K, r)
    candidates = random_candidates(space, spread=0.4)
    route = space.to_route(candidates)
    offsets = route.weights.double() @ (z - 1)
    if not route.residual:
        offsets = offsets + route.weights.double().sum(1, keepdim=True) - 1
    alpha = space.weights(candidates)
    base = 1 - alpha.sum(1, keepdim=True) if residual else 0.0
    torch.testing.assert_close(offsets, alpha @ z + base - 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("limits", [(0.8, 1.2), (0.5, 2.0)])
def test_free_weights_scale_the_model_no_further_than_their_limits(limits: tuple[float, float]):
    space = MixtureSpace(EXPERTS, GROUPS, normalized=False, sum_limits=limits)
    totals = space.weights(random_candidates(space)).sum(-1)
    assert totals.min() == pytest.approx(limits[0])
    assert totals.max() == pytest.approx(limits[1])
    inside = torch.tensor([[0.3, 0.25, 0.45] * 2])
    assert torch.equal(space.weights(inside), inside.double().reshape(1, 2, 3))


def test_one_expert_alone_is_exactly_that_expert():
    space = MixtureSpace(EXPERTS)
    route = space.to_route(torch.tensor([[0.7, 0.0, -2.0], [0.0, 0.0, 1e-3]]), rows_each=2)
    assert route.chosen() == ["math", "math", "reasoning", "reasoning"]


def test_rows_of_a_route_are_candidate_by_candidate():
    space = MixtureSpace(EXPERTS, GROUPS)
    candidates = random_candidates(space, rows=3).abs()
    route = space.to_route(candidates, rows_each=4)
    assert (len(route), route.experts, route.groups) == (12, EXPERTS, GROUPS)
    expected = space.weights(candidates).float()
    for row in range(12):
        assert torch.equal(route.weights[row], expected[row // 4])


def test_the_start_is_the_uniform_mixture_and_inside_the_limits():
    for space in MixtureSpace.configurations(EXPERTS, GROUPS):
        start = space.start
        assert start.mean.shape == (space.dimension,)
        torch.testing.assert_close(space.weights(start.mean[None]).flatten(), start.mean)
        assert (start.mean == 1 / 3).all() and (start.std == 0.5).all()


def test_the_papers_configurations_come_simplest_first():
    spaces = MixtureSpace.configurations(EXPERTS, GROUPS)
    assert [space.name for space in spaces] == [
        "global-normalized",
        "global-free",
        "grouped-normalized",
        "grouped-free",
    ]
    assert [space.dimension for space in spaces] == [3, 3, 6, 6]
    assert [space.name for space in MixtureSpace.configurations(("math",), residual=True)] == ["global-free-residual"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"experts": ()}, "no experts"),
        ({"experts": ("math", "math")}, "distinct"),
        ({"experts": ("math",)}, "always 1"),
        ({"experts": EXPERTS, "groups": ("a", "a")}, "distinct"),
        ({"experts": EXPERTS, "limits": (1.0, 0.0)}, "limits"),
        ({"experts": EXPERTS, "limits": (-1.0, 1.0)}, "lower >= 0"),
        ({"experts": EXPERTS, "limits": (-1.0, 1.0), "normalized": False}, "lower >= 0"),
        ({"experts": EXPERTS, "limits": (0.0, float("nan"))}, "limits"),
        ({"experts": EXPERTS, "sum_limits": (1.1, 1.2)}, "sum_limits"),
    ],
)
def test_a_space_without_meaning_is_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MixtureSpace(**options)


@pytest.mark.parametrize("candidates", [torch.zeros(2, 4), torch.zeros(3), torch.full((1, 3), float("nan"))])
def test_candidates_of_another_space_are_refused(candidates: torch.Tensor):
    with pytest.raises(ValueError, match=r"\(N, 3\)"):
        MixtureSpace(EXPERTS).weights(candidates)
