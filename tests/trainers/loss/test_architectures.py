"""Causal language models of many kinds: scores, answers, gradients and a training step of a tiny random one each."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from torch import Tensor

from peft_svf import SVFConfig
from peft_svf.trainers import SVFPolicyGradientTrainer
from peft_svf.trainers.rollouts.decoding import decoding_temperature


MakeTrainer = Callable[..., SVFPolicyGradientTrainer]

TOKENS: dict[str, Any] = {"vocab_size": 28, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
COMMON: dict[str, Any] = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped queries
    "head_dim": 8,
    "max_position_embeddings": 64,
}
MAMBA2 = {**TOKENS, "hidden_size": 32, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}
EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True}
FUSED = ["experts.gate_up_proj", "experts.down_proj"]

# Name, classes of the model and its configuration in transformers, options of the configuration, and of SVFConfig.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "tied embeddings": ("LlamaForCausalLM", "LlamaConfig", {**COMMON, "tie_word_embeddings": True}, {}),
    "sliding window": ("MistralForCausalLM", "MistralConfig", {**COMMON, "sliding_window": 4}, {}),
    "soft caps": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**COMMON, "sliding_window": 4, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0},
        {},
    ),
    "Gemma 3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**COMMON, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        {},
    ),
    "scaled logits": ("CohereForCausalLM", "CohereConfig", {**COMMON, "logit_scale": 0.25}, {}),
    "divided logits": ("GraniteForCausalLM", "GraniteConfig", {**COMMON, "logits_scaling": 4.0}, {}),
    "Qwen 2": ("Qwen2ForCausalLM", "Qwen2Config", COMMON, {}),
    "Qwen 3": ("Qwen3ForCausalLM", "Qwen3Config", COMMON, {}),
    "Conv1D": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {**TOKENS, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
        {},
    ),
    "parallel blocks": ("GPTNeoXForCausalLM", "GPTNeoXConfig", COMMON, {}),
    "head with bias": ("PhiForCausalLM", "PhiConfig", COMMON, {}),
    "learned positions and functional dropout": (
        "OPTForCausalLM",
        "OPTConfig",
        {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.1},
        {},
    ),
    "ALiBi": ("BloomForCausalLM", "BloomConfig", {**TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}, {}),
    "experts": ("MixtralForCausalLM", "MixtralConfig", {**COMMON, **EXPERTS, "num_local_experts": 4}, {}),
    "experts adapted": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**COMMON, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 16},
        {"target_modules": "all-linear", "target_parameters": FUSED},
    ),
    "state space": (
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {**MAMBA2, "expand": 2, "num_hidden_layers": 2},
        {"exclude_modules": ["out_proj"]},
    ),
    "state space and attention": (
        "FalconH1ForCausalLM",
        "FalconH1Config",
        {
            **COMMON,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
            "lm_head_multiplier": 0.5,
        },
        {"exclude_modules": ["out_proj"]},
    ),
    "convolutions": ("Lfm2ForCausalLM", "Lfm2Config", {**COMMON, "layer_types": ["conv", "full_attention"]}, {}),
}
MAMBA = ("MambaForCausalLM", "MambaConfig", {**TOKENS, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2})
RWKV = ("RwkvForCausalLM", "RwkvConfig", {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2})


def build_model(model: str, config: str, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**options))
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))  # biases are 0 at first
            else:
                parameter.mul_(4.0)  # less uniform answers
    return built.to(dtype)


def prompts_of_different_lengths(tiny: SimpleNamespace, n: int = 8) -> Dataset:
    rows = tiny.prompts(n).to_list()
    for i, row in enumerate(rows):
        row["prompt"][0]["content"] += " 1 2 3" * (i % 3)
    return Dataset.from_list(rows)


def make(make_trainer: MakeTrainer, tiny: SimpleNamespace, model: Any, svf: dict[str, Any]) -> Any:
    trainer = make_trainer(
        {
            "model": model,
            "train_dataset": prompts_of_different_lengths(tiny),
            "eval_dataset": None,
            "peft_config": SVFConfig(**svf),
        },
        per_device_train_batch_size=8,
        kl_coef=0.1,
        max_steps=1,
    )
    tiny.randomize_offsets(trainer.model)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def greedy_rollout(trainer: Any) -> dict[str, Any]:
    with decoding_temperature(trainer, 0.0):
        return trainer._generate_and_score_completions(list(trainer.train_dataset))


def rows_of(batch: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Prompt and answer of each row, without padding."""
    return [
        (batch["prompt_ids"][i][batch["prompt_mask"][i].bool()], batch["completion_ids"][i][mask.bool()])
        for i, mask in enumerate(batch["completion_mask"])
    ]


@torch.no_grad()
def own_log_probs(model: Any, prompt: Tensor, answer: Tensor) -> Tensor:
    """Of the model's own forward on one unpadded row: `(tokens, vocabulary)`."""
    logits = model(input_ids=torch.cat([prompt, answer]).unsqueeze(0)).logits
    return logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)


@torch.no_grad()
def own_greedy_answer(model: Any, prompt: Tensor, length: int) -> list[int]:
    """Of the unmerged model's own `generate` on one unpadded row, cut to `length` tokens."""
    ids = prompt.unsqueeze(0)
    answer = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, pad_token_id=0
    )
    return answer[0, len(prompt) :][:length].tolist()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(make_trainer: MakeTrainer, tiny: SimpleNamespace, name: str) -> None:
    model, config, options, svf = ARCHITECTURES[name]
    trainer = make(make_trainer, tiny, build_model(model, config, options), svf)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(trained) == len(trainer._adapter_layers) >= 2

    batch = greedy_rollout(trainer)
    valid = batch["completion_mask"].bool()
    assert batch["prompt_mask"].sum(1).unique().numel() > 1, "prompts have to be padded"
    with torch.no_grad():
        scored = trainer._score(trainer.model, batch, valid).log_probs
    expected = []
    for prompt, answer in rows_of(batch):
        log_probs = own_log_probs(trainer.model, prompt, answer)
        expected.append(log_probs.gather(-1, answer.unsqueeze(-1)).squeeze(-1))
        assert own_greedy_answer(trainer.model, prompt, len(answer)) == answer.tolist()
    torch.testing.assert_close(scored, torch.cat(expected), rtol=0, atol=1e-4)

    gradients = torch.autograd.grad(trainer._compute_loss(trainer.model, batch), list(trained.values()))
    for layer, gradient in zip(trained, gradients, strict=True):
        assert gradient.isfinite().all() and gradient.abs().max() > 0, layer

    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for layer, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[layer]) != (layer in trained), layer


@pytest.mark.parametrize("name", ["soft caps", "experts"])
def test_bfloat16(make_trainer: MakeTrainer, tiny: SimpleNamespace, name: str) -> None:
    model, config, options, svf = ARCHITECTURES[name]
    trainer = make(make_trainer, tiny, build_model(model, config, options, torch.bfloat16), svf)
    batch = greedy_rollout(trainer)
    with torch.no_grad():
        scored = trainer._score(trainer.model, batch, batch["completion_mask"].bool()).log_probs
    own = [(own_log_probs(trainer.model, *row), row[1]) for row in rows_of(batch)]
    expected = torch.cat([p.gather(-1, answer.unsqueeze(-1)).squeeze(-1) for p, answer in own])
    most_likely = torch.cat([p.max(-1).values for p, _ in own])
    torch.testing.assert_close(scored, expected, rtol=0, atol=0.05)
    torch.testing.assert_close(expected, most_likely, rtol=0, atol=0.1)  # greedy up to rounding
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    trainer.train()
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_router_logits_are_as_before_afterwards(make_trainer: MakeTrainer, tiny: SimpleNamespace) -> None:
    model, config, options, svf = ARCHITECTURES["experts"]
    trainer = make(make_trainer, tiny, build_model(model, config, options), svf)
    greedy_rollout(trainer)
    assert trainer._base_model.config.output_router_logits is True
    assert trainer.model(input_ids=torch.arange(1, 5).unsqueeze(0)).aux_loss is not None


def test_an_auxiliary_loss_of_the_router_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="`router_aux_loss_coef` has no effect"):
        make_trainer(router_aux_loss_coef=0.1)


def test_a_model_that_padding_changes_is_refused(make_trainer: MakeTrainer, tiny: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=r"RwkvForCausalLM gives other log-probabilities .* padded on the left"):
        make(make_trainer, tiny, build_model(*RWKV), {})


def test_a_layer_whose_weight_is_read_without_a_call_is_refused(
    make_trainer: MakeTrainer, tiny: SimpleNamespace
) -> None:
    """Mamba multiplies by the weight of `dt_proj` itself: merged answers would see its adapter, scores would not."""
    with pytest.raises(ValueError, match=r"reads the weight of `.*dt_proj`.*add 'dt_proj' to `exclude_modules`"):
        make(make_trainer, tiny, build_model(*MAMBA), {"exclude_modules": ["out_proj"]})
    make(make_trainer, tiny, build_model(*MAMBA), {"exclude_modules": ["out_proj", "dt_proj"]})
