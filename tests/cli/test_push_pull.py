"""`peft-svf push` and `peft-svf pull`: from one folder to another over the Hub, or an error that says what to do."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils import CONFIG_NAME

from peft_svf import Expert, ExpertBank
from peft_svf.cli import main
from peft_svf.playground import BANK_FOLDER


specification = importlib.util.spec_from_file_location("hub_conftest", Path(__file__).parents[1] / "hub/conftest.py")
assert specification is not None and specification.loader is not None
fixtures = importlib.util.module_from_spec(specification)
specification.loader.exec_module(fixtures)
hub_of_module, hub = fixtures.hub_of_module, fixtures.hub


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_svf.plots.plot_levers", lambda expert, path, title=None: path.write_bytes(b"levers"))


@pytest.fixture
def online(hub: Any) -> Iterator[Any]:
    """The Hub with "user/base", the playground's base model."""
    hub.put("user/base", BANK_FOLDER / "base")
    yield hub


def push(*words: str) -> int:
    return main(["push", *words, "--base-model", "user/base"])


def test_an_expert_comes_back_as_it_was(online: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    math = BANK_FOLDER / "math"
    assert push(str(math), "user/math", "--private", "--tag", "v1", "--message", "sums", "--collection", "Skills") == 0
    commit = online.commits("user/math")[0]
    out = capsys.readouterr().out
    assert out == f"The expert is at {online.url}/user/math\ncommit {commit.sha}\n"
    assert commit.title == "sums" and online.repositories["model", "user/math"].private
    assert push(str(math), "user/math") == 0
    assert "the Hub had the same files already" in capsys.readouterr().out
    output = tmp_path / "new" / "math"
    assert main(["pull", "user/math", "--revision", "v1", "--output", str(output)]) == 0
    trained, found = Expert.from_pretrained(math), Expert.from_pretrained(output)
    assert all(torch.equal(found.offsets[name], offset) for name, offset in trained.offsets.items())
    said = capsys.readouterr().out
    assert f"user/math is an expert, commit {commit.sha}\nbase model: user/base at {found.base_revision}\n" in said
    assert f"fingerprint of the base model: {trained.fingerprint_id}\n" in said and f"It is in {output}\n" in said
    assert sorted(path.name for path in output.iterdir()) == sorted(online.files("user/math"))
    assert main(["pull", "user/math"]) == 0
    cached = Path(capsys.readouterr().out.rpartition("It is in ")[2].strip())
    assert cached.name == commit.sha and (cached / CONFIG_NAME).is_file()


def test_a_bank_comes_back_with_its_base_and_without_code_of_the_repository(
    online: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(BANK_FOLDER), "user/bank", "--include-base"]) == 0
    online.put("user/bank", {"transformer2.py": b"import os; os.abort()", "base/evil.py": b"1/0", "big.bin": b"0"})
    assert main(["pull", "user/bank", "--output", str(tmp_path / "bank")]) == 0
    out = capsys.readouterr().out
    assert "The bank is at" in out and "user/bank is a bank, commit" in out and "base model: in the bank" in out
    assert "fingerprint of the base model of code: " in out
    assert "abort" not in (tmp_path / "bank" / "transformer2.py").read_text()
    assert not list(tmp_path.rglob("evil.py")) and not list(tmp_path.rglob("big.bin"))
    bank = ExpertBank.from_pretrained(tmp_path / "bank")
    assert list(bank.experts) == ["math", "code", "reasoning"]
    assert main(["pull", "user/bank", "--output", str(tmp_path / "bank")]) == 0  # in place of the first
    assert main(["pull", "user/base", "--output", str(tmp_path / "bank")]) == 1
    assert "user/base at" in (said := capsys.readouterr().err) and "is neither an expert nor a bank" in said


@pytest.mark.parametrize("kind", ["expert", "bank"])
def test_pulling_does_not_replace_a_folder_with_other_things(
    online: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    assert push(str(BANK_FOLDER / "math" if kind == "expert" else BANK_FOLDER), "user/any") == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert main(["pull", "user/any", "--output", str(tmp_path / "mine")]) == 1
    assert "choose a new folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("damage", ["pickle", "not finite", "no fingerprint", "missing"])
def test_a_damaged_expert_is_not_written(
    online: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    source = shutil.copytree(BANK_FOLDER / "math", tmp_path / "source")
    weights = source / "adapter_model.safetensors"
    if damage == "not finite":
        from safetensors.torch import load_file, save_file

        save_file({key: tensor / 0 for key, tensor in load_file(weights).items()}, weights)
    elif damage == "no fingerprint":
        config = json.loads((source / CONFIG_NAME).read_text())
        (source / CONFIG_NAME).write_text(json.dumps({**config, "base_fingerprint": None}))
    else:
        weights.rename(source / "adapter_model.bin") if damage == "pickle" else weights.unlink()
    online.put("user/math", source)
    assert main(["pull", "user/math", "--output", str(tmp_path / "new")]) == 1
    message = {"pickle": "is missing", "missing": "is missing", "not finite": "not finite"}.get(
        damage, "no fingerprint"
    )
    said = capsys.readouterr().err
    assert said.startswith("peft-svf pull: user/math at ") and message in said and said.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["push", "nowhere", "user/x"], "there is no folder nowhere"),
        (["push", "{bank}/base", "user/x"], "holds neither an expert (no adapter_config.json) nor a bank"),
        (["push", "{bank}/math", "user/x"], "push the base model first"),
        (["push", "{bank}/math", "user/x", "--include-base"], "--include-base is for banks"),
        (["push", "{bank}", "user/x"], "--include-base"),
        (["push", "{bank}/math", "a b/x", "--base-model", "user/base"], "it is USER/NAME"),
        (["pull", "user/x"], "user/x"),
        (["pull", "user/base", "--revision", "v9"], "no branch, tag or commit 'v9'"),
    ],
)
def test_what_cannot_be_is_one_line_with_the_remedy(
    online: Any, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(bank=BANK_FOLDER) for word in words]) == 1
    said = capsys.readouterr().err
    assert message in said and said.startswith(f"peft-svf {words[0]}: ") and said.count("\n") == 1
    assert set(online.repositories) == {("model", "user/base")}
