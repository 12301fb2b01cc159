"""The commands that serve an exported expert with an OpenAI-compatible API: peft-svf has no server of its own."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from peft.utils import CONFIG_NAME


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank takes


def merged_commands(folder: str | Path) -> list[str]:
    """How to serve a merged checkpoint; `model` in a request is the folder as it is given here."""
    quoted = shlex.quote(str(folder))
    return [f"transformers serve {quoted} --host 127.0.0.1 --port 8000", f"vllm serve {quoted}"]


def lora_command(folder: str | Path, name: str) -> str:
    """
    How to serve the base model with a LoRA; a request says `"model": name`.

    Args:
        folder (`str` or `Path`): Written by [`~peft_svf.experts.save_as_lora`].
        name (`str`): What requests call the expert.
    """
    config = json.loads((Path(folder) / CONFIG_NAME).read_text("utf-8"))
    rank, base = int(config["r"]), str(config["base_model_name_or_path"])
    limit = next(allowed for allowed in (*VLLM_RANKS, rank) if allowed >= rank)
    module = shlex.quote(f"{name}={folder}")
    return f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {limit} --lora-modules {module}"
