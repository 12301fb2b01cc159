"""Log-probabilities, entropy and KL estimators against enumeration in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_svf.trainers.loss.token_scores import LanguageModelHead, divergence, logit_transform, score_tokens


ESTIMATORS = ["exact", "exact_forward", "k1_reward", "k3"]


def policies(n: int = 3, vocabulary: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(2, n, vocabulary, generator=generator, dtype=torch.float64)
    return draw[0].log_softmax(-1), draw[1].log_softmax(-1)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_expected_estimate_is_the_enumerated_divergence(estimator: Any) -> None:
    p, q = policies()
    estimates = torch.stack([divergence(p, q, torch.full((3,), y), estimator) for y in range(4)], dim=1)
    expected = (p.exp() * estimates).sum(1)  # over answers drawn from the policy
    reverse = torch.tensor(
        [sum(a.exp() * (a - b) for a, b in zip(*rows, strict=True)) for rows in zip(p, q, strict=True)]
    )
    forward = torch.tensor(
        [sum(b.exp() * (b - a) for a, b in zip(*rows, strict=True)) for rows in zip(p, q, strict=True)]
    )
    torch.testing.assert_close(expected, forward if estimator == "exact_forward" else reverse, rtol=1e-12, atol=1e-12)


def test_k3_has_the_expected_gradient_of_the_forward_divergence() -> None:
    logits, (_, q) = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), policies()
    p = logits.log_softmax(-1)
    sampled = sum((p.detach().exp()[:, y] * divergence(p, q, torch.full((3,), y), "k3")).sum() for y in range(4))
    forward = divergence(p, q, torch.zeros(3, dtype=torch.long), "exact_forward").sum()
    (of_k3,) = torch.autograd.grad(sampled, logits, retain_graph=True)
    (of_forward,) = torch.autograd.grad(forward, logits)
    torch.testing.assert_close(of_k3, of_forward, rtol=1e-12, atol=1e-12)


def test_k1_in_the_reward_has_the_gradient_of_the_sequence_divergence() -> None:
    """Two tokens of a tabular policy, all 9 answers enumerated."""
    torch.manual_seed(1)
    first, second = torch.randn(3, dtype=torch.float64), torch.randn(3, 3, dtype=torch.float64)
    first.requires_grad_(), second.requires_grad_()
    q1, q2 = (
        torch.randn(3, dtype=torch.float64).log_softmax(-1),
        torch.randn(3, 3, dtype=torch.float64).log_softmax(-1),
    )
    p1, p2 = first.log_softmax(-1), second.log_softmax(-1)
    answer, reference = p1.unsqueeze(1) + p2, q1.unsqueeze(1) + q2  # (3, 3): log-probability of every answer
    exact = torch.autograd.grad((answer.exp() * (answer - reference)).sum(), [first, second], retain_graph=True)
    reward = -torch.stack([
        divergence(p1.unsqueeze(0), q1.unsqueeze(0), torch.tensor([a]), "k1_reward")
        + divergence(p2[a].unsqueeze(0), q2[a].unsqueeze(0), torch.tensor([b]), "k1_reward")
        for a in range(3) for b in range(3)
    ]).view(3, 3).detach()  # fmt: skip
    reinforce = torch.autograd.grad((answer.exp().detach() * -reward * answer).sum(), [first, second])
    for ours, expected in zip(reinforce, exact, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("chunk_size", [1, 3, 64])
def test_chunks_give_the_numbers_and_gradients_of_whole_logits(estimator: Any, chunk_size: int) -> None:
    torch.manual_seed(0)
    head = LanguageModelHead(torch.randn(11, 5), torch.randn(11), scale=0.7, softcap=4.0)
    hidden, reference = torch.randn(8, 5, requires_grad=True), torch.randn(8, 5)
    targets = torch.randint(11, (8,))
    scores = score_tokens(hidden, targets, head, 0.6, reference, estimator, chunk_size)

    def log_softmax(h: torch.Tensor) -> torch.Tensor:
        logits = 4.0 * torch.tanh((h @ head.weight.double().T + head.bias.double()) * 0.7 / 4.0)
        return (logits / 0.6).log_softmax(-1)

    twin = hidden.detach().double().requires_grad_()
    p, q = log_softmax(twin), log_softmax(reference.double())
    log_probs = p[torch.arange(8), targets]
    kl = divergence(p, q, targets, estimator)
    torch.testing.assert_close(scores.log_probs.double(), log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.entropy.double(), -(p.exp() * p).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.kl.double(), kl, rtol=1e-4, atol=1e-5)
    (ours,) = torch.autograd.grad(scores.log_probs.sum() + scores.kl.square().sum(), hidden)
    (expected,) = torch.autograd.grad(log_probs.sum() + kl.square().sum(), twin)
    assert (ours.double() - expected).norm() / expected.norm() < 1e-5


def test_no_tokens_give_empty_scores_with_a_gradient() -> None:
    hidden = torch.zeros(0, 5, requires_grad=True)
    scores = score_tokens(hidden, torch.zeros(0, dtype=torch.long), LanguageModelHead(torch.randn(11, 5)))
    scores.log_probs.sum().backward()
    assert scores.kl is None and hidden.grad is not None and hidden.grad.shape == (0, 5)


def test_bfloat16_states_are_scored_in_float32_also_under_autocast() -> None:
    torch.manual_seed(0)
    head = LanguageModelHead(torch.randn(11, 5).bfloat16())
    hidden = torch.randn(4, 5).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scored = head.log_softmax(hidden, 1.0)
    assert scored.dtype == torch.float32
    torch.testing.assert_close(scored, (hidden.float() @ head.weight.float().T).log_softmax(-1))


def test_states_and_targets_may_be_on_other_devices_than_the_head() -> None:
    """As in a model that `device_map="auto"`, TRL's default for a path, has spread over two accelerators."""
    with FakeTensorMode(), torch.no_grad():  # knows devices that this machine does not have
        head = LanguageModelHead(torch.empty(11, 5, device="cuda:1"), torch.empty(11, device="cuda:1"), softcap=3.0)
        hidden, reference = torch.empty(2, 8, 5, device="cuda:0")
        targets = torch.empty(8, dtype=torch.long, device="cuda:0")
        scores = score_tokens(hidden, targets, head, 0.7, reference)
        assert {part.device for part in scores} == {torch.device("cuda:1")}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (1.0, None)),
        ({"logit_scale": 0.0625}, (0.0625, None)),
        ({"logits_scaling": 8.0}, (0.125, None)),
        ({"model_type": "hyperclovax", "logits_scaling": 8.0}, (8.0, None)),
        ({"lm_head_multiplier": 0.5, "logit_scale": None}, (0.5, None)),
        ({"final_logit_softcapping": 30.0}, (1.0, 30.0)),
    ],
)
def test_scale_and_soft_cap_are_read_from_the_configuration(options: dict[str, Any], expected: Any) -> None:
    assert logit_transform(SimpleNamespace(**{"model_type": "llama", **options})) == expected
