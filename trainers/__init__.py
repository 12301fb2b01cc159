"""Training experts: policy-gradient trainer and configuration, tasks, rewards, and the sandbox for generated code."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from peft_svf.trainers.guards.non_finite_batch import NonFiniteLossError
    from peft_svf.trainers.svf_policy_gradient_config import SVFPolicyGradientConfig
    from peft_svf.trainers.svf_policy_gradient_trainer import SVFPolicyGradientTrainer

__all__ = ["NonFiniteLossError", "SVFPolicyGradientConfig", "SVFPolicyGradientTrainer"]

_MODULES = {  # imported on first use: TRL's trainers take seconds
    "NonFiniteLossError": "guards.non_finite_batch",
    "SVFPolicyGradientConfig": "svf_policy_gradient_config",
    "SVFPolicyGradientTrainer": "svf_policy_gradient_trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
