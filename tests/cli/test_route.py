"""`peft-svf route`: the dispatcher's scores, and for labelled prompts accuracy, confusions and doubts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from peft_svf import ExpertBank, PromptDispatcher
from peft_svf.cli import main
from peft_svf.cli.confusion import ConfusionMatrix
from peft_svf.cli.questions import Question
from peft_svf.cli.route import Choice, scores_table
from peft_svf.playground import BANK_FOLDER, generate_problems
from peft_svf.trainers.statistics import wilson_interval


PROMPTS = {
    family: [problem.prompt for problem in generate_problems(family, "test", 4)]
    for family in ("math", "code", "reasoning", "others")
}


def write_table(path: Path, rows: list[tuple[str, str]]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("prompt", "label"), *rows])
    return str(path)


@pytest.fixture
def table(tmp_path: Path) -> str:
    """Every family under its label, but two prompts of code are called math."""
    rows = [(prompt, family) for family, prompts in PROMPTS.items() for prompt in prompts]
    wrong = [(prompt, "math") for prompt in PROMPTS["code"][:2]]
    return write_table(tmp_path / "labelled.csv", [row for row in rows if row[0] not in PROMPTS["code"][:2]] + wrong)


def test_scores_are_those_of_the_dispatcher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [PROMPTS["math"][0], PROMPTS["code"][0]]
    output = tmp_path / "new" / "scores.json"
    assert main(["route", *prompts, "--calibrate", "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    bank = ExpertBank.from_pretrained(BANK_FOLDER)
    route = PromptDispatcher(bank, calibrate=True).route(prompts)
    for row, scores, name in zip(found["prompts"], route.scores, route.names(), strict=True):
        assert row["scores"] == pytest.approx(scores, abs=1e-5)
        assert row["chosen"] == name
        best, second = sorted(scores.values(), reverse=True)[:2]
        assert row["lead"] == pytest.approx(best - second, abs=1e-5)
    assert (found["dispatcher"], found["calibrated"]) == ("prompt", True)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["prompt", "chosen", "lead", "math", "code", "reasoning", "others"]
    assert " math " in printed[1] and " code " in printed[2]


def test_labelled_prompts_give_accuracy_confusions_and_a_picture(
    table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    output, picture = tmp_path / "scores.json", tmp_path / "confusion.png"
    words = ["--batch-size", "3", "--unsure", "2", "--output", str(output), "--plot", str(picture)]
    assert main(["route", "--file", table, *words]) == 0
    found = json.loads(output.read_text())
    assert found["accuracy"] == 14 / 16
    assert found["interval"] == pytest.approx(wilson_interval(14, 16))
    assert found["confusion"] == {
        "true": ["math", "code", "reasoning", "others"],
        "chosen": ["math", "code", "reasoning", "others"],
        "counts": [[4, 2, 0, 0], [0, 2, 0, 0], [0, 0, 4, 0], [0, 0, 0, 4]],
    }
    assert [row["label"] for row in found["prompts"][-2:]] == ["math", "math"]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    low, high = (100 * bound for bound in wilson_interval(14, 16))
    assert f"87.5 % [{low:.1f}, {high:.1f}] of 16" in printed
    cells = [line.split()[:5] for line in printed.splitlines()]
    assert ["math", "4", "2", "0", "0"] in cells and ["code", "0", "2", "0", "0"] in cells
    unsure = printed.partition("Least certain prompts\n")[2].splitlines()[1:-1]
    least = sorted(found["prompts"], key=lambda row: row["lead"])[:2]
    assert [line[2:20] for line in unsure] == [row["prompt"][:18] for row in least]


def test_margin_sends_everything_to_the_base_model(table: str, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    assert main(["route", "--file", table, "--margin", "1", "--output", str(output)]) == 0
    assert [row[3] for row in json.loads(output.read_text())["confusion"]["counts"]] == [6, 2, 4, 4]


def test_many_labels_leave_room_on_the_terminal() -> None:
    labels = tuple(f"label{i:03}" for i in range(300))
    matrix = ConfusionMatrix(labels, labels, (labels[1], *labels[1:]))
    assert matrix.text().split() == ["true", "chosen", "prompts", "label000", "label001", "1"]
    assert ConfusionMatrix(labels, labels, labels).text() == "No prompt got another label than its own"
    scores = dict.fromkeys(labels, 0.001) | {"label007": 0.5, "label008": 0.201}
    shown = scores_table([Question("a prompt")], [Choice("label007", scores)])
    assert "label007 0.500, label008 0.201, label000 0.001" in shown
    assert max(map(len, shown.splitlines())) < 120


def test_the_lead_is_that_over_the_second_label() -> None:
    assert Choice("math", {"code": 0.3, "math": 0.6, "others": 0.1}).lead == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hi", "--plot", "x.png"], "--plot draws chosen against true labels"),
        (["hi", "--output", "."], "--output takes the name of a file"),
        (["hi", "--output", "scores.csv"], "the name must end in .json"),
        (["hi", "--model", str(BANK_FOLDER / "base")], "has no experts to route to"),
        (["hi", "--dispatcher", "classifier"], "no classification expert"),
    ],
)
def test_mistakes_are_named_in_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", *words]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("peft-svf route: ") and message in printed.err
    assert not printed.out


@pytest.mark.parametrize(
    ("rows", "words", "message"),
    [
        ([("hi", "maths")], [], "row 1 of {file} has the label 'maths', but the bank knows math, code"),
        ([("hi", "math"), ("ho", "")], [], "row 2 of {file} has no `label`, but others have"),
        ([("hi", "math")], ["--plot", "confusion.doc"], "--plot confusion.doc: the name must end in"),
    ],
)
def test_wrong_labels_are_named(
    rows: list[tuple[str, str]],
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write_table(tmp_path / "labelled.csv", rows)
    assert main(["route", "--file", file, *words]) == 1
    assert message.format(file=file) in capsys.readouterr().err
