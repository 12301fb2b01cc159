"""How many answers one generate call can hold, and `steps_per_generation` chosen so that it fits.

TRL lets one call make all answers of an optimizer step: 256 at once on one GPU for the paper's batch. What an answer
takes is estimated from the model's configuration and the longest prompts, what is there is asked of the device.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]
import torch
from datasets import Dataset
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState
from trl import GRPOTrainer, prepare_multimodal_messages


logger = logging.getLogger(__name__)

# Share of the free memory that is planned with. The rest is for what no configuration tells: the allocator's leftovers
# of a cache that grows by one token at a time, attention kernels, longer prompts than those that were looked at.
SHARE_OF_FREE_MEMORY = 0.5
PROMPTS_LOOKED_AT = 2048
PROMPTS_TOKENIZED = 32
GIB = 2**30


def cache_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """Bytes of the key-value cache of one answer.

    Args:
        config (`PreTrainedConfig`): Of the language model.
        tokens (`int`): Prompt and answer.
        itemsize (`int`): Bytes of a number: 2 for bfloat16.
    """
    layers = config.num_hidden_layers
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    attends = getattr(config, "num_attention_heads", None) is not None  # Mamba and its like do not
    kind_of_all = ("sliding_attention" if window else "full_attention") if attends else "mamba"
    types = getattr(config, "layer_types", None) or [kind_of_all] * layers
    per_token = _key_value_numbers(config) * itemsize if attends else 0
    total = 0
    for kind in types[: layers - (getattr(config, "num_kv_shared_layers", None) or 0)]:  # Gemma 3n, 4: the last share
        if kind in ("moe", "mlp"):
            continue
        if kind in ("linear_attention", "mamba", "conv", "hybrid"):
            total += _state_numbers(config) * 4  # recurrent states are kept in float32
        if kind not in ("linear_attention", "mamba", "conv"):
            total += per_token * (min(tokens, window) if window and ("sliding" in kind or "chunk" in kind) else tokens)
    return total


def _key_value_numbers(config: Any) -> int:
    """Keys and values of one token in one layer; in the widest layer where they differ."""
    heads = config.num_attention_heads
    rope_dim = getattr(config, "qk_rope_head_dim", None)
    if rope_dim is not None:  # latent attention (DeepSeek): whole, as transformers cached it until it took the latent
        return int(heads * (getattr(config, "qk_nope_head_dim", 0) + rope_dim + config.v_head_dim))
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    if getattr(config, "multi_query", False):  # GPT-BigCode, Falcon
        key_value_heads = 1
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    head_dim = max(head_dim, getattr(config, "global_head_dim", None) or 0)
    return int(2 * key_value_heads * head_dim)


def _state_numbers(config: Any) -> int:
    """State of one recurrent layer, whatever the length; an upper bound where architectures differ."""

    def product(*names: str) -> int:
        numbers = [getattr(config, name, None) or 0 for name in names]
        result = 1
        for number in numbers:
            result *= int(number)
        return result

    kernel = max(int(getattr(config, name, None) or 4) for name in ("linear_conv_kernel_dim", "mamba_d_conv"))
    kernel = max(kernel, int(getattr(config, "conv_L_cache", None) or 0))
    width = max(
        2 * product("linear_num_key_heads", "linear_key_head_dim")
        + product("linear_num_value_heads", "linear_value_head_dim"),
        product("mamba_expand", "hidden_size") + 2 * product("mamba_n_groups", "mamba_d_state"),
        product("expand", "hidden_size") + 2 * product("n_groups", "state_size"),
        int(config.hidden_size),
    )
    recurrent = max(
        product("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
        product("mamba_n_heads", "mamba_d_head", "mamba_d_state"),
        product("mamba_expand", "hidden_size", "mamba_d_state"),
        product("expand", "hidden_size", "state_size"),
    )
    return width * kernel + recurrent


def answer_bytes(
    config: Any, prompt_tokens: int, answer_tokens: int, itemsize: int, whole_prompt_logits: bool = False
) -> int:
    """Bytes that one answer adds to a generate call at its peak: reading the prompt, or writing the last token.

    Args:
        config (`PreTrainedConfig`): Of the model.
        prompt_tokens (`int`): Tokens of the prompt, padding included.
        answer_tokens (`int`): Tokens of the answer, at most.
        itemsize (`int`): Bytes of a number of the model: 2 for bfloat16.
        whole_prompt_logits (`bool`, *optional*, defaults to `False`):
            Whether the model computes logits for the whole prompt, as those without `logits_to_keep` do.
    """
    text = config.get_text_config(decoder=True)
    logits = text.vocab_size * (itemsize + 6 * 4)  # in float32: logits, scores, probabilities, noise and the like
    cache = cache_bytes(text, prompt_tokens + answer_tokens, itemsize)
    last_token = cache + cache // text.num_hidden_layers + logits  # a layer's cache grows by making a new one

    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    experts = getattr(text, "num_experts_per_tok", None) or getattr(text, "top_k_experts", None) or 0
    inner = max(inner, experts * (getattr(text, "moe_intermediate_size", None) or inner))
    activations = prompt_tokens * (6 * text.hidden_size + 3 * inner) * itemsize
    attention = prompt_tokens**2  # the mask
    if getattr(text, "_attn_implementation", None) == "eager":
        attention *= (getattr(text, "num_attention_heads", None) or 1) * (itemsize + 4)
    if whole_prompt_logits:
        logits += prompt_tokens * text.vocab_size * itemsize
    reading = cache_bytes(text, prompt_tokens, itemsize) + activations + attention + logits
    return max(last_token, reading)


def merged_copy_bytes(layers: list[BaseTunerLayer], itemsize: int) -> int:
    """Bytes of the merged weights, which stand beside the original ones while answers are generated."""
    return sum(layer.out_features * layer.in_features * _matrices(layer) for layer in layers) * itemsize


def _matrices(layer: Any) -> int:
    return int(torch.Size(getattr(layer, "stack", ())).numel())


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still use on `device`: what is free, and what torch holds without need."""
    backend = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(backend, "mem_get_info"):
        unused = backend.memory_reserved(device) - backend.memory_allocated(device)  # type: ignore[union-attr]
        return int(backend.mem_get_info(device)[0] + unused)  # type: ignore[union-attr]
    free = min([psutil.virtual_memory().available, *_container_limit()])
    return int(free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _container_limit(folder: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """What a container may still use, if it has a limit: psutil only knows the machine."""
    try:
        limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no such file, or "max"
        return []
    return [max(0, limit - used)]


def longest_prompt(trainer: Any) -> int:
    """Tokens of the longest prompt, as TRL renders them, among those of a sample with the most characters."""
    dataset = trainer.train_dataset
    if isinstance(dataset, Dataset):
        sample = list(range(0, len(dataset), -(-len(dataset) // PROMPTS_LOOKED_AT)))
        if "prompt" in dataset.column_names:
            texts = dataset.select_columns("prompt").select(sample)
            lengths = {i: len(str(row["prompt"])) for i, row in zip(sample, texts, strict=True)}
            sample = sorted(lengths, key=lambda i: -lengths[i])
        rows = [dataset[i] for i in sample[:PROMPTS_TOKENIZED]]
    else:
        rows = list(dataset.take(PROMPTS_TOKENIZED))
    prompts = [copy.deepcopy(row.get("prompt", [{"role": "user", "content": ""}])) for row in rows]
    for i, row in enumerate(rows):
        images = row.get("images") or ([row["image"]] if row.get("image") is not None else None)
        if images:
            prompts[i] = prepare_multimodal_messages(prompts[i], images=images)
    if getattr(trainer, "environment_factories", None) is not None:  # prompts are rendered with their tools
        trainer._batch_environments = [row.get("environment") if trainer._multi_environment else None for row in rows]
    return max(len(ids) for ids in trainer._tokenize_prompts(prompts)[0])


class StepsPerGenerationRecord(TrainerCallback, ExportableState):
    """Keeps the number in use in `trainer_state.json`, so that a resumed run generates the same batches.

    Args:
        steps_per_generation (`int`, *optional*): The number.
        batches (`list[int]`, *optional*): What it was chosen for: micro-batch, accumulation and processes.
    """

    def __init__(self, steps_per_generation: int = 1, batches: list[int] | None = None) -> None:
        self.steps_per_generation = steps_per_generation
        self.batches = batches or []

    def state(self) -> dict[str, Any]:
        return {"args": {"steps_per_generation": self.steps_per_generation, "batches": self.batches}, "attributes": {}}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # A checkpoint without the entry would make transformers fail at the next one.
        state.stateful_callbacks[type(self).__name__] = self.state()  # type: ignore[index, call-overload]


class StepsPerGenerationThatFit(GRPOTrainer):
    """Mixin: where the user set neither `steps_per_generation` nor `generation_batch_size`, choose it by memory.

    The largest divisor of `gradient_accumulation_steps` with which the answers of one generate call fit into half of
    the free memory, on the process with the least. `baseline="batch"` is then the mean of fewer answers, N in all
    processes, which stays unbiased and makes the variance N / (N − 1) times that of an exact mean: memory comes first.
    A run that is resumed keeps the number of its checkpoint. vLLM and `rollout_func` manage memory themselves.

    `args` has the number while training lasts and is as before afterwards.
    """

    _adapter_layers: list[BaseTunerLayer]
    _generates_merged: bool

    def _inner_training_loop(self, *args: Any, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:
        with self._steps_that_fit(resume_from_checkpoint):
            return super()._inner_training_loop(*args, resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    @contextlib.contextmanager
    def _steps_that_fit(self, checkpoint: str | None) -> Iterator[None]:
        args = self.args
        before = args.steps_per_generation, args.generation_batch_size
        is_free = args.chooses_steps_per_generation and before[0] == args.gradient_accumulation_steps
        if is_free and not self.use_vllm and self.rollout_func is None:
            args.steps_per_generation = self._recorded_steps(checkpoint) or self._choose_steps()
            args.generation_batch_size = self._answers_per_step() * args.steps_per_generation
        self.callback_handler.pop_callback(StepsPerGenerationRecord)
        self.add_callback(StepsPerGenerationRecord(args.steps_per_generation, self._batches()))
        try:
            yield
        finally:
            args.steps_per_generation, args.generation_batch_size = before

    def _batches(self) -> list[int]:
        args = self.args
        return [args.per_device_train_batch_size, args.gradient_accumulation_steps, self.accelerator.num_processes]

    def _answers_per_step(self) -> int:
        return int(self.args.per_device_train_batch_size * self.accelerator.num_processes)

    def _recorded_steps(self, checkpoint: str | None) -> int | None:
        """What the run that is resumed used, if it has the same batches."""
        path = None if checkpoint is None else Path(checkpoint) / "trainer_state.json"
        if path is None or not path.is_file():
            return None
        callbacks: Any = TrainerState.load_from_json(str(path)).stateful_callbacks
        entry = callbacks.get(StepsPerGenerationRecord.__name__)
        record = entry["args"] if isinstance(entry, dict) else {}
        if record.get("batches") != self._batches():
            return None
        steps = int(record["steps_per_generation"])
        self._inform(f"`steps_per_generation` is {steps}, as in the checkpoint that is resumed.")
        return steps

    def _choose_steps(self) -> int:
        args = self.args
        micro_batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        complete = args.num_generations if args.num_generations > 1 or args.baseline != "batch" else 2
        possible = [
            steps
            for steps in range(1, accumulation + 1)
            if accumulation % steps == 0
            and self._answers_per_step() * steps >= complete
            and self._answers_per_step() * steps % args.num_generations == 0
        ]
        model = self.accelerator.unwrap_model(self.model)
        prompt, answer = longest_prompt(self), self.max_completion_length
        one = answer_bytes(model.config, prompt, answer, model.dtype.itemsize, not _keeps_logits(model))
        budget = SHARE_OF_FREE_MEMORY * self._free_for_answers(model)
        fitting = self.accelerator.gather(torch.tensor([max(0, int(budget // one))], device=self.accelerator.device))
        fit = int(fitting.min())
        steps = max([steps for steps in possible if steps * micro_batch <= fit], default=possible[0])
        facts = (
            f"an answer (prompt of up to {prompt} tokens, `max_completion_length={answer}`) takes about "
            f"{one / GIB:.3g} GiB, and {SHARE_OF_FREE_MEMORY:.0%} of the free memory, {budget / GIB:.3g} GiB, holds "
            f"{fit} on the process with the least"
        )
        if steps * micro_batch > fit:
            self._warn(
                f"Generation may run out of memory: a call makes at least {steps * micro_batch} answers, but "
                f"{facts}. Lower `per_device_train_batch_size` (and raise `gradient_accumulation_steps` as much), "
                "or `max_completion_length`."
            )
        self._inform(
            f"`steps_per_generation` is {steps} of {accumulation}: one generate call makes {steps * micro_batch} "
            f"answers per process, because {facts}. Set `steps_per_generation` to decide yourself."
        )
        return steps

    def _free_for_answers(self, model: Any) -> int:
        """Bytes free for answers once all weights, and the merged ones, are on the device."""
        device = self.accelerator.device
        missing = [p.nbytes for p in model.parameters() if p.device.type != device.type]  # FSDP moves shards later
        buffers = [b.nbytes for b in model.buffers() if b.device.type != device.type]
        free = free_bytes(device) - sum(missing) // self.accelerator.num_processes - sum(buffers)
        if self._generates_merged:
            free -= merged_copy_bytes(self._adapter_layers, model.dtype.itemsize)
        return free

    def _inform(self, message: str) -> None:
        if self.accelerator.is_main_process:
            logger.info(message)

    def _warn(self, message: str) -> None:
        if self.accelerator.is_main_process:
            logger.warning(message)


def _keeps_logits(model: Any) -> bool:
    """Whether the model can be told to compute logits for the last token only, as `generate` does."""
    base = model.get_base_model()
    return "logits_to_keep" in inspect.signature(type(base).forward).parameters
