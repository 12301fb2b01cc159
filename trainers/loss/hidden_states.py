"""Hidden states of a causal language model through its wrapped forward, and proof that logits follow from them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peft_svf.trainers.loss.token_scores import LanguageModelHead


def add_hidden_states_output(model: nn.Module) -> None:
    """Let `model(..., return_hidden_states_only=True)` return the last hidden states, `(batch, length, hidden)`.

    They have to come from the model's own forward so that the hooks of DDP, FSDP and gradient checkpointing fire.
    Everything else about `model` stays as it is.
    """
    original: Any = model.forward

    @functools.wraps(type(model).forward)  # `generate` validates its arguments against this signature
    def forward(self: Any, *args: Any, return_hidden_states_only: bool = False, **kwargs: Any) -> Any:
        if not return_hidden_states_only:
            return original(*args, **kwargs)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}  # PEFT passes `labels=None`
        with without_router_logits(self):
            return self.base_model(*args, use_cache=False, **kwargs).last_hidden_state

    model.forward = types.MethodType(forward, model)


@contextlib.contextmanager
def without_router_logits(model: nn.Module) -> Iterator[None]:
    """Let mixtures of experts keep the outputs of their routers to themselves.

    They are for an auxiliary loss, which is not part of this one, and with `output_router_logits=True` transformers
    computes it, and fails, in every step of generation.
    """
    text_config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    wanted = getattr(text_config, "output_router_logits", None)
    if not wanted:
        yield
        return
    text_config.output_router_logits = False
    try:
        yield
    finally:
        text_config.output_router_logits = wanted


def takes_position_ids(model: nn.Module) -> bool:
    """Whether the backbone of `model` is to be told positions.

    Not with ALiBi, for example, and not where positions have several dimensions, which the model derives from images.
    """
    backbone: Any = model.base_model
    return "position_ids" in inspect.signature(backbone.forward).parameters and not hasattr(backbone, "get_rope_index")


def padded_inputs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
    """Inputs of the backbone of `model` for left-padded rows, both tensors of shape `(batch, length)`."""
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if takes_position_ids(model):
        inputs["position_ids"] = positions(attention_mask)
    return inputs


def positions(attention_mask: Tensor) -> Tensor:
    """Positions of the tokens of left-padded rows, as `generate` counts them: shape `(batch, length)`."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def check_logits_follow_from_hidden_states(model: nn.Module) -> None:
    """Raise if `model` does more between hidden states and logits than [`LanguageModelHead`] knows.

    The log-probabilities that are trained would then not be those of the model that answers.

    Raises:
        ValueError: If the two ways to log-probabilities differ by more than rounding.
    """
    weight = LanguageModelHead.of(model).weight
    device: Any = model.device
    ids = torch.arange(1, 5, device=device).remainder(weight.size(0)).unsqueeze(0)  # (1, 4)
    training = model.training
    model.eval()
    try:
        expected = model(input_ids=ids).logits.float().log_softmax(-1)
        hidden = model(input_ids=ids, return_hidden_states_only=True)
    except (AttributeError, TypeError) as cause:
        raise ValueError(
            f"{type(model).__name__} does not give its hidden states ({cause}): SVFPolicyGradientTrainer does not "
            "support it."
        ) from cause
    finally:
        model.train(training)
    error = (LanguageModelHead.of(model).log_softmax(hidden, 1.0).to(expected.device) - expected).abs().max().item()
    rounding = 1e-3 if expected.dtype == weight.dtype else 0.1  # logits near 10 in bfloat16 are known to 0.04
    if not error <= rounding:
        raise ValueError(
            f"{type(model).__name__} does not compute its logits as `scale × lm_head(hidden states)`, optionally soft "
            f"capped (log-probabilities differ by {error:.1e}): SVFPolicyGradientTrainer does not support it."
        )
