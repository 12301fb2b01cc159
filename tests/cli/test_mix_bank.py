"""`peft-svf mix` and `peft-svf bank` on the playground's files, against the algebra and the live bank."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_svf import ExpertBank
from peft_svf.cli import main
from peft_svf.experts import Expert, ExpertEntry, algebra
from peft_svf.playground import BANK_FOLDER


MATH, CODE, REASONING = (str(BANK_FOLDER / name) for name in ("math", "code", "reasoning"))
BASE = str(BANK_FOLDER / "base")
PLAIN = "--no-pictures"
Run = Callable[..., str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command that must succeed, and returns what it prints."""

    def command(*words: str) -> str:
        assert main(list(words)) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return command


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def experts(*folders: str) -> list[Expert]:
    return [Expert.from_pretrained(folder) for folder in folders]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["math=0.7", "code=0.3"], lambda m, c: algebra.mix([m, c], [0.7, 0.3])),
        ([f"{MATH}=0.7", "code=-0.4", "--paper-convention"], lambda m, c: algebra.mix([m, c], [0.7, -0.4], False)),
        (["math=3", "code=1", "--normalize"], lambda m, c: algebra.mix([m, c], [3, 1], normalize=True)),
        (["math", "code", "--interpolate", "0.2"], lambda m, c: algebra.interpolate(m, c, 0.2)),
        (["math", "code", "--difference"], algebra.difference),
        (["math", "code", "--average"], lambda m, c: algebra.average([m, c])),
        (["math", "--scale", "-0.5"], lambda m, c: algebra.scale(m, -0.5)),
        (["--negate", "math"], lambda m, c: algebra.negate(m)),
        (["math", "--top-components", "5"], lambda m, c: algebra.top_components(m, 5)),
        (["math", "--top-components", "0.5"], lambda m, c: algebra.top_components(m, 0.5)),
        (["--shuffle", "math", "--seed", "3"], lambda m, c: algebra.shuffle(m, 3)),
        (["math", "--reverse"], lambda m, c: algebra.reverse(m)),
        (["math", "--random-like"], lambda m, c: algebra.random_like(m, 0)),
    ],
    ids=lambda value: " ".join(value).replace(MATH, "folder") if isinstance(value, list) else "",
)
def test_every_operation_saves_what_the_algebra_makes(words, expected, run: Run, tmp_path: Path) -> None:
    output = tmp_path / "new"
    text = ["--label", "both", "--description", "a new one"]
    printed = run("mix", *words, "--bank", "playground", "--output", str(output), PLAIN, *text)
    found, wanted = Expert.from_pretrained(output), expected(*experts(MATH, CODE))
    assert all(torch.equal(found.offsets[name], offset) for name, offset in wanted.offsets.items())
    assert found.metadata["origin"] == wanted.metadata["origin"]
    assert found.metadata["name"] == "new" and found.metadata["label"] == "both"
    assert "results" not in found.metadata and found.base_model == BASE
    assert wanted.metadata["origin"]["formula"] in printed and str(output) in printed
    assert "a new one" in found.metadata["description"] and (output / "README.md").read_text().count("# new") == 1
    assert ("standard deviation of an offset over the 2 experts" in printed) == ("--average" in words)


def test_comparison_prints_cosine_overlap_and_chance(run: Run) -> None:
    printed = run("mix", "--compare", "math", "code", REASONING, "--bank", "playground").splitlines()
    several = experts(MATH, CODE, REASONING)
    cosine, overlap = algebra.cosine_similarity(several), algebra.overlap(several)
    rows = [line.split() for line in printed]
    for names, matrix in ((rows[1:5], cosine), (rows[6:10], overlap)):
        assert names[0] == ["expert", "math", "code", "reasoning"]
        for row, values in zip(names[1:], matrix.tolist(), strict=True):
            assert row[1:] == [f"{value:.3f}" for value in values]
    assert f"({algebra.chance_overlap(several):.3f}: chance)" in printed[5]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["math", "--output", "{out}"], "math has no weight: it is EXPERT=WEIGHT"),
        (["math=1"], "--output FOLDER is missing"),
        (["math=much", "--output", "{out}"], "EXPERT=WEIGHT with a finite number"),
        (["maths=1", "--output", "{out}"], "has no expert 'maths', only math, code, reasoning"),
        (["math=1", "--negate", "--output", "{out}"], "--negate takes no weights: leave out that of math"),
        (["math", "code", "--negate", "--output", "{out}"], "--negate takes 1 expert, not 2"),
        (["math", "--difference", "--output", "{out}"], "--difference takes 2 experts, not 1"),
        (["math", "--negate", "--normalize", "--output", "{out}"], "are about mixtures, not about --negate"),
        (["math", "--compare", "--output", "{out}"], "leave out --output"),
        (["math=1", "code=-1", "--normalize", "--output", "{out}"], "sum to 0"),
        (["math=1", "--output", BASE], "not only an expert; choose a new folder"),
        (["nowhere/at/all=1", "--output", "{out}"], "nowhere/at/all"),
    ],
)
def test_mistakes_in_mix_are_named_and_nothing_is_written(words, message, tmp_path, capsys) -> None:
    words = [word.format(out=tmp_path / "new") for word in words]
    assert main(["mix", *words, "--bank", "playground"]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("peft-svf mix: ") and message in printed.err and not printed.out
    assert not list(tmp_path.iterdir())


def test_experts_of_another_base_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = other_base(tmp_path / "other")
    for words in (
        ["mix", f"{MATH}=1", f"{other}=1", "--output", str(tmp_path / "new")],
        ["bank", "create", str(tmp_path / "new"), "--model", BASE, "--expert", MATH, "--expert", f"{other}:other"],
    ):
        assert main(words) == 1
        error = capsys.readouterr().err
        assert "different base models: 'model.layers.0.mlp.down_proj' differs" in error
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def other_base(folder: Path) -> str:
    """The expert math with the fingerprint of another base model."""
    shutil.copytree(MATH, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_fingerprint"]["model.layers.0.mlp.down_proj"][3] += 10
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def test_a_bank_is_made_and_changed_and_answers_as_its_experts_do(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "bank"
    words = ["--expert", f"sums={MATH}:arithmetic", "--expert", CODE]
    printed = run("bank", "create", str(folder), "--model", BASE, *words, PLAIN)
    assert (folder / "README.md").read_text().count("# bank") == 1
    assert "2 experts, base model: " in printed and "48.2 % -> 99.6 % (playground-math" in printed
    words = ["--label", "choice", "--description", "multiple choice"]
    run("bank", "add", str(folder), f"choose={REASONING}", *words, PLAIN)
    run("bank", "rename", str(folder), "code", "programs", "--label", "python", PLAIN)
    run("bank", "describe", str(folder), "sums", "--description", "word problems", PLAIN)
    bank = ExpertBank.from_pretrained(folder)
    assert bank.experts == {
        "sums": ExpertEntry("arithmetic", "word problems"),
        "programs": ExpertEntry("python", "small Python functions of one number"),
        "choose": ExpertEntry("choice", "multiple choice"),
    }
    assert bank.facts["programs"]["results"] == Expert.from_pretrained(CODE).metadata["results"]
    whole = ExpertBank.from_pretrained(BANK_FOLDER)
    ids = torch.arange(5, 25).reshape(2, 10)
    for mine, theirs in (("sums", "math"), ("programs", "code"), ("choose", "reasoning")):
        with torch.no_grad(), bank.routed(mine) as model, whole.routed(theirs) as reference:
            assert torch.equal(model(ids).logits, reference(ids).logits)
    run("bank", "remove", str(folder), "choose", PLAIN)
    assert list(ExpertBank.from_pretrained(folder).experts) == ["sums", "programs"]
    assert not (folder / "choose").exists() and (folder / "programs" / "expert.json").is_file()


@pytest.fixture(scope="module")
def prototype(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prototype") / "bank"
    words = ["--expert", MATH, "--expert", CODE, "--classifier", f"judge={REASONING}", PLAIN]
    assert main(["bank", "create", str(folder), "--model", BASE, *words]) == 0
    return folder


def test_an_edit_keeps_everything_else_and_copies_no_weights(run: Run, prototype: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(prototype, tmp_path / "bank")
    (folder / "notes.txt").write_text("mine")
    (folder / "base").mkdir()
    save_file({"x": torch.ones(2)}, folder / "base" / "model.safetensors")
    before, inode = snapshot(folder), os.stat(folder / "base" / "model.safetensors").st_ino
    assert "(classifier)" in run("bank", "rename", str(folder), "judge", "umpire", PLAIN)
    after = snapshot(folder)
    assert ExpertBank.from_pretrained(folder).classifier == "umpire"
    moved = {key.replace("judge/", "umpire/"): value for key, value in before.items()}
    assert after.keys() == moved.keys()
    changed = {key for key in after if after[key] != moved[key]}
    assert {"config.json"} <= changed <= {"config.json", "README.md", "umpire/README.md"}
    assert os.stat(folder / "base" / "model.safetensors").st_ino == inode
    assert snapshot(prototype).keys() == {key for key in before if key not in ("notes.txt", "base/model.safetensors")}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["add", "{bank}", MATH], "has 'math' already"),
        (["add", "{bank}", f"others={REASONING}"], "'others' cannot name an expert"),
        (["add", "{bank}", f"new={MATH}"], "label is unique"),
        (["add", "{bank}", f"new={BASE}"], "adapter_config.json"),
        (["add", "{bank}", "new={other}", "--label", "n"], "different base models: 'model.layers.0.mlp.down_proj'"),
        (["add", "{bank}", "new={broken}", "--label", "n"], "not finite"),
        (["remove", "{bank}", "typo"], "no 'typo' to remove; it has 'math', 'code', 'judge'"),
        (["rename", "{bank}", "typo", "x"], "no 'typo' to rename"),
        (["rename", "{bank}", "math", "code"], "has 'code' already"),
        (["rename", "{bank}", "math", "../out"], "cannot name an expert"),
        (["rename", "{bank}", "math", "x", "--label", "code"], "a label is unique"),
        (["rename", "{bank}", "judge", "x", "--label", "y"], "classifier, which has no label"),
        (["describe", "{bank}", "math"], "give a --label"),
        (["describe", "{bank}", "judge", "--label", "y"], "classifier, which has no label"),
        (["remove", "{none}", "math"], "no bank folder"),
        (["create", "{bank}", "--model", BASE, "--expert", MATH], "exists; choose a new folder"),
        (["create", "{none}", "--model", "{none}", "--expert", MATH], "no base model"),
        (["create", "{none}", "--model", BASE, "--expert", "math={none}"], "no expert in"),
        (["create", "{none}", "--model", BASE, "--expert", MATH, "--expert", f"math={CODE}"], "two experts 'math'"),
        (["list", "{none}"], "no bank folder"),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else value,
)
def test_mistakes_in_bank_are_named_and_nothing_changes(words, message, prototype, tmp_path, capsys) -> None:
    places = {"bank": prototype, "none": tmp_path / "none", "other": tmp_path / "other", "broken": tmp_path / "broken"}
    if "new={other}" in words:
        other_base(places["other"])
    if "new={broken}" in words:
        shutil.copytree(MATH, places["broken"])
        tensors = load_file(places["broken"] / "adapter_model.safetensors")
        next(iter(tensors.values()))[0] = torch.inf
        save_file(tensors, places["broken"] / "adapter_model.safetensors", {"format": "pt"})
    before = snapshot(prototype)
    assert main(["bank", *(word.format(**places) for word in words)]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("peft-svf bank: ") and message in printed.err and not printed.out
    assert snapshot(prototype) == before and not (tmp_path / "none").exists()
    assert [path.name for path in prototype.parent.iterdir()] == ["bank"]


def test_the_last_expert_stays(run: Run, prototype: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(prototype, tmp_path / "bank")
    run("bank", "remove", str(folder), "math", PLAIN)
    run("bank", "remove", str(folder), "judge", PLAIN)
    assert main(["bank", "remove", str(folder), "code"]) == 1
    assert "'code' is the only expert of the bank" in capsys.readouterr().err


def test_a_failing_card_leaves_the_bank_as_it_was(prototype: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(prototype, tmp_path / "bank")
    (folder / "bank.json").write_text("{")
    before = snapshot(folder)
    assert main(["bank", "remove", str(folder), "code", PLAIN]) == 1
    assert "bank.json" in capsys.readouterr().err
    assert snapshot(folder) == before and [path.name for path in tmp_path.iterdir()] == ["bank"]


def test_the_list_shows_the_playground_and_escapes_what_a_terminal_would_obey(
    run: Run, prototype: Path, tmp_path: Path
) -> None:
    shown = run("bank", "list")
    assert "playground: 3 experts, base model: its own" in shown
    assert [line.split()[:4] for line in shown.splitlines()[2:]] == [
        [name, name, "3,072", str(Expert.from_pretrained(BANK_FOLDER / name).fingerprint_id)]
        for name in ("math", "code", "reasoning")
    ]
    folder = shutil.copytree(prototype, tmp_path / "bank")
    config = json.loads((folder / "config.json").read_text())
    config["experts"]["math"]["description"] = "\x1b[2J gone"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code" / "expert.json").write_text('{"results": 7}')
    shown = run("bank", "list", str(folder))
    assert "\x1b" not in shown and "\\x1b[2J gone" in shown and "unusable: " in shown
