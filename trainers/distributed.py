"""Several processes: what transformers and accelerate leave to the trainer so that all of them train one model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from peft_svf.trainers.loss.token_scores import LanguageModelHead


def is_sharded(trainer: Any) -> bool:
    """Whether FSDP or DeepSpeed runs the model of `trainer`, and may have spread its weights over processes."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def forget_evaluation(trainer: Any) -> None:
    """Let `trainer.train()` wrap a model for DDP that `trainer.evaluate()` has prepared before.

    accelerate takes such a model for one that is ready for training and returns it unwrapped (transformers 5.23,
    accelerate 1.15): every process would then train for itself, and nothing would tell.
    """
    accelerator, model = trainer.accelerator, trainer.model
    if is_sharded(trainer) or trainer.model_wrapped is not model:
        return
    if any(prepared is model for prepared in accelerator._models):
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # `prepare` wraps the forward for autocast again
        accelerator._models[:] = [prepared for prepared in accelerator._models if prepared is not model]
        model._is_accelerate_prepared = False


def refuse_half_precision_engine(trainer: Any) -> None:
    """Raise if DeepSpeed is told to run in half precision, where it casts every parameter, trainable or not.

    Raises:
        ValueError: Names the option and the remedy.
    """
    if not trainer.is_deepspeed_enabled:
        return
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config
    for name in ("bf16", "fp16"):
        enabled = config.get(name, {}).get("enabled", False)
        if enabled is True or getattr(trainer.args, name):
            raise ValueError(
                f"DeepSpeed's `{name}` mode casts the offsets, where small updates are lost: set `{name}=False`, in "
                "the accelerate configuration `mixed_precision: 'no'`, and load the base model in bfloat16 with "
                '`model_init_kwargs={"dtype": "bfloat16"}`.'
            )


def check_can_evaluate(trainer: Any) -> None:
    """Raise if FSDP2 or DeepSpeed has not taken the model yet, which works only together with the optimizer.

    accelerate cannot prepare the model alone for FSDP2; with DeepSpeed the training that follows finds no engine.

    Raises:
        RuntimeError: Says what to do instead.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    uses_fsdp2 = getattr(plugin, "fsdp_version", 1) == 2
    if (uses_fsdp2 or trainer.is_deepspeed_enabled) and not trainer.accelerator._models:
        raise RuntimeError(
            f"Under {'FSDP2' if uses_fsdp2 else 'DeepSpeed'} the model can be evaluated only during and after "
            "`train()`: set `eval_on_start=True` for the score before the first step, or evaluate in one process."
        )


def check_processes_train_together(trainer: Any) -> None:
    """Raise if there are several processes and nothing that averages their gradients.

    Raises:
        RuntimeError: The offsets of the processes would drift apart.
    """
    if trainer.accelerator.num_processes == 1 or is_sharded(trainer):
        return
    if not isinstance(trainer.model_wrapped, DistributedDataParallel):
        raise RuntimeError(
            f"{trainer.accelerator.num_processes} processes run, but `{type(trainer.model_wrapped).__name__}` is not "
            "wrapped in DistributedDataParallel, so each would train offsets of its own: make a new trainer, and "
            "start with `accelerate launch`."
        )


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """`tensor`, frozen, brought together if FSDP2 or DeepSpeed ZeRO-3 has spread it over processes.

    All processes must call this together.
    """
    if isinstance(tensor, distributed.tensor.DTensor):
        return tensor.full_tensor()
    if getattr(getattr(tensor, "ds_status", None), "name", "AVAILABLE") == "AVAILABLE":
        return tensor
    import deepspeed  # type: ignore[import-not-found, unused-ignore]

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().clone()  # the backward pass comes after this block


def whole_head(head: LanguageModelHead) -> LanguageModelHead:
    """`head` with whole tensors; all processes must call this together."""
    return replace(head, weight=whole(head.weight), bias=None if head.bias is None else whole(head.bias))


@torch.no_grad()
def write_parameters(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Set parameters of `model`, whole or spread over processes, to whole `values`, by name and the same everywhere.

    All processes must call this together.

    Raises:
        KeyError: `model` lacks one of them, which is named.
    """
    parameters = {name.replace("_fsdp_wrapped_module.", ""): p for name, p in model.named_parameters()}
    missing = sorted(values.keys() - parameters.keys())
    if missing:
        raise KeyError(f"`{missing[0]}` is not a parameter of the model any more")
    for name, value in values.items():
        parameter = parameters[name]
        value = value.to(parameter.device, parameter.dtype)
        if isinstance(parameter, distributed.tensor.DTensor):
            shards = distributed.tensor.distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(shards)
        elif hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                if distributed.get_rank() == 0:
                    parameter.copy_(value)
        else:
            parameter.copy_(value)
