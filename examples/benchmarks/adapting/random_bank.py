"""A bank of random experts on a random Llama: what the first three parts are timed on.

The model has 8 layers of 512. The head of 4096 tokens is 9 % of its matrix products, as in Llama-3.1-8B (7 %): a
larger one would make every generated token dearer, and so the first pass, which needs one logit for each label, look
cheaper. The tokenizer is the playground's, which knows 768 of these tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from models import Shape, adapt, add_experts, basis_cache, build_base
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from peft_svf import ExpertBank
from peft_svf.experts import ExpertEntry
from peft_svf.playground import BANK_FOLDER, generate_problems


SHAPE = Shape("llama-512", hidden=512, intermediate=1376, layers=8, heads=8, vocabulary=4096)
QUICK_SHAPE = Shape("llama-64", hidden=64, intermediate=128, layers=2, heads=4, vocabulary=1024)
OFFSET = 0.1  # standard deviation of the offsets, so that experts differ


def describe(shape: Shape) -> str:
    return f"random Llama, {shape.layers} layers of {shape.hidden}, vocabulary {shape.vocabulary}"


def random_bank(names: Sequence[str], quick: bool) -> ExpertBank:
    """Experts of these names, with normal offsets, labels equal to their names and one description."""
    with basis_cache("off"):
        model = adapt(build_base(QUICK_SHAPE if quick else SHAPE, torch.float32, "cpu", seed=0), "SVF", names[0])
        add_experts(model, "SVF", list(names[1:]))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if ".svf_offset." in name:
                parameter.normal_(std=OFFSET)
    tokenizer = AutoTokenizer.from_pretrained(BANK_FOLDER / "base")
    experts = {name: ExpertEntry(name, "requests of this kind, in many words or in few") for name in names}
    return ExpertBank(model, tokenizer, experts)


def prompts(n: int) -> list[str]:
    """Requests of about 30 tokens."""
    return [problem.prompt for problem in generate_problems("math-hard", "test", n)]


def padded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Tensor]:
    """Token ids and mask of one batch, padded on the left."""
    batch = tokenizer(list(texts), padding=True, padding_side="left", return_tensors="pt")
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def generate(bank: ExpertBank, batch: dict[str, Tensor], new_tokens: int) -> Tensor:
    """Exactly `new_tokens` greedy tokens for every row, shape (rows, new_tokens)."""
    tokens = bank.model.generate(**batch, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
    return tokens[:, batch["input_ids"].shape[1] :]
