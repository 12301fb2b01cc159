"""Proof, on four tokens, that the forward which is trained is that of the model which answers."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_svf.trainers.loss.hidden_states import padded_inputs
from peft_svf.trainers.loss.token_scores import LanguageModelHead


PADDING = 3


def check_reference(model: nn.Module, base_model: nn.Module) -> None:
    """Raise if turning off the adapters of `model` does not make it the model that the KL is measured from.

    Args:
        model (`nn.Module`): The PEFT model.
        base_model (`nn.Module`): The causal language model in it.

    Raises:
        ValueError: There are no layers to turn off, or the output layer, which scores both models, is trained.
    """
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            "`kl_coef` needs an adapter whose layers can be turned off, which this PEFT method does not have: set "
            "`kl_coef=0.0`, or use `SVFConfig()`."
        )
    if any(p.requires_grad for p in base_model.get_output_embeddings().parameters()):  # type: ignore[operator]
        raise ValueError(
            "The output layer is trained, and the KL from the base model is not computed with its original weights: "
            "leave it out of `modules_to_save`, or set `kl_coef=0.0`."
        )


@torch.no_grad()
def check_forward(model: nn.Module) -> None:
    """Raise if padding changes the scores of `model`, or if it reads weights of adapted layers without calling them.

    Prompts of a batch are padded on the left. A layer that is not called does not apply its adapter in the forward
    that is trained, but answers of merged weights do.

    Raises:
        ValueError: Says which, and for layers how to leave them out.
    """
    head = LanguageModelHead.of(model)
    device: Any = model.device
    ids = torch.arange(1, 5, device=device).remainder(head.weight.size(0)).unsqueeze(0)  # (1, 4)
    padding = ids.new_zeros(1, PADDING)
    mask = torch.cat([padding, torch.ones_like(ids)], dim=1)
    called: set[nn.Module] = set()
    hooks = [m.register_forward_pre_hook(lambda module, _: called.add(module)) for m in model.modules()]
    training = model.training
    model.eval()
    try:
        plain = model(**padded_inputs(model, ids, torch.ones_like(ids)), return_hidden_states_only=True)
        padded = model(**padded_inputs(model, torch.cat([padding, ids], dim=1), mask), return_hidden_states_only=True)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    _raise_if_different(
        type(model).__name__, head.log_softmax(plain, 1.0), head.log_softmax(padded[:, PADDING:], 1.0), head.weight
    )
    _raise_if_read(model, called)


def _raise_if_different(name: str, expected: Tensor, padded: Tensor, weight: Tensor) -> None:
    error = (padded - expected).abs().max().item()
    kl = (expected.exp() * (expected - padded)).sum(-1).mean().item()
    # Half precision may send a token to another expert: there only what rounding cannot do counts.
    right = error <= 1e-3 if weight.dtype == torch.float32 else kl <= 0.5
    if not right:
        raise ValueError(
            f"{name} gives other log-probabilities (by {error:.1e}) to a prompt that is padded on the left, as those "
            "of a batch are: SVFPolicyGradientTrainer does not support it."
        )


def _raise_if_read(model: nn.Module, called: set[nn.Module]) -> None:
    """What did not run although its parent did; experts that no token went to have parents that did not run either."""
    modules: dict[str, Any] = dict(model.named_modules())
    read = [
        name
        for name, module in modules.items()
        if isinstance(module, BaseTunerLayer) and module not in called and modules[name.rpartition(".")[0]] in called
    ]
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    within = set(decoder.modules())
    read = [name for name in read if modules[name] in within]
    if read:
        endings = ", ".join(sorted({repr(name.rpartition(".")[2]) for name in read}))
        raise ValueError(
            f"{type(model).__name__} reads the weight of {', '.join(f'`{name}`' for name in read)} without calling "
            f"the layer, so its adapter has no effect on what is trained: add {endings} to `exclude_modules`."
        )
