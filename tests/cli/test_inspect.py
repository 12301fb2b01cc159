"""`peft-svf inspect`: facts, levers, comparison and pictures of experts, without their base model."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from peft_svf.cli import main
from peft_svf.experts import Expert
from peft_svf.playground import BANK_FOLDER
from peft_svf.plots import levers_table


MATH, BASE = BANK_FOLDER / "math", BANK_FOLDER / "base"
RESULT = {"task": "sums, test", "n": 300, "base": 0.25, "base_interval": [0.2, 0.3], "expert": 0.5}
FACTS = {
    "name": "adder",
    "label": "math",
    "task": "sums",
    "seeds": [1, 2],
    "results": [{**RESULT, "expert_interval": [0.44, 0.56]}],
    "learning_curve": [{"step": 0, "reward": 0.25}, {"step": 1, "reward": 0.5}],
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A copy of the playground's expert with facts of its own."""
    expert = Expert.from_pretrained(MATH)
    return replace(expert, metadata=FACTS).save_pretrained(tmp_path / "adder")


def inspect(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The error, after making sure that it is one line and nothing was printed."""
    capsys.readouterr()
    assert main(["inspect", *map(str, arguments)]) == 1
    out, error = capsys.readouterr()
    assert not out and error.count("\n") == 1 and error.startswith("peft-svf inspect: ")
    return error


def test_the_bank_of_the_package_is_known_by_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect(capsys, "playground", "--subfolder", "math") == inspect(capsys, MATH)


class TestReport:
    def test_facts_missing_ones_as_missing_and_the_table(
        self, capsys: pytest.CaptureFixture[str], saved: Path
    ) -> None:
        (saved / "expert.json").unlink()
        text = inspect(capsys, saved)
        rows = dict(line.strip().split("  ", 1) for line in text.split("\n\n")[0].splitlines()[1:])
        shown = {name: value.strip() for name, value in rows.items()}
        expert = Expert.from_pretrained(MATH)
        assert shown["fingerprint"] == expert.fingerprint_id
        size = (saved / "adapter_model.safetensors").stat().st_size
        assert shown["offsets"] == f"3,072, in {size:,} bytes"
        for name in ("revision", "label", "task", "origin", "results"):
            assert shown[name] == "not recorded"
        assert levers_table(expert) in text

    def test_recorded_facts_and_results(self, capsys: pytest.CaptureFixture[str], saved: Path) -> None:
        text = inspect(capsys, saved)
        assert text.startswith("adder\n") and "seeds        1, 2" in text and "results      1, below" in text
        assert "sums, test      300  25.0 % [20.0, 30.0]  50.0 % [44.0, 56.0]" in text

    def test_a_bank_shows_all_its_experts_and_how_alike_they_are(self, capsys: pytest.CaptureFixture[str]) -> None:
        text = inspect(capsys, BANK_FOLDER)
        assert all(f"\n{name}\n" in f"\n{text}" for name in ("math", "code", "reasoning"))
        assert re.search("label +reasoning\n", text) and "multiple-choice questions" in text
        found = json.loads(inspect(capsys, BANK_FOLDER, "--json"))["comparison"]
        experts = [Expert.from_pretrained(BANK_FOLDER / name) for name in found["experts"]]
        flat = numpy.stack([torch.cat(list(e.offsets.values())).double().numpy() for e in experts])
        norms = numpy.linalg.norm(flat, axis=1)
        numpy.testing.assert_allclose(found["cosine"], flat @ flat.T / norms[:, None] / norms, atol=1e-6)
        assert found["experts"] == ["math", "code", "reasoning"] and "Cosine similarity" in text

    def test_one_expert_of_a_bank_compared_with_others(self, capsys: pytest.CaptureFixture[str], saved: Path) -> None:
        text = inspect(capsys, BANK_FOLDER, "--subfolder", "math", "--compare", saved, MATH)
        assert text.count("Mean of z − 1\n") == 1  # of the one that is inspected
        assert "  math     1.00   1.00    1.00" in text and "math-2" in text

    def test_with_the_base_model_changes_of_weights_and_spectra(self, capsys: pytest.CaptureFixture[str]) -> None:
        name = "model.layers.3.mlp.down_proj"
        found = json.loads(inspect(capsys, MATH, "--model", BASE, "--json"))
        (expert,) = found["experts"]
        assert 0.2 < expert["relative_changes"][name] < 0.23 and len(expert["relative_changes"]) == 28
        assert set(found["spectra"]["shares"]) == set(expert["relative_changes"])
        text = inspect(capsys, MATH, "--model", BASE)
        change = f"{100 * expert['relative_changes'][name]:.2f}"
        table = text.split("Change of the weight, ‖ΔW‖ / ‖W‖ in %\n")[1].split("\n\n")[0].splitlines()
        assert table[0].split()[-1] == "down_proj" and table[4].split()[-1] == change
        assert found["spectra"]["statement"] in text

    def test_json_holds_what_the_expert_is(self, capsys: pytest.CaptureFixture[str], saved: Path) -> None:
        found = json.loads(inspect(capsys, saved, "--json"))
        (expert,) = found["experts"]
        assert expert["facts"] == FACTS and expert["parameters"] == 3072 and found["comparison"] is None
        assert expert["modules"]["model.layers.0.self_attn.k_proj"] == [64]
        assert expert["levers"]["largest"][0]["component"] == 36 and len(expert["levers"]["largest"]) == 10

    def test_a_strangers_text_is_shown_not_obeyed(self, capsys: pytest.CaptureFixture[str], saved: Path) -> None:
        (saved / "expert.json").write_text(json.dumps({"task": "sums\x1b[2J", "label": "a\nb"}))
        text = inspect(capsys, saved)
        assert "\x1b" not in text and r"sums\x1b[2J" in text and "label        a b" in text

    def test_facts_that_cannot_be_used_are_left_out(self, capsys: pytest.CaptureFixture[str], saved: Path) -> None:
        (saved / "expert.json").write_text('{"seeds": "three"}')
        assert "expert.json  is left out: " in inspect(capsys, saved)
        (expert,) = json.loads(inspect(capsys, saved, "--json"))["experts"]
        assert expert["facts"] is None and expert["fault"]


class TestPictures:
    """Needs matplotlib, the extra `plots`."""

    @pytest.fixture(autouse=True)
    def drawn(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, Path]]:
        """What would be drawn, and where; pictures themselves are tested in tests/plots."""
        pytest.importorskip("matplotlib")
        calls: list[tuple[str, Any, Path]] = []
        for kind in ("levers", "moved_components", "mixture_weights", "spectra", "learning_curve"):

            def record(source: Any, path: Path, *_: object, kind: str = kind, **__: object) -> None:
                calls.append((kind, source, path))

            monkeypatch.setattr(f"peft_svf.cli.sharing.inspect_pictures.plot_{kind}", record)
        return calls

    def test_levers_are_one_picture_an_expert(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, drawn: list[tuple[str, Any, Path]]
    ) -> None:
        text = inspect(capsys, BANK_FOLDER, "--plot", tmp_path / "out.svg")
        assert [(kind, path.name) for kind, _, path in drawn] == [
            ("levers", f"out-{name}.svg") for name in ("math", "code", "reasoning")
        ]
        assert all(f"Picture: {path}" in text for *_, path in drawn)

    def test_components_are_one_picture_of_all(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, drawn: list[tuple[str, Any, Path]]
    ) -> None:
        other = BANK_FOLDER / "code"
        inspect(capsys, MATH, "--compare", other, "--kind", "components", "--plot", tmp_path / "out.png")
        ((kind, experts, path),) = drawn
        assert kind == "moved_components" and list(experts) == ["math", "code"] and path == tmp_path / "out.png"

    def test_spectra_of_the_base_model(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, drawn: list[tuple[str, Any, Path]]
    ) -> None:
        inspect(capsys, MATH, "--model", BASE, "--kind", "spectra", "--plot", tmp_path / "out.png")
        ((kind, spectra, _),) = drawn
        assert kind == "spectra" and len(spectra.singular_values) == 28

    def test_weights_of_a_few_shot_search_and_rewards_of_a_training(
        self, capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path, drawn: list[tuple[str, Any, Path]]
    ) -> None:
        weights = {"math": 0.75, "code": 0.25}
        (saved / "adaptation.json").write_text(json.dumps({"weights": weights}))
        for kind in ("mixture", "learning-curve"):
            inspect(capsys, saved, "--kind", kind, "--plot", tmp_path / "out.png")
        (saved / "learning_curve.csv").write_text("step,reward\n0,0.5\n")
        inspect(capsys, saved, "--kind", "learning-curve", "--plot", tmp_path / "out.png")
        assert [(kind, source) for kind, source, _ in drawn] == [
            ("mixture_weights", weights),
            ("learning_curve", FACTS["learning_curve"]),
            ("learning_curve", saved / "learning_curve.csv"),
        ]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--kind", "spectra", "--plot", "a.png"], "add --model FOLDER"),
            (["--kind", "components"], "add --plot FILE"),
            (["--plot", "a.txt"], "the name of a picture ends in .png"),
            (["--plot", "."], "is a folder: --plot takes the name of a file"),
            (["--kind", "mixture", "--plot", "a.png"], "has no adaptation.json"),
            (["--kind", "learning-curve", "--plot", "a.png"], "has no learning_curve.csv"),
        ],
    )
    def test_pictures_that_cannot_be_drawn(
        self,
        capsys: pytest.CaptureFixture[str],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        arguments: list[str],
        message: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert message in refused(capsys, MATH, *arguments)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "There is no folder nowhere, and it is no id on the Hub (user/name)"),
        ([BASE], "adapter_config.json is missing"),
        ([BANK_FOLDER, "--subfolder", "poetry"], "has no expert 'poetry'; it has math, code, reasoning"),
        ([MATH, "--subfolder", "math"], "--subfolder names an expert of a bank"),
        ([MATH, "--revision", "main"], "--revision is for ids on the Hub"),
        ([MATH, "--model", MATH], "has neither model.safetensors"),
    ],
)
def test_wrong_input_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[object], message: str) -> None:
    assert message in refused(capsys, *arguments)


def test_experts_of_different_base_models_are_not_compared(
    capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(saved, other)
    config = json.loads((other / "adapter_config.json").read_text())
    for sketch in config["base_fingerprint"].values():
        sketch[3:] = [-value for value in sketch[3:]]
    (other / "adapter_config.json").write_text(json.dumps(config))
    assert "cannot be compared" in refused(capsys, saved, "--compare", other)
    assert "trained on another base model" in refused(capsys, other, "--model", BASE)


def test_adapt_says_early_that_it_cannot_draw(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = ["--task", "playground-math", "--output", str(tmp_path / "out"), "--plot", str(tmp_path / "a.txt")]
    assert main(["adapt", *arguments]) == 1
    assert "the name of a picture ends in .png" in capsys.readouterr().err
