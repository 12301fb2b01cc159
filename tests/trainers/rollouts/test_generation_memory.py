"""What an answer takes in memory, against caches and allocations that were made, and the number chosen from it."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from peft_svf.trainers import SVFPolicyGradientTrainer
from peft_svf.trainers.rollouts import generation_memory
from peft_svf.trainers.rollouts.generation_memory import GIB, answer_bytes, cache_bytes, free_bytes, longest_prompt


MakeTrainer = Callable[..., SVFPolicyGradientTrainer]
SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
LAYERS: dict[str, Any] = {**SIZES, "num_hidden_layers": 4, "num_key_value_heads": 2}
MOE: dict[str, Any] = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ALTERNATING = ["sliding_attention", "full_attention"] * 2
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
LATENT: dict[str, Any] = {
    **SIZES,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "grouped queries": lambda: LlamaForCausalLM(LlamaConfig(**LAYERS)),
    "own head size": lambda: LlamaForCausalLM(LlamaConfig(**LAYERS, head_dim=48)),
    "GPT-2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=64, n_layer=4, n_head=4)),
    "sliding window": lambda: MistralForCausalLM(MistralConfig(**LAYERS, sliding_window=8)),
    "sliding and full": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **LAYERS, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"] * 2
        )
    ),
    "experts": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**LAYERS, **MOE)),
}
BOUNDED: dict[str, tuple[Callable[[], PreTrainedModel], float]] = {
    "linear attention": (lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**LAYERS, **MOE, **LINEAR)), 3),
    "convolutions": (lambda: Lfm2ForCausalLM(Lfm2Config(**LAYERS, layer_types=["conv", "full_attention"] * 2)), 3),
    # Up to some version, transformers cached keys and values, 160 numbers here, instead of the latent of 24.
    "latent attention": (lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**LATENT)), 160 / 24),
}


def cache_of(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of the tensors in the cache after `tokens` tokens, one at a time as in generation."""
    past: Any = None
    seen: dict[int, int] = {}
    with torch.no_grad():
        for _ in range(tokens):
            past = model.eval()(input_ids=torch.tensor([[5]]), past_key_values=past, use_cache=True).past_key_values

    def visit(value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            seen[value.data_ptr()] = value.nbytes
        elif isinstance(value, dict):
            for part in value.values():
                visit(part)

    for layer in past.layers:
        visit(vars(layer))
    return sum(seen.values())


@pytest.mark.parametrize("tokens", [5, 20])
@pytest.mark.parametrize("kind", MODELS)
def test_cache_is_as_large_as_the_one_transformers_makes(kind: str, tokens: int) -> None:
    model = MODELS[kind]()
    made = cache_of(model, tokens)
    assert made <= cache_bytes(model.config, tokens, 4) <= made * 8 / 7  # a window keeps one token less than its size


@pytest.mark.parametrize("kind", BOUNDED)
def test_other_caches_are_not_underestimated(kind: str) -> None:
    build, factor = BOUNDED[kind]
    model = build()
    for tokens in (5, 40):
        made = cache_of(model, tokens)
        assert made <= cache_bytes(model.config, tokens, 4) <= factor * made


class PeakMemory(TorchDispatchMode):
    """The largest sum of bytes that were alive at once, of tensors made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


WIDE: dict[str, Any] = {**LAYERS, "hidden_size": 128, "intermediate_size": 384, "max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("build", "prompt", "answer"),
    [
        (lambda: LlamaForCausalLM(LlamaConfig(**WIDE)), 8, 48),
        (lambda: LlamaForCausalLM(LlamaConfig(**WIDE)), 200, 4),
        (lambda: LlamaForCausalLM(LlamaConfig(**{**WIDE, "vocab_size": 6000})), 8, 8),
        (lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**WIDE, **MOE})), 100, 16),
    ],
    ids=["long answers", "long prompts", "large vocabulary", "experts"],
)
def test_estimate_covers_what_generate_allocates(build: Callable[[], Any], prompt: int, answer: int) -> None:
    model = build().eval()
    peaks = []
    for batch in (4, 12):
        with PeakMemory() as memory, torch.no_grad():
            ids = torch.randint(3, 97, (batch, prompt))
            model.generate(ids, do_sample=True, min_new_tokens=answer, max_new_tokens=answer, pad_token_id=0)
        peaks.append(memory.peak)
    allocated = (peaks[1] - peaks[0]) / 8  # of one more answer
    assert allocated <= answer_bytes(model.config, prompt, answer, 4) <= 4 * allocated


def test_full_logits_of_the_prompt_are_counted_where_a_model_makes_them() -> None:
    config = LlamaConfig(**WIDE)
    last, whole = (answer_bytes(config, 400, 8, 2, whole_prompt_logits=whole) for whole in (False, True))
    assert whole - last == 400 * config.vocab_size * 2


def test_merged_weights_take_their_room(make_trainer: MakeTrainer, tiny: SimpleNamespace) -> None:
    trainer = make_trainer()
    weights = sum(layer.get_base_layer().weight.nbytes for layer in trainer._adapter_layers)
    assert generation_memory.merged_copy_bytes(trainer._adapter_layers, 4) == weights


# -- what is free -----------------------------------------------------------------------------------------------------
def test_free_memory_of_the_machine_is_shared_by_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation_memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=12 * GIB))
    monkeypatch.setattr(generation_memory, "_container_limit", lambda: [8 * GIB])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert free_bytes(torch.device("cpu")) == 8 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes(torch.device("cpu")) == 2 * GIB


def test_free_memory_of_a_gpu_includes_what_torch_holds_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"mem_get_info": (5 * GIB, 80 * GIB), "memory_reserved": 30 * GIB, "memory_allocated": 20 * GIB}
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(torch.device("cuda")) == 15 * GIB


@pytest.mark.parametrize(("limit", "expected"), [("1000\n", [400]), ("max\n", []), (None, [])])
def test_limit_of_a_container(tmp_path: Path, limit: str | None, expected: list[int]) -> None:
    if limit is not None:
        (tmp_path / "memory.max").write_text(limit)
        (tmp_path / "memory.current").write_text("600\n")
    assert generation_memory._container_limit(tmp_path) == expected


# -- how long prompts are ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("as_stream", [False, True])
def test_longest_prompt_is_the_one_trl_renders(
    make_trainer: MakeTrainer, tiny: SimpleNamespace, as_stream: bool
) -> None:
    words = ["1"] * 64
    words[50 if not as_stream else 20] = "1 + 2 = ? " * 5
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in words])
    trainer = make_trainer({"train_dataset": rows.to_iterable_dataset() if as_stream else rows}, max_steps=1)
    # <|user|>, 25 words, <|end|>, <|assistant|>
    assert longest_prompt(trainer) == 28


# -- the choice -------------------------------------------------------------------------------------------------------
class Fake:
    """A machine on which one answer takes 1 GiB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(generation_memory, "answer_bytes", lambda *args: GIB)
        monkeypatch.setattr(generation_memory, "merged_copy_bytes", lambda *args: 0)

    def holds(self, answers: int) -> None:
        free = int(answers * GIB / generation_memory.SHARE_OF_FREE_MEMORY)
        self.monkeypatch.setattr(generation_memory, "free_bytes", lambda device: free)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(monkeypatch)


def calls_of_generate(trainer: SVFPolicyGradientTrainer) -> list[int]:
    """Answers of every generate call in training."""
    sizes: list[int] = []
    generate = trainer.model.generate

    def count(*args: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs["input_ids"]))
        return generate(*args, **kwargs)

    trainer.model.generate = count
    return sizes


ACCUMULATE: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 12, "max_steps": 1}


@pytest.mark.parametrize(
    ("holds", "options", "steps"),
    [
        (24, {}, 12),
        (1000, {}, 12),
        (23, {}, 6),
        (11, {}, 4),
        (2, {}, 1),
        (9, {"num_generations": 8, "baseline": "group"}, 4),  # whole groups
        (2, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, 2),
        (1, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "baseline": "none"}, 1),
    ],
)
def test_the_largest_divisor_that_fits_is_used(
    make_trainer: MakeTrainer, machine: Fake, holds: int, options: dict[str, Any], steps: int
) -> None:
    machine.holds(holds)
    trainer = make_trainer(**{**ACCUMULATE, **options})
    before = trainer.args.steps_per_generation, trainer.args.generation_batch_size
    sizes = calls_of_generate(trainer)
    trainer.train()
    args = trainer.args
    assert sizes == [args.per_device_train_batch_size * steps] * (args.gradient_accumulation_steps // steps)
    assert (args.steps_per_generation, args.generation_batch_size) == before  # the user's object


@pytest.mark.parametrize("explicit", [{"steps_per_generation": 12}, {"generation_batch_size": 12}])
def test_what_the_user_sets_is_never_touched(
    make_trainer: MakeTrainer, machine: Fake, explicit: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    machine.holds(2)
    trainer = make_trainer(**ACCUMULATE, **explicit)
    sizes = calls_of_generate(trainer)
    with caplog.at_level(logging.INFO):
        trainer.train()
    assert sizes == [24] if "steps_per_generation" in explicit else [12, 12]
    assert "steps_per_generation" not in caplog.text


def test_the_log_says_what_was_chosen_and_why(
    make_trainer: MakeTrainer, machine: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    machine.holds(11)
    trainer = make_trainer(**ACCUMULATE)
    with caplog.at_level(logging.INFO, logger=generation_memory.__name__):
        trainer.train()
    (line,) = [r for r in caplog.records if "steps_per_generation" in r.message]
    assert line.levelno == logging.INFO
    assert "`steps_per_generation` is 4 of 12: one generate call makes 8 answers" in line.message
    assert "1 GiB" in line.message and "holds 11" in line.message


def test_a_micro_batch_that_does_not_fit_warns_with_numbers_and_remedies(
    make_trainer: MakeTrainer, machine: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    machine.holds(3)
    trainer = make_trainer(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1)
    trainer.train()
    (line,) = [r.message for r in caplog.records if "may run out of memory" in r.message]
    assert "4 answers" in line and "holds 3" in line
    assert "`per_device_train_batch_size`" in line and "`max_completion_length`" in line


def test_merged_weights_and_answers_share_what_is_free(
    make_trainer: MakeTrainer, machine: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.holds(24)
    monkeypatch.setattr(generation_memory, "merged_copy_bytes", lambda *args: 24 * GIB)  # half of what is free
    trainer = make_trainer(**ACCUMULATE)
    sizes = calls_of_generate(trainer)
    trainer.train()
    assert sizes == [12, 12]


def test_the_process_with_the_least_memory_decides(
    make_trainer: MakeTrainer, machine: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.holds(24)
    trainer = make_trainer(**ACCUMULATE)
    monkeypatch.setattr(trainer.accelerator, "gather", lambda own: torch.cat([own, torch.tensor([11])]))
    assert trainer._choose_steps() == 4


def offsets(trainer: SVFPolicyGradientTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


def test_a_resumed_run_generates_the_batches_of_its_checkpoint(
    make_trainer: MakeTrainer, machine: Fake, tiny: SimpleNamespace, tmp_path: Path
) -> None:
    options = {**ACCUMULATE, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    data = {"train_dataset": tiny.prompts(96)}  # four steps an epoch
    machine.holds(11)
    whole = make_trainer(data, **options)
    whole.train()
    machine.holds(1000)  # more memory is free when the run is resumed
    resumed = make_trainer(data, **options)
    sizes = calls_of_generate(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert sizes == [8] * 6
    assert torch.equal(offsets(whole), offsets(resumed))
    again = make_trainer(data, **options)  # and what it saved itself can be resumed
    machine.holds(2)
    sizes = calls_of_generate(again)
    again.args.max_steps = 5
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert sizes == [8] * 3


@pytest.mark.parametrize("damage", ["no entry", "other batches"])
def test_a_checkpoint_that_does_not_tell_is_resumed_with_a_new_choice(
    make_trainer: MakeTrainer, machine: Fake, tmp_path: Path, damage: str
) -> None:
    options = {**ACCUMULATE, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    machine.holds(11)
    make_trainer(**options).train()
    path = tmp_path / "run" / "checkpoint-1" / "trainer_state.json"
    if damage == "no entry":
        state = json.loads(path.read_text())
        del state["stateful_callbacks"]["StepsPerGenerationRecord"]
        path.write_text(json.dumps(state))
    else:
        options["gradient_accumulation_steps"] = 6
    machine.holds(1000)
    trainer = make_trainer(**options)
    sizes = calls_of_generate(trainer)
    trainer.train(resume_from_checkpoint=str(path.parent))
    assert sizes == [2 * options["gradient_accumulation_steps"]]


def test_one_trainer_chooses_anew_in_every_training(make_trainer: MakeTrainer, machine: Fake) -> None:
    trainer = make_trainer(**ACCUMULATE)
    sizes = calls_of_generate(trainer)
    for holds in (2, 24):
        machine.holds(holds)
        trainer.train()
    assert sizes == [2] * 12 + [24]


def test_weights_that_fsdp_moves_later_are_not_free_memory(
    make_trainer: MakeTrainer, machine: Fake, tiny: SimpleNamespace
) -> None:
    machine.holds(24)
    trainer = make_trainer()
    free = trainer._free_for_answers(trainer.model)
    elsewhere = tiny.model().to("meta")
    weights = sum(parameter.nbytes for parameter in elsewhere.parameters())
    assert free == 48 * GIB
    assert free - weights >= trainer._free_for_answers(elsewhere) >= free - weights - 1024  # and the few buffers
