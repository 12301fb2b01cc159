"""SVF in several processes: replicated (DDP), sharded (FSDP, ZeRO-3), and loaded by the first process only.

Singular bases need whole weights, so the order is: load the model, add the adapter, and hand both to DDP, FSDP or
DeepSpeed. Every process must hold the same base weights by then, as it does after `from_pretrained` (a model with
random weights needs the same seed everywhere). Bases stay whole in every process, also where FSDP shards the weights.

Run in two processes on CPUs with gloo (tests/tuner/test_distributed.py), equal to one process up to rounding:

- DDP, alone and in transformers' Trainer;
- FSDP2 on base weights in float32 and bfloat16 (it wants one dtype for all *trainable* parameters of a group, and
  offsets are all float32), also prepared by accelerate with `cpu_ram_efficient_loading`; FSDP1 with `use_orig_params`;
- DeepSpeed ZeRO-3 (0.19), where `deepspeed` is installed.

A sharded model is saved as Trainer does it, from a full state dict: `model.save_pretrained(folder, state_dict=...)`
with `accelerator.get_state_dict(model)`, or torch's `get_model_state_dict` with `full_state_dict=True`.

Refused, because the result would be wrong: adding an adapter to a model that is sharded already, be it by tensor
parallelism; merging into FSDP's shards; `target_parameters` under ZeRO-3. Not run, for lack of hardware: NCCL (where
the bases of the first process travel through the GPUs), several machines, pipeline and context parallelism. Not
noticed: an adapter that is added after DDP has wrapped the model, whose offsets every process trains for itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import distributed, nn
from transformers.modeling_utils import is_fsdp_enabled  # type: ignore[attr-defined]

from peft_svf.tuner.names import name_in_state_dict


if TYPE_CHECKING:
    from peft_svf.tuner.layer import SVFLayer


# Where the adapted model may be in what DDP is given: in a PeftModel, in an SVFModel, compiled or not.
WRAPPERS = [
    f"{compiled}{wrapper}" for compiled in ("", "_orig_mod.") for wrapper in ("", "model.", "base_model.model.")
]
TENSOR_PARALLEL = "split by tensor parallelism"


def keep_bases_out_of_ddp(model: nn.Module) -> None:
    """Make `DistributedDataParallel` leave the buffers of the adapted layers of `model` alone.

    By default it broadcasts every buffer before every forward pass of training, which here would be a third of the
    base model. It looks for this list in the module that it is given; a [`~peft.PeftModel`] passes that on to `model`.
    """
    buffers = [f"{n}.{b}" for n, m in model.named_modules() for b in m._buffers if b.startswith("svf_")]
    ignored = {wrapper + buffer for wrapper in WRAPPERS for buffer in buffers}
    ignored.update(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    model._ddp_params_and_buffers_to_ignore = sorted(ignored)  # type: ignore[assignment]


def keys_behind_wrappers(model: nn.Module, adapter_name: str) -> dict[str, str]:
    """Offsets that PEFT 0.21 would neither save nor load: their keys in a checkpoint, and those in `model`.

    PEFT, with any method, searches for parameters under the names of modules, and so misses those that FSDP1 or
    activation checkpointing has wrapped.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    hidden = [name_in_state_dict(name) for name in names if name_in_state_dict(name) != name]
    return {f"{name}.svf_offset.weight": f"{name}.svf_offset.{adapter_name}.weight" for name in hidden}


def refuse_sharded_model(model: nn.Module, target_parameters: list[str] | None) -> None:
    """Raise if an adapter cannot be added to `model` because its weights are spread over processes.

    Parameters that are added after sharding would be trained by every process for itself.

    Raises:
        ValueError: FSDP or tensor parallelism has taken the model apart, or DeepSpeed ZeRO-3 has and fused experts are
            to be adapted. Names the first such module and the remedy.
    """
    for name, how in _sharded_modules(model):
        if how == TENSOR_PARALLEL:
            remedy = "load the model without `tp_plan`; FSDP2 shards it in another way"
        else:
            remedy = "load the model whole, add the adapter, and shard it afterwards"
        raise ValueError(f"SVF cannot adapt a model that is sharded already: '{name}' is {how}; {remedy}")
    if hasattr(model, "ds_external_parameters"):
        raise ValueError("SVF cannot adapt a model that DeepSpeed ZeRO-3 runs already: add the adapter before that")
    partitioned = [name for name, parameter in model.named_parameters() if hasattr(parameter, "ds_id")]
    if target_parameters and partitioned:
        raise ValueError(
            f"SVF cannot adapt `target_parameters` under DeepSpeed ZeRO-3, which has partitioned '{partitioned[0]}'; "
            "use FSDP2 or ZeRO-2"
        )


def refuse_merging_into_shards(model: nn.Module) -> None:
    """Raise if the adapters of `model` cannot be merged because its weights are spread over processes.

    Raises:
        ValueError: Names the first such module and the remedy.
    """
    for name, how in _sharded_modules(model):
        raise ValueError(
            f"SVF cannot merge into a sharded model: '{name}' is {how}; save the adapter, and merge it into the base "
            "model outside of this run: `PeftModel.from_pretrained(base_model, <folder>).merge_and_unload()`"
        )
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and any(map(_is_partitioned, module.parameters())):
            raise ValueError(
                f"SVF cannot merge into '{name}', which DeepSpeed ZeRO-3 has partitioned; merge, and unmerge, inside "
                "`with deepspeed.zero.GatheredParameters(list(model.parameters())):`"
            )


def refuse_sharded_weight(name: str, weight: torch.Tensor) -> None:
    """Raise if `weight`, that of the adapted module `name`, is a part of itself.

    Raises:
        ValueError: It is; the message names the module and the remedy.
    """
    if _is_dtensor(weight) or weight.dim() < 2:
        raise ValueError(
            f"SVF cannot read the weight of '{name}', which is spread over processes; save the adapter, and load it "
            "onto the base model outside of this run"
        )


def _sharded_modules(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Sharded modules and how they are: those with a sharded parameter, then those that FSDP runs."""
    if not distributed.is_available():
        return
    for name, parameter in model.named_parameters():
        if _is_dtensor(parameter):
            is_tensor_parallel = "tp" in (parameter.device_mesh.mesh_dim_names or ())  # type: ignore[attr-defined]
            yield name.rpartition(".")[0], TENSOR_PARALLEL if is_tensor_parallel else "sharded by FSDP2 (DTensor)"
        if hasattr(parameter, "_fsdp_flattened"):
            yield name.rpartition(".")[0], "sharded by FSDP"
    for name, module in model.named_modules():
        if hasattr(module, "set_reshard_after_forward"):  # FSDP2, even if between two passes the weights look whole
            yield name or type(module).__name__, "sharded by FSDP2"


def _is_dtensor(tensor: torch.Tensor) -> bool:
    return distributed.is_available() and isinstance(tensor, distributed.tensor.DTensor)


@contextmanager
def gathered(layer: nn.Module) -> Iterator[bool]:
    """Bring the weights of `layer` together for reading, if DeepSpeed ZeRO-3 has partitioned them.

    All processes must enter. Yields whether there was something to gather, which is gone again after the block.

    Raises:
        ValueError: There is, but DeepSpeed cannot be imported.
    """
    partitioned = [parameter for parameter in layer.parameters() if _is_partitioned(parameter)]
    if not partitioned:
        yield False
        return
    try:
        import deepspeed  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ValueError(
            "DeepSpeed ZeRO-3 has partitioned its weight, but `deepspeed` cannot be imported to gather it; install it"
        ) from error
    with deepspeed.zero.GatheredParameters(partitioned):
        yield True


def _is_partitioned(parameter: torch.Tensor) -> bool:
    return getattr(getattr(parameter, "ds_status", None), "name", "AVAILABLE") != "AVAILABLE"


def only_first_process_has_weights() -> bool:
    """Whether FSDP's `cpu_ram_efficient_loading` is on, so that only process 0 needs to have loaded the base model.

    FSDP hands out the weights later, but neither the singular bases nor the fingerprint. So adding an adapter becomes
    something that all processes must do together.
    """
    return is_fsdp_enabled() and distributed.get_world_size() > 1


def run_where_weights_are(action: Callable[[], None]) -> None:
    """Run `action` in every process; in process 0 alone, while the others wait, if only that one has the weights.

    Raises:
        Exception: What `action` raised; in processes that waited, a ValueError with the same message.
    """
    if not only_first_process_has_weights():
        action()
        return
    failure: Exception | None = None
    if distributed.get_rank() == 0:
        try:
            action()
        except Exception as error:  # of any kind: the other processes wait for an answer
            failure = error
    message = _broadcast_text("" if failure is None else str(failure) or type(failure).__name__)
    if failure is not None:
        raise failure
    if message:
        raise ValueError(message)


def share_basis(layer: SVFLayer, compute: Callable[[], None]) -> None:
    """Let every process `compute` the singular basis of its `layer`; if only process 0 has the weights, let that one,
    and give the basis to the same layer in all others.

    Raises:
        Exception: As [`run_where_weights_are`].
    """
    run_where_weights_are(compute)
    if not only_first_process_has_weights():
        return
    is_first = distributed.get_rank() == 0
    header = json.loads(_broadcast_text(json.dumps(_describe_basis(layer)) if is_first else ""))
    vectors = _broadcast_tensor(layer.svf_basis, *header["vectors"])
    singular_values = _broadcast_tensor(layer.svf_singular_values, *header["singular_values"])
    if not is_first:
        device = layer.base_device()
        layer.svf_basis, layer.svf_singular_values = vectors.to(device), singular_values.to(device)
        layer.svf_sketch, layer.svf_basis_source = header["sketch"], header["source"]


def _describe_basis(layer: SVFLayer) -> dict[str, Any]:
    described: dict[str, Any] = {"sketch": layer.svf_sketch, "source": layer.svf_basis_source}
    for key, tensor in {"vectors": layer.svf_basis, "singular_values": layer.svf_singular_values}.items():
        described[key] = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    return described


def _broadcast_tensor(tensor: torch.Tensor | None, shape: list[int], dtype_name: str) -> torch.Tensor:
    """The `tensor` of process 0, on the CPU. As bytes, because not every backend knows every dtype."""
    dtype, device = getattr(torch, dtype_name), _transport_device()
    if tensor is not None and distributed.get_rank() == 0:
        octets = tensor.detach().contiguous().view(-1).view(torch.uint8).to(device)
    else:
        octets = torch.empty(torch.Size(shape).numel() * dtype.itemsize, dtype=torch.uint8, device=device)
    distributed.broadcast(octets, src=0)
    return octets.cpu().view(dtype).view(shape)


def _broadcast_text(text: str) -> str:
    """The `text` of process 0. Not with `broadcast_object_list`, which unpickles."""
    device = _transport_device()
    octets = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    length = torch.tensor([len(octets)], device=device)
    distributed.broadcast(length, src=0)
    if distributed.get_rank() != 0:
        octets = torch.empty(int(length), dtype=torch.uint8, device=device)
    if int(length) > 0:
        distributed.broadcast(octets, src=0)
    return bytes(octets.tolist()).decode()


def _transport_device() -> torch.device:
    """Where a tensor must be for the default process group: NCCL, for one, takes none on the CPU."""
    backends = distributed.get_backend_config()  # like "cpu:gloo,cuda:nccl"
    return torch.device("cpu" if "cpu:" in backends else backends.partition(":")[0])
