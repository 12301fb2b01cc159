"""`peft-svf generate`: the pipeline's answers, from wherever the prompts come, and nothing that a terminal obeys."""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import PartialState
from transformers import pipeline

import peft_svf  # noqa: F401 - registers the pipeline
from peft_svf.answering import Processes
from peft_svf.cli import generate, main
from peft_svf.cli.banks import load_bank
from peft_svf.cli.terminal import indented, one_line, visible
from peft_svf.playground import BANK_FOLDER


APPLES = "Tom has 23 apples and buys 18 more. How many apples does Tom have?"
FUNCTION = "Write a function f(x) that returns x plus 3."
HOSTILE = "a\x1b[2J\x1b]0;title\x07b\rc\x9b31m\u202ed\x7f"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipeline("transformer2-generation", model=str(BANK_FOLDER))


def answer(pipe: Any, prompt: str, **kwargs: Any) -> str:
    return pipe(prompt, **kwargs)[0]["generated_text"]


def json_lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_prompts_are_answered_in_order_each_by_its_expert(pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [FUNCTION, APPLES, "Tell me a story about a king."]
    assert main(["generate", *prompts, "--json", "--batch-size", "2"]) == 0
    found = json_lines(capsys)
    assert [line["prompt"] for line in found] == prompts
    assert [line["expert"] for line in found] == ["code", "math", "others"]
    for line, prompt in zip(found, prompts, strict=True):
        assert line["answer"] == answer(pipe, prompt)
        assert line["scores"][line["expert"]] > 0.9


def test_one_prompt_prints_its_answer_and_who_gave_it(
    pipe: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"\n{APPLES}\n"))
    assert main(["generate", "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out == f"{answer(pipe, APPLES, max_new_tokens=6)}\n(math 1.00)\n"


def test_experts_and_mixtures_of_rows_win_over_the_command_line(
    pipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": APPLES}]
    rows = [{"messages": chat, "expert": "others"}, {"prompt": APPLES, "expert": {"math": 0.5}}, {"text": APPLES}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["generate", "--file", str(file), "--mix", "math=0.7,code=0.3", "--json"]) == 0
    base, half, mixed = json_lines(capsys)
    assert (base["expert"], base["answer"]) == ("others", answer(pipe, APPLES, expert="others"))
    assert (half["weights"], half["answer"]) == ({"math": 0.5}, answer(pipe, APPLES, expert={"math": 0.5}))
    assert mixed["weights"] == pytest.approx({"math": 0.7, "code": 0.3})
    assert main(["generate", "--file", str(file), "--expert", "math"]) == 0
    printed = capsys.readouterr().out
    assert "0.5 math" in printed and f"math                {answer(pipe, APPLES, expert='math')}" in printed


def test_a_text_file_has_a_prompt_on_every_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(f"\ufeff{APPLES}\r\n\r\n{FUNCTION}\n".encode())
    assert main(["generate", "--file", str(file), "--json", "--max-new-tokens", "2"]) == 0
    assert [line["prompt"] for line in json_lines(capsys)] == [APPLES, FUNCTION]


def test_a_base_model_takes_experts_from_folders(pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--model", str(BANK_FOLDER / "base"), "--adapter", f"sums={BANK_FOLDER / 'math'}"]
    assert main([*words, "--expert", "sums", "--json", APPLES]) == 0
    (line,) = json_lines(capsys)
    assert (line["expert"], line["answer"]) == ("sums", answer(pipe, APPLES, expert="math"))
    assert line["answer"] != answer(pipe, APPLES, expert="others")


def test_experts_of_a_banks_folder_bring_their_labels_and_need_no_hub(capsys: pytest.CaptureFixture[str]) -> None:
    """The expert's file calls its base model "base", which is inside the bank."""
    words = ["--adapter", str(BANK_FOLDER / "code"), "--adapter", f"sums={BANK_FOLDER / 'math'}"]
    parsed = argparse.Namespace(
        model=str(BANK_FOLDER / "base"), adapter=words[1::2], revision=None, dtype="auto", device_map=None
    )
    bank = load_bank(parsed, PartialState())
    assert {name: entry.label for name, entry in bank.experts.items()} == {"code": "code", "sums": "math"}
    assert bank.experts["code"].description == "small Python functions of one number"
    assert bank.facts["sums"]["steps"] == 60 and bank.instruction is None
    parsed.model = None  # the playground's bank, in which the label "math" is taken
    parsed.adapter = words[-1:]
    assert load_bank(parsed, PartialState()).experts["sums"].label == "sums"
    capsys.readouterr()


def test_sampling_is_repeatable_and_has_a_seed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", APPLES, "--json", "--expert", "math", "--max-new-tokens", "8", "--temperature", "3", "--seed"]
    for seed in ("1", "1", "2"):
        assert main([*words, seed]) == 0
    first, same, other = (line["answer"] for line in json_lines(capsys))
    assert first == same != other


def test_a_terminal_sees_the_answer_grow(
    pipe: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[str] = []
    show = generate.VisibleStreamer.on_finalized_text

    def record(self: Any, text: str, stream_end: bool = False) -> None:
        pieces.append(text)
        show(self, text, stream_end)

    monkeypatch.setattr(generate.VisibleStreamer, "on_finalized_text", record)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert main(["generate", APPLES]) == 0
    expected = answer(pipe, APPLES)
    assert capsys.readouterr().out == f"{expected}\n(math 1.00)\n"
    assert len([piece for piece in pieces if piece]) > 2 and "".join(pieces) == expected


@pytest.mark.parametrize("words", [[], ["--json"], ["another prompt"]])
def test_what_a_terminal_would_obey_is_shown(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"generated_text": HOSTILE, "expert": "math", "scores": None}
    monkeypatch.setattr(generate, "answers", lambda *_: iter([record] * (1 + words.count("another prompt"))))
    assert main(["generate", HOSTILE, *words]) == 0
    printed = capsys.readouterr().out
    assert not set("\x1b\x07\r\x9b\u202e") & set(printed)
    assert "[2J" in printed and "title" in printed
    streamer = generate.VisibleStreamer(SimpleNamespace())  # type: ignore[arg-type]
    streamer.on_finalized_text(HOSTILE, stream_end=True)
    assert capsys.readouterr().out == "a\\x1b[2J\\x1b]0;title\\x07b\\rc\\x9b31m\\u202ed\\x7f\n"


def test_visible_text_keeps_what_people_write(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "naïve 数学 👩‍🔬\tσ²\n\\x1b"
    assert visible(text) == text
    assert visible("a\r\nb\u2028c\ud800") == "a\nb\\u2028c\\ud800"
    assert indented("math", "def f(x):\n  return x\x1b", 6) == "math  def f(x):\n        return x\\x1b"
    assert one_line("two\n lines " + "x" * 90, 12) == "two lines x…"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert visible("σ") == "\\u03c3"


def test_processes_share_the_prompts_and_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [generate.Question(f"prompt {i}") for i in range(5)]
    arguments = SimpleNamespace(batch_size=2, expert=None, mix=None, max_new_tokens=None, temperature=0.0)

    def pipe(inputs: Any, **_: Any) -> Any:
        return ([{"generated_text": row["text"]}] for row in inputs)

    parts: list[Any] = []
    monkeypatch.setattr(Processes, "gather", lambda self, own: parts.extend(own) or parts)
    with pytest.raises(KeyError):  # the other process, whose part only is wanted
        list(generate.answers(pipe, questions, arguments, Processes(1, 2)))  # type: ignore[arg-type]
    assert [row for row, _ in parts] == [1, 3]
    found = generate.answers(pipe, questions, arguments, Processes(0, 2))  # type: ignore[arg-type]
    assert [record["generated_text"] for record in found] == [question.prompt for question in questions]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["hi", "--file", "x.txt"], "from the command line or from --file, not from both"),
        ([" "], "prompt 1 is empty"),
        (["--file", "nowhere.txt"], "nowhere.txt"),
        (["--file", "prompts.docx"], "must end in .txt"),
        (["hi", "--expert", "poetry"], "Unknown expert 'poetry'"),
        (["hi", "--mix", "poetry=1"], "Unknown expert 'poetry'"),
        (["hi", "--model", "/nowhere"], "there is no bank or base model '/nowhere'"),
        (["hi", "--model", str(BANK_FOLDER / "math")], "an expert is given by --adapter, and its base model by"),
        (["hi", "--adapter", "/nowhere"], "/nowhere"),
        (["hi", "--adapter", f"math={BANK_FOLDER / 'math'}"], "has an expert 'math' already"),
        (["hi", "--dispatcher", "classifier"], "pass one with --classifier"),
    ],
)
def test_mistakes_are_named_in_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *words]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("peft-svf generate: ") and message in printed.err
    assert not printed.out


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "hi"}, "row 1 of {file} has no column `prompt`"),
        ({"prompt": " "}, "`prompt` in row 1 of {file} must be a text"),
        ({"messages": [{"role": "user"}]}, "`messages` in row 1 of {file} must be"),
        ({"prompt": "hi", "expert": "poetry"}, "`expert` in row 1 of {file}: Unknown expert"),
        ({"prompt": "hi", "expert": 3}, "`expert` in row 1 of {file} is 3"),
    ],
)
def test_wrong_rows_are_named(
    row: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps(row))
    assert main(["generate", "--file", str(file)]) == 1
    assert message.format(file=file) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mix", "math"], "is EXPERT=WEIGHT"),
        (["--mix", "math=nan"], "is EXPERT=WEIGHT"),
        (["--mix", "math=1,math=2"], "names math twice"),
        (["--mix", "math=1", "--expert", "math"], "not allowed with argument"),
        (["--margin", "2"], "is between 0 and 1"),
        (["--temperature", "-1"], "is 0 (greedy) or positive"),
    ],
)
def test_options_out_of_range_are_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "hi", *words])
    assert message in capsys.readouterr().err
