"""Log-likelihood of answers, recorded while `generate` chooses their tokens: no forward of its own, no logits kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList


class AnswerLikelihoods:
    """
    Sees every step of one call of `generate`, without beams, and adds up what the chosen tokens' probabilities are.

    The probabilities are those of the model: a temperature comes later, in `generate`.

    Example:

    ```python
    >>> likelihoods = AnswerLikelihoods()
    >>> output = model.generate(**inputs, **likelihoods.generate_kwargs)
    >>> likelihoods.of(output[:, inputs["input_ids"].shape[1] :], [tokenizer.eos_token_id])
    ```
    """

    def __init__(self) -> None:
        self._before = _BeforeChoice()
        self._after = _AfterChoice(self._before)

    @property
    def generate_kwargs(self) -> dict[str, Any]:
        """What `generate` has to be called with."""
        return {
            "logits_processor": LogitsProcessorList([self._before]),
            "stopping_criteria": StoppingCriteriaList([self._after]),
        }

    def of(self, new_tokens: Tensor, end_tokens: Sequence[int]) -> list[float]:
        """
        Σ log p of each answer, its end token included.

        Args:
            new_tokens (`torch.Tensor` of shape `(B, T)`): What `generate` wrote.
            end_tokens (`Sequence[int]`): What follows the first of them in a row is padding.

        Returns:
            `list[float]`: B sums, at most 0.
        """
        steps = torch.stack(self._after.steps, dim=1)[:, : new_tokens.shape[1]].double()  # (B, T)
        ends = torch.isin(new_tokens, torch.tensor(list(end_tokens), device=new_tokens.device)).long()
        is_answer = ends.cumsum(1) - ends == 0
        return torch.where(is_answer, steps, 0.0).sum(1).tolist()


class _BeforeChoice(LogitsProcessor):
    """Keeps the logits (B, V) of the step at hand."""

    logits: Tensor

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits = scores
        return scores


class _AfterChoice(StoppingCriteria):
    """Looks up which token was chosen; stops nothing."""

    def __init__(self, before: _BeforeChoice) -> None:
        self.before = before
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        logits = self.before.logits
        chosen = logits.gather(1, input_ids[:, -1:]).squeeze(1)
        self.steps.append(chosen - logits.logsumexp(1))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
