"""`peft-svf transfer`: the report comes first, nothing is half written, and `adapt` mixes what was transferred."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_svf.cli import main
from peft_svf.experts import Expert
from peft_svf.experts.transfer import transfer
from peft_svf.playground import BANK_FOLDER


MATH = str(BANK_FOLDER / "math")


@pytest.fixture(scope="module")
def other_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The playground's base model with three of its four layers, all of them a little changed."""
    folder = tmp_path_factory.mktemp("bases") / "shallow"
    model = AutoModelForCausalLM.from_pretrained(BANK_FOLDER / "base", num_hidden_layers=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BANK_FOLDER / "base").save_pretrained(folder)
    return str(folder)


def test_the_expert_is_that_of_transfer(other_base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, file = tmp_path / "new" / "math", tmp_path / "report.json"
    words = ["transfer", "--from", MATH, "--to", other_base, "--output", str(output), "--report", str(file)]
    words += ["--control", "shuffled", "--seed", "3", "--from-model", str(BANK_FOLDER / "base")]
    assert main(words) == 0
    target = AutoModelForCausalLM.from_pretrained(other_base)
    source = AutoModelForCausalLM.from_pretrained(BANK_FOLDER / "base")
    expected = transfer(Expert.from_pretrained(MATH), target, control="shuffled", seed=3, source_model=source)
    found = Expert.from_pretrained(output)
    assert found.offsets.keys() == expected.expert.offsets.keys()
    assert all(torch.equal(found.offsets[name], offset) for name, offset in expected.expert.offsets.items())
    assert found.metadata["origin"]["settings"]["control"] == "shuffled"
    assert (output / "README.md").is_file() and other_base not in (output / "README.md").read_text()
    report = json.loads(file.read_text())
    assert report["totals"] == {"matched": 14, "interpolated": 7, "unmatched": 0, "unused": 0}
    assert 0 < report["median_spectra_distance"] < 1
    printed = capsys.readouterr().out
    assert expected.report.to_text() in printed and "control: shuffled, seed 3" in printed
    assert printed.index("14 matched") < printed.index(f"is in {output}")
    found.put_into(target, "math")


def test_a_dry_run_and_an_error_write_nothing(
    other_base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["transfer", "--from", MATH, "--to", other_base]
    assert main([*words, "--dry-run"]) == 0
    assert "14 matched, 7 interpolated" in capsys.readouterr().out
    assert main(words) == 1
    assert "--output is missing" in capsys.readouterr().err
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    assert main([*words, "--output", str(tmp_path / "notes")]) == 1
    assert "exists and is no expert" in capsys.readouterr().err
    assert main([*words, "--output", MATH]) == 1
    assert "is the expert that is transferred" in capsys.readouterr().err
    assert main([*words, "--output", str(tmp_path / "new"), "--from-model", other_base]) == 1
    assert "is not the base model of" in capsys.readouterr().err
    assert main(["transfer", "--from", str(tmp_path), "--to", other_base, "--dry-run"]) == 1
    assert "holds no adapter" in capsys.readouterr().err
    assert main(["transfer", "--from", MATH, "--to", str(tmp_path / "none"), "--dry-run"]) == 1
    assert "there is no base model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_transferred_experts_are_mixed_by_adapt(
    other_base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("math", "reasoning"):
        words = ["transfer", "--from", str(BANK_FOLDER / name), "--to", other_base, "--output", str(tmp_path / name)]
        assert main(words) == 0
    words = ["adapt", "--model", other_base, "--adapter", f"one={tmp_path / 'math'}"]
    words += ["--adapter", str(tmp_path / "reasoning")]
    words += ["--task", "playground-reasoning", "-n", "4", "--population", "10", "--iterations", "1", "--use-cpu"]
    assert main([*words, "--output", str(tmp_path / "mixed")]) == 0, capsys.readouterr().err
    weights = json.loads((tmp_path / "mixed" / "adaptation.json").read_text())["weights"]
    assert weights.keys() == {"one", "reasoning"} and sum(weights.values()) == pytest.approx(1)
