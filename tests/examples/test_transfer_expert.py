"""The example and the study of transfer run, fill their tables and go on after an interruption; nothing is judged."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_svf.dispatch.few_shot.population import Population
from peft_svf.playground import BANK_FOLDER
from peft_svf.trainers.statistics import bootstrap_interval


EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
OPTIONS = ["--families", "reasoning", "--seeds", "1", "--test-prompts", "6", "--own-steps", "0", "--examples", "2"]
OPTIONS += ["--iterations", "1", "--population", "4"]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import transfer_expert

    yield transfer_expert
    for name in [name for name in sys.modules if name.split(".")[0] in ("transfer_expert", "transferring")]:
        del sys.modules[name]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """The playground's base model, a little changed."""
    model = AutoModelForCausalLM.from_pretrained(BANK_FOLDER / "base")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 1.1
    model.save_pretrained(tmp_path / "changed")
    AutoTokenizer.from_pretrained(BANK_FOLDER / "base").save_pretrained(tmp_path / "changed")
    return tmp_path / "changed"


@pytest.fixture
def run(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(*words: object) -> None:
        monkeypatch.setattr(sys, "argv", ["transfer_expert.py", *map(str, words)])
        example.main()

    return run


def test_one_expert_is_reported_and_compared_with_controls(
    run: Callable[..., None], target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--to", target, "--test-prompts", 4)
    printed = capsys.readouterr().out
    assert "28 matched, 0 interpolated, 0 unmatched" in printed and "base model " in printed
    assert all(f"\n{name} " in printed for name in ("transferred", "shuffled", "reversed", "random"))


def test_the_study_fills_its_tables_and_goes_on(
    run: Callable[..., None], target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "study"
    words = ["--study", "--to", target, "--output", output, *OPTIONS]
    run(*words)
    lines = (output / "cells.jsonl").read_text().splitlines()
    cells = [json.loads(line) for line in lines[1:]]
    methods = ["base model", "ordered", "reversed", "shuffled", "random"]
    few_shot = ["few-shot over transferred experts", "few-shot over shuffled experts"]
    assert [cell["method"] for cell in cells] == [*methods, *methods, *few_shot]
    assert all(len(cell["successes"]) == 6 and cell["seconds"] > 0 for cell in cells)
    found = json.loads((output / "results.json").read_text())
    ((name, tasks),) = found.items()
    assert name.startswith("changed-") and list(tasks) == ["playground-reasoning", "playground-reasoning-hard"]
    right = {cell["method"]: cell["successes"] for cell in cells[:5]}
    ordered = tasks["playground-reasoning"]["methods"]["ordered"]
    difference = [a - b for a, b in zip(right["ordered"], right["base model"], strict=True)]
    assert ordered["minus_base"]["mean"] == pytest.approx(bootstrap_interval([difference])[0])
    report = (output / "report.md").read_text()
    assert "Table 5 in miniature" in report and "| ordered − shuffled | |" in report

    # killed while the last line was written: that cell is measured again, the others are not
    (output / "cells.jsonl").write_text("\n".join(lines)[:-30])
    outcomes, calls = Population.outcomes, []

    def counted(self: Population, *arguments: object) -> object:
        calls.append(len(self.prompts))
        return outcomes(self, *arguments)

    monkeypatch.setattr(Population, "outcomes", counted)
    run(*words)
    assert sorted(calls) == [2, 2, 6]  # a generation and the references on two examples, then the test prompts
    again = [json.loads(line) for line in (output / "cells.jsonl").read_text().splitlines()[1:]]
    assert [{**cell, "seconds": 0} for cell in again] == [{**cell, "seconds": 0} for cell in cells]
    with pytest.raises(ValueError, match="another test_prompts"):
        run(*words, "--test-prompts", 7)
