"""`peft-svf adapt`: an ordinary expert from a few examples, compared on other prompts, and nothing lost on the way."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from peft_svf import ExpertBank
from peft_svf.cli import main
from peft_svf.cli.adapt import configurations
from peft_svf.cli.main import build_parser
from peft_svf.dispatch import FixedDispatcher
from peft_svf.dispatch.few_shot.examples import row_hashes
from peft_svf.dispatch.few_shot.population import Population
from peft_svf.playground import BANK_FOLDER, generate_problems
from peft_svf.trainers.evaluation import evaluate
from peft_svf.trainers.statistics import paired_difference_interval
from peft_svf.trainers.tasks import get_task


TASK = "playground-math"
SMALL = ["adapt", "--task", TASK, "-n", "3", "--population", "10", "--iterations", "2", "--use-cpu"]


def weights_of(output: Path) -> dict[str, float]:
    return json.loads((output / "adaptation.json").read_text())["weights"]


def test_expert_and_comparison_are_those_of_the_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "expert"
    assert main([*SMALL, "--output", str(output), "--test-prompts", "8", "--seed", "3"]) == 0
    weights, found = weights_of(output), json.loads((output / "results.json").read_text())
    assert sum(weights.values()) == pytest.approx(1)
    bank, task = ExpertBank.from_pretrained(BANK_FOLDER), get_task(TASK)
    test = task.load("test", 11)
    rows = test.select([test["id"].index(name) for name in found["evaluation"]["ids"]])
    assert len(rows) == 8 and not set(row_hashes(rows)) & set(row_hashes(task.load("train", 3, 3)))
    shares = {}
    for name, by in (("base", "others"), ("best_expert", found["best_expert"]["name"]), ("mixture", weights)):
        dispatcher = FixedDispatcher(bank, by)
        shares[name] = evaluate(bank, bank.tokenizer, task, rows, dispatcher=dispatcher).shares()
        assert found[name]["success_per_prompt"] == shares[name]
    mean, low, high = paired_difference_interval(shares["base"], shares["mixture"])
    assert found["mixture"]["gain_over_base"] == {"mean": mean, "interval": [low, high]}
    inputs = bank.tokenizer("7 + 5", return_tensors="pt")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BANK_FOLDER / "base"), str(output))
    with torch.no_grad(), bank.routed(weights):
        torch.testing.assert_close(model.eval()(**inputs).logits, bank.model(**inputs).logits, atol=1e-4, rtol=1e-4)
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed and f"{weight:.3f}" in printed for name, weight in weights.items())
    assert "(best on the examples)" in printed and "too good as an estimate" in printed
    assert [path.name for path in output.parent.iterdir()] == ["expert"]  # the search is over, its folder gone


def test_an_interrupted_search_goes_on_to_the_same_mixture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main([*SMALL, "--output", str(whole)]) == 0
    outcomes, calls = Population.outcomes, 0

    def interrupted(self: Population, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return outcomes(self, *args)

    monkeypatch.setattr(Population, "outcomes", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main([*SMALL, "--output", str(resumed)])
    first = capsys.readouterr()
    assert f"the same command goes on from {resumed}.search" in first.err and "Going on with" not in first.out
    assert not resumed.exists() and Path(f"{resumed}.search").is_dir()
    assert main([*SMALL, "--output", str(resumed)]) == 0
    assert f"Going on with the search in {resumed}.search" in capsys.readouterr().out
    assert calls == 4  # one generation before, one after, and the references
    assert weights_of(resumed) == weights_of(whole)
    assert not Path(f"{resumed}.search").exists()


def test_examples_come_from_a_file_and_the_rest_of_it_is_unseen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output, state = tmp_path / "sizes.csv", tmp_path / "expert", tmp_path / "state"
    problems = generate_problems("reasoning", "test", 6)
    with file.open("w", newline="") as target:
        csv.writer(target).writerows([("prompt", "answer"), *((p.prompt, p.answer) for p in problems)])
    words = ["adapt", "--examples", str(file), "-n", "4", "--population", "10", "--iterations", "1", "--use-cpu"]
    words += ["--max-new-tokens", "24", "--output", str(output), "--test-prompts"]
    assert main([*words, "3"]) == 1
    assert "besides the 4 examples" in capsys.readouterr().err
    assert not output.exists()
    assert main([*words, "2", "--state", str(state)]) == 0
    record, found = (json.loads((output / name).read_text()) for name in ("adaptation.json", "results.json"))
    assert (record["examples"], found["evaluation"]["prompts"]) == (4, 2)
    rows = get_task(str(file)).load("test", data_files=str(file))
    unseen = rows.select([rows["id"].index(name) for name in found["evaluation"]["ids"]])
    assert sorted([*record["example_hashes"], *row_hashes(unseen)]) == sorted(row_hashes(rows))
    assert state.is_dir()  # the user's own folder stays


def test_nothing_is_saved_if_no_example_can_be_answered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, output = tmp_path / "riddles.csv", tmp_path / "expert"
    file.write_text("prompt,answer\nWhat is 2 + 2?,a blue whale\nWhat is 2 + 3?,a red fox\n")
    words = ["--population", "10", "--iterations", "1", "--max-new-tokens", "4", "--use-cpu"]
    assert main(["adapt", "--examples", str(file), "--output", str(output), *words]) == 1
    assert "No candidate answered any of the examples right" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], ["global-normalized"]),
        (["--free"], ["global-free"]),
        (["--per-layer"], ["grouped-normalized"]),
        (["--per_layer", "--free"], ["grouped-free"]),
        (["--cross-validate"], None),
    ],
)
def test_options_choose_the_configuration(words: list[str], names: list[str] | None) -> None:
    arguments = build_parser().parse_args([*SMALL, "--output", "x", *words])
    spaces = configurations(arguments, ExpertBank.from_pretrained(BANK_FOLDER))
    assert names == (None if spaces is None else [space.name for space in spaces])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "gsm8"], "Did you mean 'gsm8k'"),
        (["--cross-validate", "--free"], "--cross-validate tries --per-layer and --free itself"),
        (["--test-prompts", "1"], "--test-prompts must be at least 2"),
        (["--population", "1"], "population must be a whole number of at least 2"),
        (["--population", "4"], "a population of 4 makes 0 elites"),
        (["--model", "/nowhere"], "there is no bank or base model '/nowhere'"),
        (["--model", str(BANK_FOLDER / "base")], "there are no experts to mix"),
        (["--adapter", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--output", str(tmp_path / "expert"), *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("peft-svf adapt: ") and message in error
    assert not list(tmp_path.iterdir())


def test_a_folder_of_others_is_refused_before_anything_is_searched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main([*SMALL, "--output", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "is no expert of `peft-svf adapt`" in printed.err and "Searching" not in printed.out
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_cma_es_without_its_library_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([*SMALL, "--output", str(tmp_path / "expert"), "--optimizer", "cma-es"]) == 1
    assert "pip install 'peft-svf[cma]'" in capsys.readouterr().err
