"""Llama-shaped models with random weights, and the PEFT methods that are compared on them.

Timing does not depend on the values of the weights, and the spectrum of a random matrix is the hard case for a
singular basis: dense, so that neighbouring directions differ by little.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, TinyLoraConfig, VeraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_svf import SVFConfig


# The head is not adapted, so a large one would make every ratio look better. With 512 tokens it is 2 % of the matrix
# products in these models of one or two layers; in Llama-3.1-8B, with 128256 tokens and 32 layers, it is 7 %.
VOCABULARY = 512
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CACHE_VARIABLE = "PEFT_SVF_CACHE"


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Llama; `layers` is how many of the real model's are built, for lack of memory or time."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int = VOCABULARY

    def config(self) -> LlamaConfig:
        """The transformers configuration; grouped-query attention with a quarter as many key-value heads."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads // 4,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )

    def with_layers(self, layers: int) -> Shape:
        return replace(self, layers=layers)

    def matrices(self) -> list[tuple[int, int]]:
        """Shapes (out, in) of the adapted weights of one layer."""
        hidden, kv, mlp = self.hidden, self.hidden // 4, self.intermediate
        attention = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
        return [*attention, (mlp, hidden), (mlp, hidden), (hidden, mlp)]


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama-256", hidden=256, intermediate=704, layers=2, heads=4),  # --quick
        Shape("llama-1024", hidden=1024, intermediate=2752, layers=2, heads=16),
        Shape("llama-2048", hidden=2048, intermediate=5504, layers=1, heads=32),
        Shape("llama-8b", hidden=4096, intermediate=14336, layers=1, heads=32),
    )
}
LAYERS_OF_8B = 32

METHODS: dict[str, Callable[[], PeftConfig]] = {
    "SVF": lambda: SVFConfig(task_type="CAUSAL_LM"),
    "LoRA r16": lambda: LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    "IA3": lambda: IA3Config(target_modules=LINEAR_LAYERS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "VeRA": lambda: VeraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
    "TinyLoRA": lambda: TinyLoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
}


def build_base(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> LlamaForCausalLM:
    """A Llama with the usual random initialisation, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(shape.config()).to(device, dtype).eval()


def adapt(base: LlamaForCausalLM, method: str, name: str = "default") -> PeftModel:
    """Put an adapter of the given method on the base model, in place, with PEFT's default dtypes."""
    return get_peft_model(base, METHODS[method](), adapter_name=name)


def add_experts(model: PeftModel, method: str, names: list[str]) -> None:
    """Add further adapters of the same method."""
    for name in names:
        model.add_adapter(name, METHODS[method]())


def adapted_linears(base: nn.Module) -> dict[str, nn.Linear]:
    """The layers that "all-linear" adapts, by name: all linear ones except the head."""
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(tuple(LINEAR_LAYERS))
    }


def random_tokens(rows: int, length: int, device: str, seed: int) -> torch.Tensor:
    """Token ids, shape (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (rows, length), generator=generator).to(device)


@contextmanager
def basis_cache(folder: str) -> Iterator[None]:
    """Let SVF keep its singular bases in `folder` ("off": nowhere)."""
    before = os.environ.get(CACHE_VARIABLE)
    os.environ[CACHE_VARIABLE] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ[CACHE_VARIABLE]
        else:
            os.environ[CACHE_VARIABLE] = before


def training_step(model: nn.Module, tokens: torch.Tensor) -> Callable[[], Any]:
    """One step of AdamW on the next-token loss, as a function without arguments."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()

    return step
