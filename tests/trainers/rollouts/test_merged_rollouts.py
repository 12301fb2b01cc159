"""Answers come from merged weights, the base weights come back bit for bit, and the policy that answers is scored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerCallback,
)

from peft_svf import SVFConfig
from peft_svf.trainers import SVFPolicyGradientTrainer


MakeTrainer = Callable[..., SVFPolicyGradientTrainer]
SIZES: dict[str, Any] = {"vocab_size": 28, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
LLAMA: dict[str, Any] = {
    **SIZES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llama(**options: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, "initializer_range": 0.2, **options}))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, **SIZES))


def qwen_moe() -> PreTrainedModel:
    experts: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**LLAMA, **experts, num_key_value_heads=2, initializer_range=0.2))


FUSED = SVFConfig(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], SVFConfig]] = {
    "Llama": (llama, SVFConfig()),
    "Llama in bfloat16": (lambda: llama().to(torch.bfloat16), SVFConfig()),
    "Llama with tied embeddings": (lambda: llama(tie_word_embeddings=True), SVFConfig()),
    "GPT-2 (Conv1D, tied)": (gpt2, SVFConfig()),
    "GPT-2 in bfloat16": (lambda: gpt2().to(torch.bfloat16), SVFConfig()),
    "Qwen3-MoE with fused experts": (qwen_moe, FUSED),
}


def rollout(trainer: SVFPolicyGradientTrainer, n: int = 16) -> dict[str, Any]:
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer._generate_and_score_completions([trainer.train_dataset[i] for i in range(n)])


def frozen_bits(trainer: SVFPolicyGradientTrainer) -> dict[str, tuple[int, Tensor]]:
    """Everything that is not trained, with the address of its memory: the same tensors, not equal ones."""
    state = {**dict(trainer.model.named_parameters()), **dict(trainer.model.named_buffers())}
    return {name: (t.data_ptr(), t.detach().clone()) for name, t in state.items() if not t.requires_grad}


def assert_same_bits(before: dict[str, tuple[int, Tensor]], after: dict[str, tuple[int, Tensor]]) -> None:
    assert before.keys() == after.keys()
    for name, (address, tensor) in before.items():
        assert after[name][0] == address and torch.equal(after[name][1], tensor), name


def spy_on_generate(trainer: SVFPolicyGradientTrainer, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry for each call of `generate`: whether every adapted layer was merged."""
    generate, merged = trainer.model.generate, []

    def spy(*args: Any, **kwargs: Any) -> Any:
        merged.append(all(layer.merged for layer in trainer._adapter_layers))
        return generate(*args, **kwargs)

    monkeypatch.setattr(trainer.model, "generate", spy)
    return merged


@pytest.mark.parametrize("kind", MODELS)
def test_base_weights_are_the_same_tensors_after_training_and_evaluation(
    make_trainer: MakeTrainer, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    torch.manual_seed(0)
    build, config = MODELS[kind]
    trainer = make_trainer({"model": build(), "peft_config": config}, max_steps=2, learning_rate=0.1)
    tiny.randomize_offsets(trainer.model)
    merged, before = spy_on_generate(trainer, monkeypatch), frozen_bits(trainer)
    trainer.train()
    trainer.evaluate()
    assert len(merged) >= 3 and all(merged)
    assert_same_bits(before, frozen_bits(trainer))


@pytest.mark.parametrize("kind", ["Llama", "GPT-2 (Conv1D, tied)", "Qwen3-MoE with fused experts"])
def test_the_policy_that_answers_is_the_one_that_is_scored(
    make_trainer: MakeTrainer, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Log-probabilities of the answers, from the logits `generate` drew them from, against those in the loss."""
    torch.manual_seed(0)
    build, config = MODELS[kind]
    trainer = make_trainer({"model": build(), "peft_config": config}, per_device_train_batch_size=4)
    tiny.randomize_offsets(trainer.model)
    drawn: list[Tensor] = []
    generate = trainer.model.generate

    def generate_with_logits(*args: Any, generation_config: Any, **kwargs: Any) -> Tensor:
        config = copy.deepcopy(generation_config)
        config.return_dict_in_generate = config.output_logits = True
        output = generate(*args, generation_config=config, **kwargs)
        drawn.append(torch.stack(output.logits, dim=1))  # (B, T, vocabulary)
        return output.sequences

    monkeypatch.setattr(trainer.model, "generate", generate_with_logits)
    batch = rollout(trainer, 4)
    answers, valid = batch["completion_ids"], batch["completion_mask"].bool()
    scored = trainer._score(trainer.model, batch, valid).log_probs
    expected = drawn[0][:, : answers.size(1)].log_softmax(-1).gather(-1, answers.unsqueeze(-1)).squeeze(-1)[valid]
    torch.testing.assert_close(scored, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, SystemExit])
@pytest.mark.parametrize("where", ["generate", "in the middle of merging"])
def test_weights_are_put_back_after_any_interruption(
    make_trainer: MakeTrainer,
    tiny: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
    error: type[BaseException],
    where: str,
) -> None:
    trainer = make_trainer()
    tiny.randomize_offsets(trainer.model)
    before = frozen_bits(trainer)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    layer = trainer._adapter_layers[3]
    monkeypatch.setattr(*(trainer.model, "generate", fail) if where == "generate" else (layer, "merge", fail))
    recwarn.clear()
    with pytest.raises(error):
        rollout(trainer)
    assert_same_bits(before, frozen_bits(trainer))
    assert not any(layer.merged for layer in trainer._adapter_layers)
    assert not [w for w in recwarn if "unmerged" in str(w.message)]
    monkeypatch.undo()
    rollout(trainer)  # and the trainer still works


def test_an_adapter_merged_by_somebody_else_is_refused_not_unmerged(make_trainer: MakeTrainer) -> None:
    class Merge(TrainerCallback):
        def on_step_end(self, *args: Any, model: PeftModel, **kwargs: Any) -> None:
            model.merge_adapter()

    trainer = make_trainer({"callbacks": [Merge()]}, max_steps=2)
    with pytest.raises(RuntimeError, match=r"call `model.unmerge_adapter\(\)` first"):
        trainer.train()
    assert all(layer.merged for layer in trainer._adapter_layers)


def test_an_adapter_of_another_name_and_several_at_once_answer_as_they_are_scored(
    make_trainer: MakeTrainer, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_peft_model(tiny.model(), SVFConfig(), adapter_name="math")
    model.add_adapter("style", SVFConfig())
    model.base_model.set_adapter(["math", "style"])
    trainer = make_trainer({"model": model, "peft_config": None}, max_steps=1, learning_rate=0.1)
    tiny.randomize_offsets(trainer.model)
    probes = torch.arange(3, 11).unsqueeze(0)
    unmerged = trainer.model(input_ids=probes).logits.detach()
    seen: list[Tensor] = []
    generate = trainer.model.generate

    def look(*args: Any, **kwargs: Any) -> Any:
        seen.append(trainer.model(input_ids=probes).logits.detach())
        return generate(*args, **kwargs)

    monkeypatch.setattr(trainer.model, "generate", look)
    before = frozen_bits(trainer)
    trainer.train()
    torch.testing.assert_close(seen[0], unmerged, rtol=1e-4, atol=1e-4)
    assert_same_bits(before, frozen_bits(trainer))


def test_rollouts_of_the_user_come_from_merged_weights_too(
    make_trainer: MakeTrainer, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged: list[bool] = []

    def rollout_func(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        merged.append(all(layer.merged for layer in trainer._adapter_layers))
        ids, images, fields = trainer._tokenize_prompts(prompts)
        answers, _ = trainer._generate_single_turn(ids, images, fields, 1)
        return {"prompt_ids": ids, "completion_ids": answers, "logprobs": None}

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    trainer = make_trainer({"rollout_func": rollout_func}, max_steps=2)
    tiny.randomize_offsets(trainer.model)
    before = frozen_bits(trainer)
    trainer.train()
    assert merged == [True, True]
    assert_same_bits(before, frozen_bits(trainer))


def test_several_turns_are_generated_under_one_merge(
    make_trainer: MakeTrainer, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's loop of tool calls generates once a turn; here a loop of two turns in its place."""

    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The one.
            b: The other.
        """
        return a + b

    trainer = make_trainer()
    trainer.tools = [add]
    before, merged = frozen_bits(trainer), spy_on_generate(trainer, monkeypatch)
    merges: list[int] = []
    merge = trainer.model.base_model.merge_adapter
    monkeypatch.setattr(trainer.model.base_model, "merge_adapter", lambda: merges.append(1) or merge())

    def loop(prompts: Any, prompt_ids: Any, ids: Any, texts: Any, logprobs: Any, images: Any, fields: Any) -> Any:
        longer = [prompt + answer for prompt, answer in zip(prompt_ids, ids, strict=True)]
        trainer._generate_single_turn(longer, images, fields, num_generations=1)
        return [[1] * len(answer) for answer in ids], texts, ids, logprobs, 1, 0, [[] for _ in ids]

    monkeypatch.setattr(trainer, "_tool_call_loop", loop)
    rollout(trainer)
    assert merged == [True, True] and len(merges) == 1
    assert_same_bits(before, frozen_bits(trainer))


def test_dropout_that_attention_keeps_as_a_number_is_disabled(
    make_trainer: MakeTrainer, tiny: SimpleNamespace
) -> None:
    """Otherwise the policy that is scored, in training mode, is another one at every pass."""
    model = llama(attention_dropout=0.5)
    trainer = make_trainer({"model": model}, per_device_train_batch_size=4)
    batch = rollout(trainer, 4)
    losses = {trainer._compute_loss(trainer.model, batch).item() for _ in range(3)}
    assert len(losses) == 1
    assert model.config.attention_dropout == 0.5  # what is saved stays as it was
    model = llama(attention_dropout=0.5)
    trainer = make_trainer({"model": model}, per_device_train_batch_size=4, disable_dropout=False)
    batch = rollout(trainer, 4)
    assert len({trainer._compute_loss(trainer.model, batch).item() for _ in range(3)}) == 3
