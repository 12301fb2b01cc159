"""Scores of the tokens of a micro-batch: one forward of the policy and, for the KL, one of the base model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from trl import GRPOTrainer

from peft_svf.trainers.distributed import whole_head
from peft_svf.trainers.loss.forward_checks import check_reference
from peft_svf.trainers.loss.hidden_states import padded_inputs
from peft_svf.trainers.loss.token_scores import LanguageModelHead, TokenScores, score_tokens
from peft_svf.trainers.rollouts.image_prompts import multimodal_inputs


class ScoresTokens(GRPOTrainer):
    """Mixin: scores what was sampled, under the weights that are trained and never under merged ones.

    The class that uses it sets `_base_model`, which returns hidden states
    ([`~peft_svf.trainers.loss.hidden_states.add_hidden_states_output`]), and has the method `_refuse_merged`.
    """

    _base_model: Any
    _refuse_merged: Callable[[], None]

    def _score(self, model: nn.Module, inputs: dict[str, Any], valid: Tensor) -> TokenScores:
        """Scores of the sampled tokens marked in `valid`, `(B, T)`, row by row, with a KL if there is a `kl_coef`."""
        self._refuse_merged()
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)  # (B, P + T)
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        model_inputs = padded_inputs(self._base_model, input_ids, attention_mask) | multimodal_inputs(inputs)

        def hidden_states() -> Tensor:  # (tokens, hidden): the states that predict the sampled tokens
            states = model(**model_inputs, return_hidden_states_only=True)
            return states[:, -valid.size(1) - 1 : -1][valid.to(states.device)]

        reference = None
        if self.args.kl_coef:
            check_reference(model, self._base_model)  # a sweep may have set the coefficient since the trainer was made
            with torch.no_grad(), adapters_disabled(self.accelerator.unwrap_model(self.model)):
                reference = hidden_states()
        scores = score_tokens(
            hidden_states(),
            inputs["completion_ids"][valid],
            whole_head(LanguageModelHead.of(self._base_model)),
            self.temperature,
            reference,
            self.args.kl_estimator,
        )
        # A model that `device_map` has spread over devices (TRL's default for a path) ends on another than it begins.
        log_probs, entropy, kl = scores
        device = valid.device
        return TokenScores(log_probs.to(device), entropy.to(device), None if kl is None else kl.to(device))


@contextlib.contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Let `model` be its base model for a while.

    PEFT's `disable_adapter` asks for the status of the model and toggles `requires_grad`: 72 ms for 301 layers, and
    adapters that were frozen come back trainable. Setting the switches alone takes 8 ms and leaves that as it is.
    """
    switches = [m for m in model.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    before = [switch._disable_adapters for switch in switches]
    try:
        for switch in switches:
            switch._disable_adapters = True
        yield
    finally:
        for switch, disabled in zip(switches, before, strict=True):
            switch._disable_adapters = disabled
