"""Puts a model back as it was when adding an adapter fails half-way."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_svf.tuner.layer import SVFLayer


class Rollback:
    """The modules of `model`, which of its parameters are trainable, and which adapters are active, at this moment."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.children = [(module, dict(module._modules)) for module in modules]
        self.trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self.active = [(module, module._active_adapter) for module in modules if isinstance(module, BaseTunerLayer)]
        self.strengths = [(module, dict(module.svf_strength)) for module in modules if isinstance(module, SVFLayer)]

    def restore(self) -> None:
        """Take out every module that was added since, wrappers of adapted and of fully trained modules alike."""
        for module, children in self.children:
            module._modules.clear()
            module._modules.update(children)
        for parameter, requires_grad in self.trainable:
            parameter.requires_grad_(requires_grad)
        for layer, active in self.active:
            layer._active_adapter = active
        for layer, strengths in self.strengths:
            layer.svf_strength = strengths
