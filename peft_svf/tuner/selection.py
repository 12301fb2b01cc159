"""What an adapter may be called, and which modules it selects where PEFT's own rules do not serve SVF."""

from __future__ import annotations

import copy
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_svf.tuner.config import SVFConfig
from peft_svf.tuner.module_checks import is_linear


def check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    """Raise a ValueError if an adapter of `model` cannot be called `adapter_name`."""
    # Offsets are kept in a ModuleDict, whose keys are attribute names.
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict(), adapter_name):
        raise ValueError(f"an adapter cannot be named '{adapter_name}': choose a name without '.', like 'math'")
    # PEFT takes every key with `.<name>.` in it for the adapter's, and would not save it with the others.
    if adapter_name in _module_name_parts(model):
        raise ValueError(f"an adapter cannot be named '{adapter_name}', as a module of the model is; choose another")


# Heads that PEFT trains in full for a task; it leaves out of "all-linear" only those of sequence classification.
HEADS = {"TOKEN_CLS": {"classifier", "score"}, "QUESTION_ANS": {"qa_outputs"}}


def resolve_all_linear(config: SVFConfig, model: nn.Module) -> None:
    """As PEFT does it, but without the modules that any adapter saves in full: PEFT takes the copies that another one
    keeps for layers of the model, and this adapter would then fit no other model."""
    if config.target_modules == "all-linear":
        _maybe_include_all_linear_layers(config, model)
        found = {*config.target_modules, *_linear_by_nature(model)}
        copied = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper))
        heads = HEADS.get(str(getattr(config.task_type, "value", config.task_type)), set())
        config.target_modules = {name for name in found - heads if not name.startswith(copied)}


def _linear_by_nature(model: nn.Module) -> set[str]:
    """Linear layers that PEFT does not know by their class: those of quantized formats (GPTQ, AWQ, HQQ)."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    return {
        name
        for name, module in model.named_modules()
        if is_linear(module)
        and not isinstance(module, (nn.Linear, Conv1D))
        and module is not head
        and not name.endswith(".base_layer")
    }


def matches_by_ending(config: SVFConfig, name: str) -> Any:
    """Whether `exclude_modules`, `layers_to_transform` and `layers_pattern` select a module or parameter."""
    by_ending = copy.copy(config)
    by_ending.target_modules = {name.rpartition(".")[2]}
    return BaseTuner._check_target_module_exists(by_ending, name)


def _module_name_parts(model: nn.Module) -> set[str]:
    """What stands between the dots in the names of the modules that are not those of adapters."""
    names = dict(model.named_modules())
    wrappers = tuple(f"{n}." for n, m in names.items() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)))
    return {"model"}.union(*(name.split(".") for name in names if not name.startswith(wrappers)))
