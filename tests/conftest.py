"""Fixtures for the whole test-suite: a real tiny language model, and builders of random ones."""

from __future__ import annotations

import gc
import os


# Before torch is imported: several test processes with several threads each slow one another down tenfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PEFT_SVF_CACHE"] = "off"  # the tests of the cache give it a folder of their own

from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

import hypothesis
import jinja2
import pytest
import torch
from peft import PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from peft_svf import SVFConfig


hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)  # a failure is one for everybody
hypothesis.settings.load_profile("repeatable")

COMPILED_TEMPLATES: dict[tuple[jinja2.Environment, str], CodeType] = {}
compile_template = jinja2.Environment.compile

STORIES = Path(__file__).resolve().parents[2] / "shared" / "models" / "stories260K"


def pytest_collection_finish() -> None:
    """Take what is imported, half a million objects, out of the reach of garbage collection."""
    gc.collect()
    gc.freeze()


def compile_once(self: jinja2.Environment, source: Any, *args: Any, **options: Any) -> Any:
    """`jinja2.Environment.compile`; the text of a template only once for each environment.

    The three model cards of a checkpoint are compiled anew whenever one is saved, a sixth of a small training's time.
    """
    if args or options or not isinstance(source, str):
        return compile_template(self, source, *args, **options)
    if (self, source) not in COMPILED_TEMPLATES:
        COMPILED_TEMPLATES[self, source] = compile_template(self, source)
    return COMPILED_TEMPLATES[self, source]


jinja2.Environment.compile = compile_once


@pytest.fixture(scope="session")
def stories_path() -> str:
    """Path of stories260K, a trained Llama of 260 thousand parameters with its tokenizer."""
    if not (STORIES / "model.safetensors").is_file():
        pytest.skip(f"stories260K is not at {STORIES}")
    return str(STORIES)


@pytest.fixture
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """Builds a random two-layer Llama in eval mode whose linear layers are square, tall and wide.

    `build(seed=0, **overrides)`: the same seed and overrides of `LlamaConfig` give the same weights.
    """

    def build(seed: int = 0, **overrides: object) -> LlamaForCausalLM:
        settings = {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,  # large enough that layers matter to the logits
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides})).eval()

    return build


CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character (100 ids with special ones), with a chat template; for `tiny_llama(vocab_size=100)`."""
    characters = ["<pad>", "<s>", "</s>", "<unk>", *(chr(code) for code in range(32, 127)), "\n"]
    inner = Tokenizer(models.WordLevel({character: i for i, character in enumerate(characters)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def stories_tokenizer(stories_path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of stories260K with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(stories_path)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def add_experts() -> Callable[..., PeftModel]:
    """Puts experts with random offsets on a model: `add(model, names=("math", "code"), seed=0, std=0.5)`."""

    def add(
        model: PreTrainedModel, names: tuple[str, ...] = ("math", "code"), seed: int = 0, std: float = 0.5
    ) -> PeftModel:
        peft_model = get_peft_model(model, SVFConfig(task_type="CAUSAL_LM"), adapter_name=names[0])
        for name in names[1:]:
            peft_model.add_adapter(name, SVFConfig(task_type="CAUSAL_LM"))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in peft_model.named_parameters():
            if "svf_offset" in name:
                parameter.data.normal_(std=std, generator=generator)
        return peft_model

    return add
