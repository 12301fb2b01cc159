"""`peft-svf evaluate`: base and experts on the same prompts, the table, the JSON file, and mistakes named early."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_svf import ExpertBank
from peft_svf.cli import main
from peft_svf.playground import BANK_FOLDER
from peft_svf.trainers.evaluation import evaluate_success
from peft_svf.trainers.statistics import paired_difference_interval, wilson_interval
from peft_svf.trainers.tasks import get_task


BASE = str(BANK_FOLDER / "base")
REQUIRED = ["evaluate", "--model", BASE, "--task", "playground-math", "--use-cpu"]


def test_base_and_experts_on_the_same_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The numbers are those of the experts in the bank, which loads them in another way."""
    output = tmp_path / "new" / "results.json"
    adapters = [str(BANK_FOLDER / name) for name in ("math", "code")]
    assert main([*REQUIRED, "--adapter", *adapters, "-n", "40", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    bank, task = ExpertBank.from_pretrained(BANK_FOLDER), get_task("playground-math")
    rows = task.load("test", 40)
    assert found["evaluation"]["ids"] == rows["id"]
    with bank.base_only() as model:
        base = evaluate_success(model, bank.tokenizer, task, rows, 7)
    assert found["base"]["success_per_prompt"] == base
    for name in ("math", "code"):
        bank.model.set_adapter(name)
        expected = evaluate_success(bank.model, bank.tokenizer, task, rows, 7)
        entry = found["experts"][name]
        assert entry["success_per_prompt"] == expected
        assert entry["interval"] == pytest.approx(wilson_interval(sum(expected), 40))
        mean, low, high = paired_difference_interval(base, expected)
        assert entry["gain_over_base"]["mean"] == pytest.approx(mean)
        assert entry["gain_over_base"]["interval"] == pytest.approx([low, high])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["math", "40", f"{100 * found['experts']['math']['success']:.1f}", "%"] in [line[:4] for line in lines]


def test_answers_are_shown_with_their_verdicts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*REQUIRED, "--adapter", str(BANK_FOLDER / "math"), "-n", "12", "--show", "12"]) == 0
    printed = capsys.readouterr().out
    prompt = get_task("playground-math").load("test", 12)[0]["prompt"][0]["content"]
    assert prompt in printed
    assert printed.count("-> right: ") + printed.count("-> wrong: ") == 24
    assert "-> wrong: stated " in printed


def test_samples_count_once_for_each_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results.json"
    words = ["-n", "10", "--temperature", "1", "--samples", "3", "--output", str(output)]
    assert main([*REQUIRED, *words]) == 0
    found = json.loads(output.read_text())
    shares = found["base"]["success_per_prompt"]
    assert len(shares) == 10 and {round(3 * share, 9) for share in shares} <= {0, 1, 2, 3}
    assert found["base"]["success"] == pytest.approx(sum(shares) / 10)
    assert (found["evaluation"]["temperature"], found["evaluation"]["samples"]) == (1.0, 3)
    assert "3 answers for each prompt" in capsys.readouterr().out
    assert main([*REQUIRED, *words]) == 0
    assert json.loads(output.read_text())["base"] == found["base"]


def test_rows_come_from_files_and_of_the_split_asked_for(tmp_path: Path) -> None:
    table = tmp_path / "sums.csv"
    table.write_text("prompt,answer\n" + "".join(f"What is {i} + 1?,{i + 1}\n" for i in range(8)))
    output = tmp_path / "results.json"
    words = ["evaluate", "--model", BASE, "--task", str(table), "--use-cpu", "--max-new-tokens", "4"]
    assert main([*words, "--split", "validation", "--output", str(output)]) == 0
    evaluation = json.loads(output.read_text())["evaluation"]
    assert (evaluation["split"], evaluation["prompts"], evaluation["max_new_tokens"]) == ("validation", 4, 4)
    assert main([*words, "--data-files", f"test={table}", "--output", str(output)]) == 0
    assert json.loads(output.read_text())["evaluation"]["prompts"] == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "gsm8"], "Did you mean 'gsm8k'"),
        (["--model", "/nowhere"], "there is no base model '/nowhere'"),
        (["--adapter", "/nowhere"], "/nowhere"),
        (["--samples", "2"], "--samples needs a --temperature above 0"),
        (["--temperature", "-1"], "--temperature is 0 (greedy) or positive"),
        (["-n", "1"], "--prompts must be at least 2"),
        (["--output", "."], "--output takes the name of a file"),
        (["--chat-template-kwargs", "{"], "--chat-template-kwargs is not JSON"),
        (["--data-files", "a.csv", "train=b.csv"], "or NAME=path for each of them"),
        (["--load-in-4bit", "--load-in-8bit"], "exclude each other"),
    ],
)
def test_mistakes_are_named_in_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*REQUIRED, *words]) == 1
    error = capsys.readouterr().err
    assert "peft-svf evaluate: " in error and message in error
    assert "Traceback" not in error
