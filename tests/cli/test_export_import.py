"""`peft-svf export` and `peft-svf import`: what they print is measured on what they wrote."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_svf import ExpertBank
from peft_svf.cli import banks, main
from peft_svf.experts import Expert
from peft_svf.playground import BANK_FOLDER


BASE = BANK_FOLDER / "base"
IDS = torch.tensor([[1, 5, 8, 9, 20]])


@pytest.fixture(scope="module")
def bank() -> ExpertBank:
    return ExpertBank.from_pretrained(BANK_FOLDER)


@pytest.fixture
def loaded_once(bank: ExpertBank, monkeypatch: pytest.MonkeyPatch) -> ExpertBank:
    """The playground's bank, which commands get instead of loading it again."""
    monkeypatch.setattr(banks, "load_bank", lambda arguments, state: bank)
    return bank


def expected(bank: ExpertBank, route: str | dict[str, float]) -> torch.Tensor:
    with torch.no_grad(), bank.routed(route):
        return bank.model(IDS).logits


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_a_mixture_as_a_merged_checkpoint(
    bank: ExpertBank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new" / "both"
    assert main(["export", "--mix", "math=0.7,code=0.3", "--to", "merged", "--output", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"0.7 math + 0.3 code as a merged checkpoint in {folder}: 3.39 MB, float32\n")
    rounded = re.search(r"rounded by (\S+) of the adapted weights, (\S+) of what", printed)
    assert rounded is not None and 1e-9 < float(rounded[1]) < 1e-7 < float(rounded[2]) < 1e-5
    assert f"transformers serve {folder} --host" in printed and f"vllm serve {folder}\n" in printed
    merged = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.allclose(logits(merged), expected(bank, {"math": 0.7, "code": 0.3}), atol=1e-4)


def test_an_expert_beside_a_base_model_as_a_lora(
    bank: ExpertBank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = f"mine={BANK_FOLDER / 'code'}"
    words = ["--model", str(BASE), "--adapter", place, "--to", "lora", "--output", str(tmp_path / "lora")]
    assert main(["export", *words, "--keep-energy", "1.0"]) == 0
    printed = capsys.readouterr().out
    assert "relative error of what it changes: 0 (" in printed
    rank = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"]
    assert rank == 128 and f"--max-lora-rank 128 --lora-modules mine={tmp_path / 'lora'}" in printed
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "lora")
    assert torch.allclose(logits(lora), expected(bank, "code"), atol=1e-3)


def test_a_mixture_as_a_lora_of_a_rank_vllm_knows(
    loaded_once: ExpertBank, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = loaded_once
    words = ["--mix", "math=0.5,code=0.5", "--to", "lora", "--rank", "20", "--output", str(tmp_path / "lora")]
    assert main(["export", *words]) == 0
    printed = capsys.readouterr().out
    error = re.search(r"relative error of what it changes: (\S+) ", printed)
    assert error is not None and 0.1 < float(error[1]) < 0.9 and "--max-lora-rank 32 " in printed
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), tmp_path / "lora")
    wanted = expected(bank, {"math": 0.5, "code": 0.5})
    assert (logits(lora) - wanted).norm() < (expected(bank, "others") - wanted).norm()


def test_a_folder_for_mergekit(loaded_once: ExpertBank, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "kit"
    words = ["--mix", "math=0.7,code=0.3", "--to", "mergekit", "--output", str(folder), "--dtype", "bfloat16"]
    assert main(["export", *words]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"2 experts for mergekit in {folder}: 3.44 MB\n")
    assert re.search(r"  math: rounded by 0\.0017 of the adapted weights", printed)
    assert f"cd {folder} && mergekit-yaml mergekit.yaml merged" in printed
    assert {path.name for path in folder.iterdir()} == {"math", "code", "mergekit.yaml"}
    assert "out_dtype: bfloat16" in (folder / "mergekit.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "merged"], "which expert? --expert NAME, or --mix: the bank has math, code, reasoning"),
        (["--to", "merged", "--expert", "poet"], "Unknown expert 'poet'"),
        (["--to", "merged", "--expert", "others"], "base model itself"),
        (["--to", "lora", "--expert", "others", "--rank", "4"], "base model itself"),
        (["--to", "lora", "--expert", "math"], "--to lora needs --rank N, or --keep-energy"),
        (["--to", "lora", "--expert", "math", "--rank", "999"], "`rank` must be between 1 and 128"),
        (
            ["--to", "lora", "--expert", "math", "--rank", "9", "--dtype", "float16"],
            "--dtype and --fast",
        ),
        (["--to", "merged", "--expert", "math", "--rank", "9"], "for LoRAs"),
        (["--to", "merged", "--expert", "math", "--density", "0.5"], "are for --to mergekit"),
        (["--to", "mergekit", "--expert", "poet"], "There is no expert 'poet' to export"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_writes_nothing(
    words: list[str],
    message: str,
    loaded_once: ExpertBank,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["export", *words, "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("peft-svf export: ") and message in error
    assert list(tmp_path.iterdir()) == []


def test_a_base_model_without_experts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--to", "merged", "--model", str(BASE), "--output", str(tmp_path / "out")]) == 1
    assert "base model without experts: add one, --adapter EXPERT" in capsys.readouterr().err


def test_an_export_into_a_folder_with_something_else_loads_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "diary.txt").write_text("dear diary")
    words = ["--model", "nobody/nothing", "--to", "merged", "--output", str(tmp_path)]
    assert main(["export", *words]) == 1
    assert "is not empty; choose a new folder" in capsys.readouterr().err


def test_a_released_checkpoint_becomes_an_expert_that_generates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = AutoModelForCausalLM.from_pretrained(BASE)
    vectors = {
        key: torch.linspace(-0.5, 0.5, min(weight.shape)).to(torch.bfloat16)
        for key, weight in base.state_dict().items()
        if "mlp" in key
    }
    torch.save(vectors, tmp_path / "learnable_params.pt")
    folder = tmp_path / "expert"
    words = [str(tmp_path / "learnable_params.pt"), "--model", str(BASE), "--output", str(folder)]
    assert main(["import", *words, "--name", "math", "--label", "sums", "--description", "Sums of numbers."]) == 0
    printed = capsys.readouterr().out
    expert = Expert.from_pretrained(folder)
    count = sum(offset.numel() for offset in expert.offsets.values())
    assert f"math: {count:,} scales of {len(vectors)} of {len(vectors)} MLP weights" in printed
    facts = expert.metadata
    assert (facts["name"], facts["label"], facts["description"]) == ("math", "sums", "Sums of numbers.")
    assert facts["origin"]["operation"] == "import" and (folder / "README.md").is_file()
    shown = printed.splitlines()[-1].split()[1:-1]  # without the console script's name and PROMPT
    assert main([*shown, "7 + 5 = ?", "--max-new-tokens", "4"]) == 0
    assert main(["import", *words]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_what_cannot_be_imported_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(path: Path, model: Path, message: str) -> None:
        output = tmp_path / "expert"
        assert main(["import", str(path), "--model", str(model), "--output", str(output)]) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("peft-svf import: ") and message in error and not output.exists()

    refused(tmp_path / "missing.pt", BASE, "There is no file")
    torch.save({"model.layers.9.mlp.up_proj.weight": torch.zeros(4)}, tmp_path / "other.pt")
    refused(tmp_path / "other.pt", BASE, "another base model")
    refused(tmp_path / "other.pt", BANK_FOLDER, "is a bank; give the base model")
    refused(tmp_path / "other.pt", tmp_path / "nothing", "there is no base model")
