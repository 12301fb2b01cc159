"""Random tiny models under the repository names that PEFT's tests load, in the layout of the Hugging Face cache.

PEFT's tests load about twenty tiny models from the Hub. Here their architectures are made locally, seeded by their
names, so that the tests run without network: 12 MB, a few seconds. One repository in the cache is

    <HF_HOME>/hub/models--<organisation>--<name>/refs/<branch>          holds the name of a snapshot
    <HF_HOME>/hub/models--<organisation>--<name>/snapshots/<snapshot>/  holds the files

    python tests/upstream/tiny_hub.py <HF_HOME>
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers


PEFT, HF, TRL = "peft-internal-testing/", "hf-internal-testing/", "trl-internal-testing/"
BRANCHES = {PEFT + "tiny-opt-lora-revision": ("main", "test")}
TOKENIZED = (TRL + "tiny-random-LlamaForCausalLM", PEFT + "tiny-random-OPTForCausalLM")

VOCABULARY = 300
# About 1/√width, as in models of real size. The usual 0.02 makes layers of width 32 almost vanish, and with them the
# effect of a method that scales what the weights do.
SCALE = 0.2
DECODER = {
    "initializer_range": SCALE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "vocab_size": VOCABULARY,
}
GPT = {
    "initializer_range": SCALE,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
OPT = {"init_std": SCALE, "vocab_size": VOCABULARY, "num_attention_heads": 4, "max_position_embeddings": 128}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BART = {
    "init_std": SCALE,
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "max_position_embeddings": 128,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "num_key_value_heads": 2}


def _llama() -> transformers.PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=2, **DECODER))


def _gpt2() -> transformers.PreTrainedModel:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT))


def _t5() -> transformers.PreTrainedModel:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(decoder_start_token_id=0, **T5))


def _opt() -> transformers.PreTrainedModel:
    shape = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**shape, **OPT))


def _opt_125m() -> transformers.PreTrainedModel:
    # As many layers and as wide an embedding as the real one: tests count the former and compute with the latter.
    # Small weights, because a test bounds the error of quantization, and larger random ones break the bound by
    # themselves.
    shape = {"hidden_size": 128, "word_embed_proj_dim": 768, "ffn_dim": 256, "num_hidden_layers": 12}
    return transformers.OPTForCausalLM(transformers.OPTConfig(**shape, **(OPT | {"init_std": 0.02})))


def _llama4() -> transformers.PreTrainedModel:
    config = transformers.Llama4TextConfig(
        intermediate_size_mlp=64, interleave_moe_layer_step=1, **DECODER, **(EXPERTS | {"num_experts_per_tok": 1})
    )
    return transformers.Llama4ForCausalLM(config)


def _gpt_oss() -> transformers.PreTrainedModel:
    config = transformers.GptOssConfig(**(DECODER | {"max_position_embeddings": 4096}), **EXPERTS)
    return transformers.GptOssForCausalLM(config).to(torch.bfloat16)


def _opt_adapter() -> peft.PeftModel:
    return peft.get_peft_model(_opt(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))


REPOSITORIES: dict[str, Callable[[], transformers.PreTrainedModel | peft.PeftModel]] = {
    PEFT + "tiny-random-OPTForCausalLM": _opt,
    PEFT + "opt-125m": _opt_125m,
    PEFT + "tiny-random-GPT2LMHeadModel": _gpt2,
    PEFT + "tiny-random-GPTJForCausalLM": lambda: transformers.GPTJForCausalLM(
        transformers.GPTJConfig(rotary_dim=4, **GPT)
    ),
    TRL + "tiny-random-LlamaForCausalLM": _llama,
    PEFT + "tiny-dummy-qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(num_key_value_heads=2, **DECODER)
    ),
    HF + "tiny-random-Gemma3ForCausalLM": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(num_key_value_heads=2, head_dim=8, **DECODER)
    ),
    TRL + "tiny-Llama4ForCausalLM": _llama4,
    TRL + "tiny-GptOssForCausalLM": _gpt_oss,
    PEFT + "tiny-random-T5ForConditionalGeneration-calibrated": _t5,
    PEFT + "tiny-random-t5": _t5,
    PEFT + "tiny-random-BartForConditionalGeneration": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(**BART)
    ),
    PEFT + "tiny-random-BertModel": lambda: transformers.BertModel(transformers.BertConfig(**DECODER)),
    PEFT + "tiny-random-RobertaModel": lambda: transformers.RobertaModel(transformers.RobertaConfig(**DECODER)),
    PEFT + "tiny-random-DebertaModel": lambda: transformers.DebertaModel(
        transformers.DebertaConfig(relative_attention=False, **DECODER)
    ),
    PEFT + "tiny-random-DebertaV2Model": lambda: transformers.DebertaV2Model(transformers.DebertaV2Config(**DECODER)),
    PEFT + "tiny-random-BertForSequenceClassification": lambda: transformers.BertForSequenceClassification(
        transformers.BertConfig(**DECODER)
    ),
    PEFT + "tiny-random-RobertaForSequenceClassification": lambda: transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**DECODER)
    ),
    TRL + "tiny-LlamaForSequenceClassification-3.2": lambda: transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(num_key_value_heads=2, pad_token_id=0, **DECODER)
    ),
    PEFT + "tiny-opt-lora-revision": _opt_adapter,
}


def make_tiny_hub(home: Path) -> None:
    """Make the tiny models.

    Args:
        home (`Path`): A folder that does not exist yet, and then is what `HF_HOME` must be set to.
    """
    home.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=home.parent))
    transformers.utils.logging.disable_progress_bar()
    try:
        for repository, build in REPOSITORIES.items():
            torch.manual_seed(zlib.crc32(repository.encode()))
            snapshot = _make_snapshot_folder(unfinished, repository, BRANCHES.get(repository, ("main",)))
            build().save_pretrained(snapshot)
            if repository in TOKENIZED:
                _tokenizer().save_pretrained(snapshot)
        os.replace(unfinished, home)
    except OSError:
        if not home.is_dir():  # else another process was faster: its result is as good
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _make_snapshot_folder(home: Path, repository: str, branches: Sequence[str]) -> Path:
    name = hashlib.sha1(repository.encode()).hexdigest()
    root = home / "hub" / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    for branch in branches:
        (root / "refs" / branch).write_text(name)
    snapshot = root / "snapshots" / name
    snapshot.mkdir(parents=True)
    return snapshot


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token for each byte: no file, no training, and every text can be encoded."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(special + alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=128
    )


if __name__ == "__main__":
    make_tiny_hub(Path(sys.argv[1]))
