"""A saved bank works in a fresh process that never asks the network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from peft_svf import Transformer2Pipeline, registration
from peft_svf.experts import ExpertBankError
from peft_svf.registration import PLAYGROUND_BANK, register_auto_classes, register_pipelines


# Stricter than HF_HUB_OFFLINE=1: an attempt to reach the network counts even if it would be forgiven
RECORD_NETWORK = """
import json, socket
attempts = []
def refuse(*args, **kwargs):
    attempts.append(str(args))
    raise OSError("no network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""


def run(code: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-c", RECORD_NETWORK + code], capture_output=True, text=True, env=environment
    )


def test_saved_and_embedded_banks_answer_in_a_fresh_process_without_network(bank, tmp_path):
    folder = bank.save_pretrained(tmp_path / "bank", include_base=True)
    prompts = ["math: 2+2?", {"text": "x", "expert": "code"}, "hello"]
    expected = Transformer2Pipeline(bank, max_new_tokens=8)(prompts, batch_size=3)
    result = run(f"""
import peft_svf
from transformers import pipeline
pipe = pipeline("transformer2-generation", model={str(folder)!r}, max_new_tokens=8)
records = pipe({prompts!r}, batch_size=3)
playground = None
if {PLAYGROUND_BANK.is_dir()}:
    playground = pipeline("transformer2-generation")("Tom has 23 apples and buys 18 more. How many has he?")
print(json.dumps([records, playground, attempts]))
""")
    assert result.returncode == 0, result.stderr
    records, playground, attempts = json.loads(result.stdout)
    assert attempts == []
    for (record,), (wanted,) in zip(records, expected, strict=True):
        assert record["generated_text"] == wanted["generated_text"]
        assert record["expert"] == wanted["expert"]
        assert (record["scores"] is None) == (wanted["scores"] is None)
        if wanted["scores"] is not None:
            assert record["scores"] == pytest.approx(wanted["scores"], abs=1e-5)
    if playground is not None:
        assert playground[0]["expert"] == "math"


def test_without_a_model_the_registered_bank_is_loaded(bank, tmp_path, monkeypatch):
    folder = bank.save_pretrained(tmp_path / "bank", include_base=True)
    default = registration._PlaygroundDefault(model=(str(folder), None))
    monkeypatch.setattr(registration, "PLAYGROUND_BANK", folder)
    monkeypatch.setitem(PIPELINE_REGISTRY.supported_tasks["transformer2-generation"], "default", default)
    pipe = pipeline("transformer2-generation")
    assert type(pipe) is Transformer2Pipeline
    assert pipe.bank.experts == bank.experts


def test_an_installation_without_the_playground_bank_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(registration, "PLAYGROUND_BANK", tmp_path / "missing")
    with pytest.raises(FileNotFoundError, match=r"playground bank is missing .* pass model="):
        pipeline("transformer2-generation")


def test_a_faulty_bank_is_one_clear_line_in_the_pipeline_too(
    bank, tmp_path: Path, tiny_llama, add_experts, character_tokenizer
):
    folder = bank.save_pretrained(tmp_path / "bank", include_base=True)
    tiny_llama(seed=1, vocab_size=100, max_position_embeddings=512).save_pretrained(folder / "base")
    with pytest.raises(ExpertBankError, match=r"Expert 'math' of the bank .* another base model") as error:
        pipeline("transformer2-generation", model=str(folder))
    assert "\n" not in str(error.value)


def test_registration_is_safe_to_repeat_and_leaves_no_trace_in_saved_configs():
    register_auto_classes()
    register_pipelines()
    assert "_registered_impl" not in vars(Transformer2Pipeline)
