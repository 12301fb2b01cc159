"""Log-probability, entropy and KL divergence of sampled tokens, from hidden states in chunks.

Logits of shape (tokens, vocabulary) never exist whole: each chunk of tokens is projected, scored and, in training,
projected again during the backward pass. Everything after the hidden states is computed in float32 (float64 states
keep their precision): in bfloat16 the rounding of `log_softmax` alone looks like 5e-3 nats of KL per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


KLEstimator = Literal["exact", "exact_forward", "k1_reward", "k3"]

# Upper bound of tokens × vocabulary held at once: 256 MiB for each float32 tensor of that shape.
MAX_LOGITS_PER_CHUNK = 2**26


class TokenScores(NamedTuple):
    """Scores of `n` tokens, each `(n,)`, float32 or better, in nats; `kl` is None when there is no reference."""

    log_probs: Tensor
    entropy: Tensor
    kl: Tensor | None


@dataclass(frozen=True)
class LanguageModelHead:
    """What lies between the last hidden states of a causal language model and its logits.

    logits = softcap · tanh(scale · (h Wᵀ + b) / softcap), without the tanh when there is no soft cap.

    Args:
        weight (`Tensor`): Shape `(vocabulary, hidden)`.
        bias (`Tensor`, *optional*): Shape `(vocabulary,)`.
        scale (`float`, *optional*, defaults to `1.0`): Factor of the logits (Cohere, Granite).
        softcap (`float`, *optional*): Bound of the logits (Gemma 2).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: nn.Module) -> LanguageModelHead:
        """The head of `model`, a causal language model of transformers."""
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        text_config = model.config.get_text_config()  # type: ignore[union-attr, operator]
        scale, softcap = logit_transform(text_config)
        return cls(head.weight, getattr(head, "bias", None), scale, softcap)

    def log_softmax(self, hidden: Tensor, temperature: float) -> Tensor:
        """Log-probabilities of the whole vocabulary at `temperature`: `(n, hidden)` to `(n, vocabulary)`.

        In float32, or in float64 where the hidden states are; on the device of the weight.
        """
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        # In place and only what changes something: each pass over the vocabulary takes as long as its softmax.
        with torch.autocast(self.weight.device.type, enabled=False):
            logits = F.linear(hidden.to(self.weight.device, dtype), self.weight.to(dtype), bias)
            if self.scale != 1.0:
                logits = logits.mul_(self.scale)
            if self.softcap is not None:
                logits = logits.div_(self.softcap).tanh_().mul(self.softcap)
            if temperature != 1.0:
                logits = logits.div_(temperature)
            return torch.log_softmax(logits, dim=-1)


def logit_transform(text_config: Any) -> tuple[float, float | None]:
    """Scale and soft cap that a model applies to its logits, read from its configuration.

    The names are those of TRL's fused language-model head (`trl.trainer.utils.add_fused_lm_head`).
    """
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(text_config, name, None) is not None:
            scale = float(getattr(text_config, name))
            break
    else:
        scaling = getattr(text_config, "logits_scaling", None)
        if scaling is not None:  # Granite and MiniCPM3 divide, HyperCLOVA X multiplies
            scale = float(scaling) if text_config.model_type == "hyperclovax" else 1.0 / scaling
    return scale, getattr(text_config, "final_logit_softcapping", None)


def score_tokens(
    hidden: Tensor,
    targets: Tensor,
    head: LanguageModelHead,
    temperature: float = 1.0,
    reference_hidden: Tensor | None = None,
    kl_estimator: KLEstimator = "exact",
    chunk_size: int | None = None,
) -> TokenScores:
    """Score the tokens that were sampled.

    Args:
        hidden (`Tensor`): Hidden states that predict the tokens, shape `(n, hidden)`; carries the gradient.
        targets (`Tensor`): Ids of the tokens, shape `(n,)`.
        head (`LanguageModelHead`): Turns hidden states into logits.
        temperature (`float`, *optional*, defaults to `1.0`): Temperature at which the tokens were sampled.
        reference_hidden (`Tensor`, *optional*): The reference model's hidden states; without them there is no KL.
        kl_estimator (`str`, *optional*, defaults to `"exact"`): See [`divergence`].
        chunk_size (`int`, *optional*): Tokens per chunk; by default as many as `MAX_LOGITS_PER_CHUNK` allows.

    Returns:
        `TokenScores`: `log_probs` and `kl` carry the gradient, `entropy` does not.
    """

    targets = targets.to(head.weight.device)

    def score(h: Tensor, h_reference: Tensor | None, ids: Tensor) -> TokenScores:
        p = head.log_softmax(h, temperature)  # (chunk, vocabulary)
        log_probs = p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)  # (chunk,)
        entropy = p.detach().exp().mul_(p.detach()).sum(-1).neg()
        if h_reference is None:
            return TokenScores(log_probs, entropy, None)
        q = head.log_softmax(h_reference, temperature)
        return TokenScores(log_probs, entropy, divergence(p, q, ids, kl_estimator))

    chunk_size = chunk_size or max(1, MAX_LOGITS_PER_CHUNK // head.weight.size(0))
    if len(hidden) <= chunk_size:
        return score(hidden, reference_hidden, targets)
    chunks = []
    for start in range(0, len(hidden), chunk_size):
        part = slice(start, start + chunk_size)
        h_reference = None if reference_hidden is None else reference_hidden[part]
        inputs = hidden[part], h_reference, targets[part]
        chunks.append(checkpoint(score, *inputs, use_reentrant=False, preserve_rng_state=False))  # nothing is drawn
    kl = None if reference_hidden is None else torch.cat([chunk.kl for chunk in chunks])
    return TokenScores(torch.cat([c.log_probs for c in chunks]), torch.cat([c.entropy for c in chunks]), kl)


def divergence(p: Tensor, q: Tensor, targets: Tensor, estimator: KLEstimator) -> Tensor:
    """Per-token divergence between the policy and the reference model, in nats.

    | estimator | value | |
    |---|---|---|
    | `exact` | Σ_v p (log p − log q) | KL(policy ‖ reference), the paper's direction (arXiv 2501.06252, Eq. 1) |
    | `exact_forward` | Σ_v q (log q − log p) | KL(reference ‖ policy), what the paper's released code computes |
    | `k1_reward` | log p(y) − log q(y) | of the sampled token; unbiased for Eq. 1 when taken from the reward |
    | `k3` | q(y)/p(y) − 1 − log q(y)/p(y) | of the sampled token, never negative (GRPO) |

    Args:
        p (`Tensor`): Log-probabilities of the policy, shape `(n, vocabulary)`.
        q (`Tensor`): Log-probabilities of the reference, shape `(n, vocabulary)`.
        targets (`Tensor`): Sampled tokens, shape `(n,)`.
        estimator (`str`): One of the four.

    Returns:
        `Tensor`: Shape `(n,)`.
    """
    if estimator == "exact":
        return (p.exp() * (p - q)).sum(-1)
    if estimator == "exact_forward":
        return (q.exp() * (q - p)).sum(-1)
    index = targets.unsqueeze(-1)
    log_ratio = (q.gather(-1, index) - p.gather(-1, index)).squeeze(-1)  # log q(y) − log p(y)
    return -log_ratio if estimator == "k1_reward" else log_ratio.expm1() - log_ratio
