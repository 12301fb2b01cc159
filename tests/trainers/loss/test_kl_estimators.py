"""The trainer's own loss against exact enumeration of every answer of a toy model, in float64.

For every answer y that the model can give, `_compute_loss` is differentiated on y alone; weighted with the model's
probability of y this is the expected gradient, without any sampling. What it has to be is differentiated from the
model's ordinary logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from peft_svf.trainers import SVFPolicyGradientTrainer
from peft_svf.trainers.loss.advantages import subtract_baseline


MakeTrainer = Callable[..., SVFPolicyGradientTrainer]
Answer = tuple[int, ...]

VOCABULARY, LENGTH, END = 4, 3, 0
PROMPT = [2, 1]
KL_COEF = 0.3
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}


def toy_model() -> GPT2LMHeadModel:
    """GPT-2 computes in the dtype of its weights throughout, norms included, so float64 is float64."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=END
    )
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(25.0)  # far from uniform
    return model


@pytest.fixture
def make_toy(make_trainer: MakeTrainer, tiny: SimpleNamespace) -> Callable[..., SVFPolicyGradientTrainer]:
    def make(**options: Any) -> SVFPolicyGradientTrainer:
        trainer = make_trainer({"model": toy_model()}, temperature=0.8, **options)
        tiny.randomize_offsets(trainer.model, std=0.6)
        trainer.model.double()
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        return trainer

    return make


def all_answers(kind: str) -> list[Answer]:
    """Of `LENGTH` tokens, or ended by `END`: shorter answers are padded and masked in a batch."""
    if kind == "fixed length":
        return list(itertools.product(range(VOCABULARY), repeat=LENGTH))

    def extend(answer: Answer) -> Iterator[Answer]:
        if len(answer) == LENGTH or answer[-1:] == (END,):
            yield answer
        else:
            for token in range(VOCABULARY):
                yield from extend((*answer, token))

    return list(extend(()))


def prefixes(answers: list[Answer]) -> list[Answer]:
    return sorted({answer[:i] for answer in answers for i in range(len(answer))}, key=lambda p: (len(p), p))


def batch_of(answers: list[Answer], advantages: Tensor) -> dict[str, Tensor]:
    n = len(answers)
    ids, mask = torch.full((n, LENGTH), END), torch.zeros(n, LENGTH, dtype=torch.long)
    for i, answer in enumerate(answers):
        ids[i, : len(answer)], mask[i, : len(answer)] = torch.tensor(answer), 1
    return {
        "prompt_ids": torch.tensor([PROMPT] * n),
        "prompt_mask": torch.ones(n, len(PROMPT), dtype=torch.long),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
    }


def parameters(trainer: SVFPolicyGradientTrainer) -> list[Tensor]:
    return [p for p in trainer.model.parameters() if p.requires_grad]


def gradient(value: Tensor, trainer: SVFPolicyGradientTrainer) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters(trainer), retain_graph=True)])


def loss_gradient(trainer: SVFPolicyGradientTrainer, answers: list[Answer], advantages: Tensor) -> Tensor:
    loss = trainer._compute_loss(trainer.model, batch_of(answers, advantages))
    assert loss.dtype == torch.float64
    return gradient(loss, trainer)


def next_token_log_probs(trainer: SVFPolicyGradientTrainer, answers: list[Answer]) -> dict[Answer, Tensor]:
    """log p(· | prompt, prefix) for every prefix, from the model's logits."""
    rows = {prefix: trainer.model(input_ids=torch.tensor([[*PROMPT, *prefix]])) for prefix in prefixes(answers)}
    return {prefix: (out.logits[0, -1] / 0.8).log_softmax(-1) for prefix, out in rows.items()}


class Enumeration:
    """All answers with log π(y) (carries the gradient) and log q(y), and KLs at every position."""

    def __init__(self, trainer: SVFPolicyGradientTrainer, kind: str) -> None:
        self.answers = all_answers(kind)
        p = next_token_log_probs(trainer, self.answers)
        with torch.no_grad(), trainer.model.disable_adapter():
            q = next_token_log_probs(trainer, self.answers)
        self.log_p = torch.stack([sum(p[y[:i]][y[i]] for i in range(len(y))) for y in self.answers])
        self.log_q = torch.stack([sum(q[y[:i]][y[i]] for i in range(len(y))) for y in self.answers])
        self.probability = self.log_p.exp().detach()
        reverse = {s: (p[s].exp() * (p[s] - q[s])).sum() for s in p}
        forward = {s: (q[s].exp() * (q[s] - p[s])).sum() for s in p}
        self.visited_reverse = self.at_visited(reverse)
        self.visited_forward = self.at_visited(forward)
        self.sequence_kl = (self.log_p.exp() * (self.log_p - self.log_q)).sum()

    def at_visited(self, value: dict[Answer, Tensor]) -> Tensor:
        """Expected sum over the positions of an answer, the visited prefixes being drawn, not differentiated."""
        sums = torch.stack([sum(value[y[:i]] for i in range(len(y))) for y in self.answers])
        return (self.probability * sums).sum()


KINDS = ["fixed length", "ended"]


@pytest.mark.parametrize("kind", KINDS)
def test_enumerated_answers_are_all_there_are(make_toy: Any, kind: str) -> None:
    enumeration = Enumeration(make_toy(), kind)
    assert len(enumeration.answers) == {"fixed length": 64, "ended": 40}[kind]
    torch.testing.assert_close(enumeration.probability.sum(), torch.tensor(1.0, dtype=torch.float64), **TOLERANCE)
    assert 0.05 < enumeration.sequence_kl < 10.0 and enumeration.probability.max() < 0.8, "not a trivial case"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("estimator", ["exact", "exact_forward", "k1_reward", "k3"])
def test_expected_gradient_and_value_of_the_penalty(make_toy: Any, estimator: str, kind: str) -> None:
    """Section 5 of the notes: each estimator's expected gradient, through the trainer's `_compute_loss`."""
    trainer = make_toy(kl_coef=KL_COEF, kl_estimator=estimator)
    exact = Enumeration(trainer, kind)
    no_reward = torch.zeros(1, dtype=torch.float64)
    expected = {
        "exact": exact.visited_reverse,
        "exact_forward": exact.visited_forward,
        "k1_reward": exact.sequence_kl,
        "k3": exact.visited_forward,
    }[estimator]
    gradients = torch.stack([loss_gradient(trainer, [answer], no_reward) for answer in exact.answers])
    torch.testing.assert_close(exact.probability @ gradients, KL_COEF * gradient(expected, trainer), **TOLERANCE)

    logged = torch.tensor(trainer._metrics["train"]["kl_sequence"], dtype=torch.float64)  # float32 in the log
    value = exact.visited_forward if estimator == "exact_forward" else exact.sequence_kl
    torch.testing.assert_close(exact.probability @ logged, value.detach(), rtol=1e-5, atol=1e-6)


def test_the_exact_estimator_is_not_the_gradient_of_the_sequence_divergence(make_toy: Any) -> None:
    """It has the value but leaves out that a token changes which positions come later; only `k1_reward` is Eq. 1."""
    trainer = make_toy()
    exact = Enumeration(trainer, "fixed length")
    torch.testing.assert_close(exact.visited_reverse, exact.sequence_kl, **TOLERANCE)
    ours, whole = gradient(exact.visited_reverse, trainer), gradient(exact.sequence_kl, trainer)
    assert (ours - whole).norm() / whole.norm() > 0.05
    assert torch.cosine_similarity(ours, whole, dim=0) > 0.7


@pytest.mark.parametrize("kind", KINDS)
def test_policy_term_is_the_gradient_of_the_expected_reward(make_toy: Any, kind: str) -> None:
    trainer = make_toy(baseline="none")
    exact = Enumeration(trainer, kind)
    rewards = torch.tensor([1.0 if sum(y) % 3 == 0 else -1.0 for y in exact.answers], dtype=torch.float64)
    advantages = subtract_baseline(rewards, "none", 1)
    gradients = [loss_gradient(trainer, [y], a.view(1)) for y, a in zip(exact.answers, advantages, strict=True)]
    expected_reward = (exact.log_p.exp() * rewards).sum()
    torch.testing.assert_close(
        exact.probability @ torch.stack(gradients), -gradient(expected_reward, trainer), **TOLERANCE
    )


@pytest.mark.parametrize(("baseline", "num_generations"), [("batch", 1), ("group", 3)])
def test_baseline_of_the_other_answers_leaves_the_policy_gradient_unbiased(
    make_toy: Any, baseline: Any, num_generations: int
) -> None:
    """Every batch of three answers that can be drawn, with its probability, against the gradient without baseline."""
    trainer = make_toy(baseline=baseline, num_generations=num_generations, per_device_train_batch_size=3)
    p = next_token_log_probs(trainer, [(0,)])[()]
    rewards = torch.tensor([1.0, -1.0, -1.0, 0.25], dtype=torch.float64)
    total = torch.zeros(sum(x.numel() for x in parameters(trainer)), dtype=torch.float64)
    for tokens in itertools.product(range(VOCABULARY), repeat=3):
        drawn = torch.tensor(tokens)
        advantages = subtract_baseline(rewards[drawn], baseline, 3)
        gradients = loss_gradient(trainer, [(token,) for token in tokens], advantages)
        total += p[drawn].sum().exp().detach() * gradients
    torch.testing.assert_close(total, -gradient((p.exp() * rewards).sum(), trainer), **TOLERANCE)
