"""What the processes of test_distributed.py do, as one program, so that torch is imported once for all of them.

For every line [scenario, number of processes, folder] on its standard input it forks that many processes, runs the
scenario in each, and answers with their exit codes. Every process leaves <rank>.json, <rank>.safetensors (what the
scenario returned) and <rank>.log in the folder.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any


os.environ["OMP_NUM_THREADS"] = "1"
if sys.platform == "linux":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would look up the name of the machine

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, load_fsdp_model, save_fsdp_model
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from peft_svf import SVFConfig
from peft_svf.tuner.layer import SVFLayer


PROCESSES = 2
STEPS, ROWS, LEARNING_RATE = 3, 4, 0.5  # ROWS: of all processes together
TIMEOUT = 60  # seconds, for one scenario

Result = tuple[dict[str, torch.Tensor], dict[str, Any]]


def build_base(seed: int = 0, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """A Llama whose layers are square, tall and wide; k_proj and v_proj work on the output side and have a bias."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        attention_bias=True,
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model.to(dtype)


def adapt(base: LlamaForCausalLM) -> PeftModel:
    return get_peft_model(base, SVFConfig(task_type="CAUSAL_LM"))


def token_ids(step: int) -> torch.Tensor:
    """The batch of one step, shape (ROWS, 12)."""
    return torch.randint(3, 97, (ROWS, 12), generator=torch.Generator().manual_seed(step))


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # Plain gradient descent: unlike Adam, it shows a gradient that is off by a factor.
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


def train(model: nn.Module, rank: int, processes: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Train on this process's share of every batch."""
    optimizer = optimizer or make_optimizer(model)
    for step in range(STEPS):
        ids = token_ids(step)[rank::processes]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def svf_layers(model: nn.Module) -> list[SVFLayer]:
    return [module for module in model.modules() if isinstance(module, SVFLayer)]


def is_merged(model: nn.Module) -> bool:
    return any(layer.merged for layer in svf_layers(model))


def offsets(model: nn.Module) -> dict[str, torch.Tensor]:
    """All offsets in full, by name in the PeftModel."""
    return {
        without_wrappers(name): whole(parameter.detach()).clone()
        for name, parameter in model.named_parameters()
        if "svf_offset" in name
    }


def without_wrappers(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "").replace("_checkpoint_wrapped_module.", "")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def message_of(action: Callable[[], Any]) -> str:
    """The message of the ValueError that `action` raises; empty if it raises none."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return ""


def shard_with_fsdp2(model: PeftModel) -> None:
    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            fully_shard(module)
    fully_shard(model)


def logits(model: nn.Module) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=token_ids(STEPS)).logits


def both_logits(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """The logits of the sharded model, and of the expert that process 0 has saved on a fresh base model."""
    distributed.barrier()
    loaded = PeftModel.from_pretrained(build_base(dtype=dtype), folder / "expert")
    return {"logits.trained": logits(model), "logits.reloaded": logits(loaded)}


def single(rank: int, folder: Path, dtype: torch.dtype = torch.float32) -> Result:
    """The reference: one process, no process group, the whole batch."""
    model = adapt(build_base(dtype=dtype))
    train(model, 0, 1)
    model.save_pretrained(folder / "expert")
    return offsets(model), {}


def ddp(rank: int, folder: Path) -> Result:
    model = adapt(build_base())
    with recorded_broadcasts() as shapes:
        replica = DistributedDataParallel(model)
        train(replica, rank, PROCESSES)
        sent = list(shapes)
    others = {
        "SVFModel": model.base_model,
        "compiled": torch.compile(model),
        "transformers": with_transformers_adapter(build_base()),
    }
    found = {kind: buffers_sent_by_ddp(other) for kind, other in others.items()}
    del model.get_base_model()._ddp_params_and_buffers_to_ignore
    return offsets(model), {"sent": sent, "found": found, "without the list": buffers_sent_by_ddp(model)}


class recorded_broadcasts:
    """The shapes of everything that DDP broadcasts meanwhile."""

    def __enter__(self) -> list[list[int]]:
        self.broadcast, shapes = distributed._broadcast_coalesced, []

        def record(group: object, tensors: list[torch.Tensor], *args: Any) -> None:
            shapes.extend(list(tensor.shape) for tensor in tensors)
            self.broadcast(group, tensors, *args)

        distributed._broadcast_coalesced = record
        return shapes

    def __exit__(self, *args: object) -> None:
        distributed._broadcast_coalesced = self.broadcast


def with_transformers_adapter(base: LlamaForCausalLM) -> LlamaForCausalLM:
    base.add_adapter(SVFConfig())
    return base


def buffers_sent_by_ddp(model: nn.Module) -> list[list[int]]:
    return [list(buffer.shape) for buffer in DistributedDataParallel(model).modules_buffers]


def trainer(rank: int, folder: Path) -> Result:
    """transformers' Trainer. Its processes take consecutive slices of a batch, which makes no difference to a sum."""
    model = adapt(build_base())
    rows = [{"input_ids": row, "labels": row} for step in range(STEPS) for row in token_ids(step)]
    arguments = TrainingArguments(
        output_dir=str(folder / f"trainer_{rank}"),
        use_cpu=True,
        per_device_train_batch_size=ROWS // PROCESSES,
        max_steps=STEPS,
        optim="sgd",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    wrapped = type(trainer.model_wrapped).__name__
    return offsets(model), {"processes": trainer.accelerator.num_processes, "wrapped": wrapped}


def fsdp2(rank: int, folder: Path, dtype: torch.dtype = torch.float32) -> Result:
    model = adapt(build_base(dtype=dtype))
    shard_with_fsdp2(model)
    is_sharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    train(model, rank, PROCESSES)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder / "expert", state_dict=weights)
    facts = {
        "is_sharded": is_sharded,
        "merge": message_of(model.merge_adapter),
        "merge and unload": message_of(model.merge_and_unload),
        "merge one": message_of(svf_layers(model)[0].merge),
        "weight change": message_of(lambda: svf_layers(model)[0].get_delta_weight("default")),
        "add": message_of(lambda: model.add_adapter("second", SVFConfig())),
        "adapters": sorted(model.peft_config),
        "is_merged": is_merged(model),
    }
    return {**offsets(model), **both_logits(model, folder, dtype)}, facts


def fsdp2_keeps_unsharded(rank: int, folder: Path) -> Result:
    """With `reshard_after_forward=False` the weights look whole after a forward pass, but are not to be written to."""
    model = adapt(build_base())
    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            fully_shard(module, reshard_after_forward=False)
    with torch.no_grad():
        model(input_ids=token_ids(0))
    looks_whole = not any(isinstance(layer.get_base_layer().weight, DTensor) for layer in svf_layers(model))
    message = message_of(model.merge_adapter)
    return {}, {"looks_whole": looks_whole, "merge": message, "is_merged": is_merged(model)}


def fsdp1(rank: int, folder: Path) -> Result:
    model = adapt(build_base())
    sharded = FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({LlamaDecoderLayer}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    train(sharded, rank, PROCESSES)
    # `get_model_state_dict` and `offload_to_cpu` crash torch 2.13 on the CPU, whatever the model.
    with FullyShardedDataParallel.state_dict_type(sharded, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
        weights = sharded.state_dict()
    if rank == 0:
        model.save_pretrained(folder / "expert", state_dict=weights)
    facts = {
        "merge": message_of(model.merge_adapter),
        "add": message_of(lambda: model.add_adapter("second", SVFConfig())),
        "adapters": sorted(model.peft_config),
    }
    tensors = both_logits(sharded, folder)
    with FullyShardedDataParallel.summon_full_params(sharded):
        facts["merge whole"] = message_of(model.merge_adapter)
        return {**tensors, **offsets(model)}, {**facts, "is_merged": is_merged(model)}


def sharded_before(rank: int, folder: Path) -> Result:
    """Adapters come too late: FSDP2, FSDP1 and tensor parallelism have taken the base model apart."""
    bases = {}
    bases["FSDP2"] = build_base()
    for layer in bases["FSDP2"].model.layers:
        fully_shard(layer)
    bases["FSDP1"] = build_base()
    FullyShardedDataParallel(bases["FSDP1"], use_orig_params=True, device_id=torch.device("cpu"))
    if rank == 0:
        build_base().save_pretrained(folder / "base")
    distributed.barrier()
    bases["tensor parallel"] = LlamaForCausalLM.from_pretrained(folder / "base", tp_plan="auto")
    facts = {}
    for kind, base in bases.items():
        before = list(base.named_modules())
        message = message_of(lambda base=base: adapt(base))
        facts[kind] = {"message": message, "is_unchanged": list(base.named_modules()) == before}
    return {}, facts


def first_process(rank: int, folder: Path, placeholder: str, activation_checkpointing: bool) -> Result:
    """accelerate's own path with `cpu_ram_efficient_loading`. In process 1 nothing of the base model is real."""
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    base = build_base()
    if rank > 0:
        without_weights(base, placeholder)
    model = adapt(base)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        cpu_ram_efficient_loading=True,
        activation_checkpointing=activation_checkpointing,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # accelerate switches FSDP on only where there are GPUs; everything behind this switch runs on the CPU too.
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    model, optimizer = accelerator.prepare(model, make_optimizer(model))
    is_sharded = all(isinstance(parameter, DTensor) for parameter in model.parameters())
    train(model, rank, PROCESSES, optimizer)
    weights = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        model.save_pretrained(folder / "expert", state_dict=weights)
    sketches = [layer.svf_sketch for layer in svf_layers(model)]
    tensors = {**offsets(model), **bases(model), **both_logits(model, folder)}
    tensors.update({f"resumed.{name}": tensor for name, tensor in resume(accelerator, model, folder).items()})
    return tensors, {"is_sharded": is_sharded, "sketches": sketches}


def resume(accelerator: Accelerator, model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Forget the offsets, and load them from a checkpoint as Trainer writes it, in shards."""
    arguments = accelerator.state.fsdp_plugin, accelerator, model, str(folder)
    save_fsdp_model(*arguments, adapter_only=True)
    for name, parameter in model.named_parameters():
        if "svf_offset" in name:
            nn.init.zeros_(parameter)
    load_fsdp_model(*arguments, adapter_only=True)
    return offsets(model)


def without_weights(base: LlamaForCausalLM, placeholder: str) -> None:
    for module in base.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = parameter.data.to("meta") if placeholder == "meta" else torch.full_like(parameter, torch.nan)
                module._parameters[name] = nn.Parameter(empty)


def bases(model: nn.Module) -> dict[str, torch.Tensor]:
    return {without_wrappers(name): buffer for name, buffer in model.named_buffers() if "svf_" in name}


def first_process_fails(rank: int, folder: Path) -> Result:
    """What goes wrong in process 0 must be an error in every process, and none may wait for another."""
    if rank == 0:
        adapt(build_base()).save_pretrained(folder / "expert")
        ranked = get_peft_model(build_base(), SVFConfig(save_basis=True))
        ranked.save_pretrained(folder / "with_basis")
    distributed.barrier()
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_CPU_RAM_EFFICIENT_LOADING="true")
    zero, other, same, with_basis = build_base(), build_base(seed=1), build_base(), build_base()
    nn.init.zeros_(zero.model.layers[1].mlp.up_proj.weight)
    if rank > 0:
        for base in (zero, other, same, with_basis):
            without_weights(base, "meta")
    facts = {
        "zero weight": message_of(lambda: adapt(zero)),
        "other base": message_of(lambda: PeftModel.from_pretrained(other, folder / "expert")),
    }
    loaded = PeftModel.from_pretrained(same, folder / "expert")
    loaded_with_basis = PeftModel.from_pretrained(with_basis, folder / "with_basis")
    tensors = {f"plain.{name}": tensor for name, tensor in bases(loaded).items()}
    return {**tensors, **{f"saved.{name}": tensor for name, tensor in bases(loaded_with_basis).items()}}, facts


def zero3(rank: int, folder: Path) -> Result:
    """DeepSpeed ZeRO-3. The base model is partitioned from the start, as it is under transformers' Trainer."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    # DeepSpeed would compile a faster collective first, which takes minutes.
    deepspeed.ops.__compatible_ops__.update(deepspeed_shm_comm=False, shm_comm=False)
    deepspeed.init_distributed("gloo")
    if rank == 0:
        build_base().save_pretrained(folder / "base")
        build_base(seed=1).save_pretrained(folder / "other")
    distributed.barrier()
    settings = {
        "train_micro_batch_size_per_gpu": ROWS // PROCESSES,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    kept_alive = HfDeepSpeedConfig(settings)
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    facts: dict[str, Any] = {"is_partitioned": list(base.model.layers[0].mlp.up_proj.weight.shape) == [0]}
    model = adapt(base)
    facts["merge"] = message_of(model.merge_adapter)
    engine, *_ = deepspeed.initialize(model=model, config=settings, optimizer=make_optimizer(model))
    for step in range(STEPS):
        ids = token_ids(step)[rank::PROCESSES]
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    facts["add"] = message_of(lambda: model.add_adapter("second", SVFConfig()))
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        trained = offsets(model)
        weight = svf_layers(model)[0].get_base_layer().weight
        before = weight.clone()
        model.merge_adapter()
        facts["merging changes"] = not torch.equal(weight, before)
        model.unmerge_adapter()
        facts["unmerging restores"] = torch.equal(weight, before)
        if rank == 0:
            model.save_pretrained(folder / "expert")
    distributed.barrier()
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), folder / "expert")
    facts["is_loaded"] = all(torch.equal(trained[name], loaded) for name, loaded in offsets(again).items())
    other = LlamaForCausalLM.from_pretrained(folder / "other")
    facts["other base"] = message_of(lambda: PeftModel.from_pretrained(other, folder / "expert"))
    del kept_alive
    return trained, facts


SCENARIOS: dict[str, Callable[[int, Path], Result]] = {
    "single": single,
    "single_bfloat16": lambda rank, folder: single(rank, folder, torch.bfloat16),
    "ddp": ddp,
    "trainer": trainer,
    "fsdp2": fsdp2,
    "fsdp2_bfloat16": lambda rank, folder: fsdp2(rank, folder, torch.bfloat16),
    "fsdp2_keeps_unsharded": fsdp2_keeps_unsharded,
    "fsdp1": fsdp1,
    "sharded_before": sharded_before,
    "first_process_meta": lambda rank, folder: first_process(rank, folder, "meta", activation_checkpointing=False),
    "first_process_nan": lambda rank, folder: first_process(rank, folder, "nan", activation_checkpointing=True),
    "first_process_fails": first_process_fails,
    "zero3": zero3,
}


def run(scenario: str, rank: int, processes: int, folder: Path) -> None:
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    if processes > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes)
        )
        rendezvous = f"file://{folder / 'rendezvous'}"
        distributed.init_process_group(
            "gloo", init_method=rendezvous, rank=rank, world_size=processes, timeout=timedelta(seconds=TIMEOUT)
        )
    try:
        tensors, facts = SCENARIOS[scenario](rank, folder)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once: the others must not wait for this process
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{rank}.safetensors")
    (folder / f"{rank}.json").write_text(json.dumps(facts))
    if processes > 1:
        distributed.barrier()
    os._exit(0)  # without the clean-up of libraries, which takes seconds and may wait for the other process


def main() -> None:
    context = multiprocessing.get_context("fork")  # safe here: nothing has started a thread yet
    for line in sys.stdin:
        scenario, processes, folder = json.loads(line)
        children = [
            context.Process(target=run, args=(scenario, rank, processes, Path(folder))) for rank in range(processes)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(TIMEOUT)
        for child in children:
            child.kill()
        print(json.dumps([child.exitcode for child in children]), flush=True)  # noqa: T201
    os._exit(0)


if __name__ == "__main__":
    main()
