"""From nothing to an answer: train, push, pull, a bank of three, a pipeline that never imported peft_svf."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_server import HubServer
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from peft_svf import Expert
from peft_svf.experts.bank_config import BankConfig
from peft_svf.playground import BANK_FOLDER


INSTRUCTION = BankConfig.read(BANK_FOLDER).instruction  # the base model was pre-trained to follow this one
QUESTION = "Tom has 23 apples and buys 18 more. How many apples does Tom have?"

COMMANDS = """
import sys
from peft_svf.cli import main
for command in {commands!r}:
    print(">", *command)
    if (status := main(command)) != 0:
        sys.exit(status)
"""

PUSH_BASE = """
from transformers import AutoModelForCausalLM, AutoTokenizer
for kind in (AutoModelForCausalLM, AutoTokenizer):
    kind.from_pretrained({folder!r}).push_to_hub("user/base")
"""

ANSWER = """
import json, sys
from transformers import pipeline
assert not any(name.startswith("peft") for name in sys.modules)
pipe = pipeline("transformer2-generation", model="user/bank", trust_remote_code=True, max_new_tokens=32)
print(json.dumps([pipe({question!r}), pipe({{"text": {question!r}, "expert": "others"}})]))
"""


@pytest.fixture
def run(in_process: Callable) -> Callable[[str], str]:
    def run(code: str) -> str:
        done = in_process(code)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    return run


def commands(*lines: list[str]) -> str:
    return COMMANDS.format(commands=list(lines))


def train(steps: int) -> list[str]:
    words = ["train", "--model", "user/base", "--task", "playground-math", "--output", "math-expert", "--use_cpu"]
    words += ["--max-steps", str(steps), "--train-prompts", str(64 * steps), "--validation-prompts", "32"]
    words += ["--test-prompts", "32", "--per_device_train_batch_size", "64", "--gradient_accumulation_steps", "1"]
    return [*words, "--learning-rate", "5e-2", "--eval_steps", str(steps), "--disable_tqdm"]


def test_train_push_pull_bank_pipeline_and_transfer(hub: HubServer, run: Callable[[str], str], tmp_path: Path):
    run(
        PUSH_BASE.format(folder=str(BANK_FOLDER / "base"))
        + commands(train(steps=3), ["push", "math-expert", "user/math-expert"])
    )
    trained = Expert.from_pretrained(tmp_path / "math-expert")
    assert any(offset.abs().max() > 0 for offset in trained.offsets.values())

    others = [f"{name}={BANK_FOLDER / name}" for name in ("code", "reasoning")]
    bank = ["--model", "user/base", "--expert", "math=pulled", *others, "--instruction", INSTRUCTION]
    second_base = tmp_path / "second-base"
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes)).save_pretrained(second_base)
    transferred = tmp_path / "transferred"
    run(
        commands(
            ["pull", "user/math-expert", "--output", "pulled"],
            ["bank", "create", "bank", *bank],
            ["push", "bank", "user/bank"],
            ["transfer", "--from", "user/math-expert", "--to", str(second_base), "--output", str(transferred)],
        )
    )
    pulled = Expert.from_pretrained(tmp_path / "pulled")
    assert pulled.offsets.keys() == trained.offsets.keys()
    assert all(torch.equal(pulled.offsets[name], trained.offsets[name]) for name in trained.offsets)
    assert pulled.base_model == "user/base"
    assert pulled.metadata["results"] == trained.metadata["results"]

    adapted, base = (answer[0] for answer in json.loads(run(ANSWER.format(question=QUESTION)).splitlines()[-1]))
    assert adapted["expert"] == "math"
    assert base["expert"] == "others"
    assert max(adapted["scores"], key=adapted["scores"].get) == "math"

    second = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(second_base), transferred)
    prompt = torch.arange(8)[None]
    with torch.no_grad():
        changed = second(prompt).logits
        with second.disable_adapter():
            unchanged = second(prompt).logits
    assert not torch.allclose(changed, unchanged)
    assert Expert.from_pretrained(transferred).metadata["origin"]["operation"] == "transfer"
