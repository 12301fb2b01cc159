"""`examples/serve_expert.py`: what it writes is what servers load, and a server's answers are the pipeline's."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils.import_utils import is_serve_available

import peft_svf  # noqa: F401 - registers the pipeline
from peft_svf.playground import BANK_FOLDER


SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "serve_expert.py"
PROMPT = "Tom has 23 apples and buys 18 more. How many apples does Tom have?"
START_SECONDS = 120


def run_script(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def own_answer(expert: str) -> str:
    pipe = pipeline("transformer2-generation", model=str(BANK_FOLDER))
    return pipe(PROMPT, expert=expert, max_new_tokens=30)[0]["generated_text"]


def plain_answer(model: object, folder: str) -> str:
    """By transformers alone, in its own pipeline."""
    pipe = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
    chat = [{"role": "user", "content": PROMPT}]
    return pipe(chat, max_new_tokens=30, do_sample=False, return_full_text=False)[0]["generated_text"]


def test_merged_expert_is_an_ordinary_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "served"
    run_script(monkeypatch, "--expert", "math", "--output", str(folder))
    assert f"transformers serve {folder} " in capsys.readouterr().out
    assert not list(folder.glob("adapter*"))
    answer = plain_answer(AutoModelForCausalLM.from_pretrained(folder), str(folder))
    assert answer == own_answer("math") != own_answer("others")
    with pytest.raises(SystemExit, match="is not empty"):
        run_script(monkeypatch, "--output", str(folder))


def test_lora_loads_without_peft_svf_and_vllm_is_told_a_rank_it_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, base = tmp_path / "lora", str(BANK_FOLDER / "base")
    run_script(monkeypatch, "--expert", "math", "--output", str(folder), "--lora", "120")
    printed = capsys.readouterr().out
    assert f"vllm serve {base} --enable-lora --max-lora-rank 128 --lora-modules math={folder}" in printed
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LORA"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).merge_and_unload()
    assert plain_answer(model, base) == own_answer("math")


@pytest.mark.skipif(
    not is_serve_available(), reason="needs the packages of transformers[serving]: fastapi, uvicorn, ..."
)
def test_transformers_serve_answers_as_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "served"
    run_script(monkeypatch, "--expert", "math", "--output", str(folder))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--device", "cpu"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=log,
            stderr=log,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        try:
            wait_until_up(server, port, tmp_path / "log")
            answer = ask(port, str(folder))
        finally:
            server.terminate()
            server.wait(timeout=30)
    assert answer == own_answer("math") != own_answer("others")


def wait_until_up(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    raise AssertionError(f"no answer within {START_SECONDS} s: {log.read_text()}")


def ask(port: int, model: str) -> str:
    chat = [{"role": "user", "content": PROMPT}]
    body = {"model": model, "messages": chat, "temperature": 0, "max_tokens": 30}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]["message"]["content"]
