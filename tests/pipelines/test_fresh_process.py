"""A saved bank works in a fresh process that never asks the network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import pipeline
from transformers.pipelines import PIPELINE_REGISTRY

from peft_svf import (
    PromptDispatcher,
    Transformer2ImageTextToTextPipeline,
    Transformer2Pipeline,
    registration,
)
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


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", RECORD_NETWORK + code],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"} | environment,
    )


PROMPTS: list[Any] = ["math: 2+2?", {"text": "x", "expert": "code"}, "hello"]


def check_answers(records: list[Any], expected: list[Any]) -> None:
    for (record,), (wanted,) in zip(records, expected, strict=True):
        assert record["generated_text"] == wanted["generated_text"]
        assert record["expert"] == wanted["expert"]
        assert (record["scores"] is None) == (wanted["scores"] is None)
        if wanted["scores"] is not None:
            assert record["scores"] == pytest.approx(wanted["scores"], abs=1e-5)


def test_saved_and_embedded_banks_answer_in_a_fresh_process_without_network(bank, tmp_path):
    pipe = Transformer2Pipeline(bank, dispatcher=PromptDispatcher(bank, margin=0.3), max_new_tokens=8)
    folder = pipe.save_pretrained(tmp_path / "bank")
    expected = pipe(PROMPTS, batch_size=3)
    result = run(f"""
import peft_svf
from transformers import pipeline
pipe = pipeline("transformer2-generation", model={str(folder)!r}, max_new_tokens=8)
records = pipe({PROMPTS!r}, batch_size=3)
without_task = type(pipeline(model={str(folder)!r})) is peft_svf.Transformer2Pipeline
with_trust = type(pipeline(model={str(folder)!r}, trust_remote_code=True)) is peft_svf.Transformer2Pipeline
playground = None
if {PLAYGROUND_BANK.is_dir()}:
    playground = pipeline("transformer2-generation")("Tom has 23 apples and buys 18 more. How many has he?")
print(json.dumps([records, without_task, with_trust, playground, attempts]))
""")
    assert result.returncode == 0, result.stderr
    records, without_task, with_trust, playground, attempts = json.loads(result.stdout)
    assert attempts == []
    assert without_task and with_trust
    check_answers(records, expected)
    if playground is not None:
        assert playground[0]["expert"] == "math"


def test_a_process_that_never_imported_peft_svf_loads_a_trusted_folder_and_hears_what_else_it_needs(bank, tmp_path):
    pipe = Transformer2Pipeline(bank, max_new_tokens=8)
    folder = pipe.save_pretrained(tmp_path / "bank")
    expected = pipe(PROMPTS, batch_size=3)
    result = run(
        f"""
import sys
from transformers import pipeline
def error(**kwargs):
    try:
        pipeline(model={str(folder)!r}, **kwargs)
    except Exception as error:
        return type(error).__name__ + ": " + str(error)
untrusted = error(task="transformer2-generation")
class NotInstalled:
    def find_spec(name, path=None, target=None):
        if name == "peft_svf":
            raise ModuleNotFoundError("No module named 'peft_svf'", name=name)
sys.meta_path.insert(0, NotInstalled)
missing = error(trust_remote_code=True)
sys.meta_path.remove(NotInstalled)
imported = "peft_svf" in sys.modules
pipe = pipeline(model={str(folder)!r}, trust_remote_code=True, max_new_tokens=8)
records = pipe({PROMPTS!r}, batch_size=3)
import peft_svf
again = type(pipeline("transformer2-generation", model={str(folder)!r})) is type(pipe) is peft_svf.Transformer2Pipeline
print()  # behind the question whether to trust
print(json.dumps([untrusted, missing, imported, records, again, attempts]))
""",
        HF_HUB_OFFLINE="1",
        HF_MODULES_CACHE=str(tmp_path / "modules"),
    )
    assert result.returncode == 0, result.stderr
    untrusted, missing, imported, records, again, attempts = json.loads(result.stdout.splitlines()[-1])
    assert attempts == []
    assert untrusted.startswith("ValueError: ") and "trust_remote_code=True" in untrusted
    assert missing.startswith("ImportError: ") and "pip install peft_svf" in missing
    assert not imported
    check_answers(records, expected)
    assert again


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
    for pipeline_class in (Transformer2Pipeline, Transformer2ImageTextToTextPipeline):
        assert "_registered_impl" not in vars(pipeline_class)
