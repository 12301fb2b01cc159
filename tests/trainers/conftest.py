"""A tiny random Llama with a word-level tokenizer, an easy reward, and a factory for trainers on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from peft_svf import SVFConfig
from peft_svf.trainers import SVFPolicyGradientConfig, SVFPolicyGradientTrainer


WORDS = ["<pad>", "<unk>", "<|end|>", "<|user|>", "<|assistant|>", *map(str, range(20)), "+", "=", "?"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="<|end|>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def build_model(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=2,
            pad_token_id=0,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4.0)  # less uniform, so that the KL is not trivial
    return model.to(dtype)


def prompts(n: int, shift: int = 0) -> Dataset:
    rows = [f"{(i + shift) % 10} + {i % 7} = ?" for i in range(n)]
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": row}], "index": i} for i, row in enumerate(rows)]
    )


def even_digits(completions: list[Any], **kwargs: Any) -> list[float]:
    """+1 if most words of the answer are even numbers, else −1."""
    words = [completion[0]["content"].split() for completion in completions]
    return [1.0 if 2 * sum(w.isdigit() and int(w) % 2 == 0 for w in ws) > len(ws) else -1.0 for ws in words]


def randomize_offsets(model: torch.nn.Module, std: float = 0.3) -> None:
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += std * torch.randn_like(parameter)


@pytest.fixture
def tiny() -> SimpleNamespace:
    """The builders of this file, for tests that need the parts."""
    return SimpleNamespace(
        model=build_model,
        tokenizer=build_tokenizer,
        prompts=prompts,
        reward=even_digits,
        randomize_offsets=randomize_offsets,
    )


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., SVFPolicyGradientConfig]:
    def make(**options: Any) -> SVFPolicyGradientConfig:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "per_device_eval_batch_size": 32,
            "max_completion_length": 6,
            "use_cpu": True,
            "logging_steps": 1,
            "seed": 0,
            "disable_tqdm": True,
            "save_strategy": "no",
            "learning_curve": False,
            "learning_rate": 1e-2,
            "max_grad_norm": 1.0,
        }
        return SVFPolicyGradientConfig(**{**defaults, **options})

    return make


@pytest.fixture
def make_trainer(make_config: Callable[..., SVFPolicyGradientConfig]) -> Callable[..., SVFPolicyGradientTrainer]:
    """Trainer on the tiny model; `arguments` replaces arguments of the trainer, `options` those of the config."""

    def make(arguments: dict[str, Any] | None = None, **options: Any) -> SVFPolicyGradientTrainer:
        defaults = {
            "model": build_model(),
            "reward_funcs": even_digits,
            "train_dataset": prompts(64),
            "eval_dataset": prompts(21, shift=3),
            "processing_class": build_tokenizer(),
            "peft_config": SVFConfig(),
        }
        return SVFPolicyGradientTrainer(**{**defaults, **(arguments or {})}, args=make_config(**options))

    return make
