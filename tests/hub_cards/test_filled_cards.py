"""Cards fill themselves: in training, in the commands, in few-shot searches, and for the embedded experts."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_svf import ExpertBank, FewShotDispatcher, SVFConfig, hub
from peft_svf.cli import demo_cards, train_card
from peft_svf.cli.demo import FamilyResult
from peft_svf.cli.main import main
from peft_svf.cli.playground_experts import TrainingReport
from peft_svf.dispatch.few_shot import MixtureSpace, SearchSettings
from peft_svf.experts.errors import HubError
from peft_svf.hub_cards import ExpertCardData, render_expert_card, write_bank_card, write_expert_card
from peft_svf.playground import BANK_FOLDER
from peft_svf.trainers import SVFPolicyGradientConfig, SVFPolicyGradientTrainer
from peft_svf.trainers.checkpoints import expert_cards
from peft_svf.trainers.evaluation import Evaluation
from peft_svf.trainers.tasks import get_task


Read = Callable[[str], Any]
BASE = str(BANK_FOLDER / "base")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A training of two steps with a checkpoint after each, and which folders cards were written into."""
    folder = tmp_path_factory.mktemp("training") / "tens"
    written: list[str] = []

    def write(target: Any, *words: Any, **options: Any) -> Path:
        written.append(Path(target).name)
        return write_expert_card(target, *words, **options)

    trainer = SVFPolicyGradientTrainer(
        model=AutoModelForCausalLM.from_pretrained(BASE),
        reward_funcs=lambda completions, **_: [1.0 if "1" in str(c) else -1.0 for c in completions],
        args=SVFPolicyGradientConfig(
            str(folder), max_steps=2, save_steps=1, save_strategy="steps", per_device_train_batch_size=2, seed=7,
            gradient_accumulation_steps=1, max_completion_length=2, kl_coef=0.25, report_to="none", use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i} + 1?"}]} for i in range(6)]),
        processing_class=AutoTokenizer.from_pretrained(BASE),
        peft_config=SVFConfig(task_type="CAUSAL_LM", target_modules=["up_proj"]),
    )  # fmt: skip
    trainer.card_facts = {"task": "tens | ones", "label": "tens", "license": "mit"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_cards, "write_expert_card", write)
        trainer.train()
        in_training = list(written)
        trainer.save_model()
    return SimpleNamespace(trainer=trainer, folder=folder, in_training=in_training, saved=written[len(in_training) :])


def test_a_checkpoint_gets_one_card_and_its_folder_none_before_there_is_an_expert(run: SimpleNamespace) -> None:
    assert run.in_training == ["checkpoint-1", "checkpoint-2"] and run.saved == ["model"]
    for place in ("checkpoint-1", "checkpoint-2", "."):
        assert {"README.md", "expert.json"} <= {path.name for path in (run.folder / place).iterdir()}


def test_the_card_of_a_checkpoint_says_what_the_trainer_knows(run: SimpleNamespace, read_card: Read) -> None:
    card = read_card((run.folder / "checkpoint-1" / "README.md").read_text())
    trained = sum(parameter.numel() for parameter in run.trainer.model.parameters() if parameter.requires_grad)
    assert card.headings[0] == "tens" and card.data["license"] == "mit"
    for name, value in {
        "Routing label": "tens",
        "Task": "tens \\| ones",
        "Method": "policy gradient (REINFORCE)",
        "Baseline": run.trainer.args.baseline,
        "KL coefficient": "0.25",
        "KL estimator": run.trainer.args.kl_estimator,
        "Training prompts": "6",
        "Seeds": "7",
        "Steps": "1",
        "Answers per step": "2",
        "Precision of the base model": "float32",
        "Adapted": "up_proj in 4 layers (4 matrices)",
    }.items():
        assert card.cell(name) == value
    assert card.cell("Parameters").startswith(f"{trained} (")
    assert card.cell("Base fingerprint") != "not recorded"
    assert "Results: not recorded." in card.text and card.cell("Training time") == "not recorded"


def test_a_card_asked_for_lies_in_the_folder_of_the_expert(run: SimpleNamespace, monkeypatch: Any) -> None:
    (run.folder / "README.md").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(run.trainer, "_staging", run.folder / "_saving")
        run.trainer.create_model_card()
    assert not (run.folder / "README.md").exists()
    run.trainer.create_model_card("named")
    assert "# named" in (run.folder / "README.md").read_text()


# -- peft-svf train --------------------------------------------------------------------------------------------------
def evaluation(successes: list[bool]) -> Evaluation:
    return Evaluation(["x"] * len(successes), [1.0 if s else -1.0 for s in successes], [""] * len(successes))


def arguments(folder: Path, **options: Any) -> Any:
    defaults = {"output": str(folder), "data_files": None, "test_prompts": None, "adapter": None}
    return SimpleNamespace(**{**defaults, **options})


def test_the_card_of_the_command_holds_task_results_and_learning_curve(
    run: SimpleNamespace, tmp_path: Path, read_card: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(run.folder / "checkpoint-2", tmp_path / "expert")
    gsm8k, options = get_task("gsm8k"), arguments(tmp_path / "expert")
    monkeypatch.setattr(run.trainer, "card_facts", train_card.task_facts(gsm8k, options))
    base, expert = evaluation([True, False] * 20), evaluation([True] * 30 + [False] * 10)
    train_card.write_card(run.trainer, gsm8k, options, (base, expert))
    card = read_card((tmp_path / "expert" / "README.md").read_text())
    gain, low, high = (100 * value for value in expert.gain_over(base))
    (row,) = [row for row in card.rows if row[0] == "gsm8k, test"]
    assert row[1] == "40" and row[2].startswith("50.0 % (") and row[3].startswith("75.0 % (")
    assert row[4] == f"{gain:+.1f} ({low:+.1f} to {high:+.1f})"
    assert card.cell("Routing label") == "math" and card.data["datasets"] == ["openai/gsm8k"]
    assert "peft-svf " in card.cell("Versions") and re.fullmatch(r"\d+ s", card.cell("Training time"))
    assert {"levers.png", "learning_curve.png"} <= set(card.links)
    assert "all rows" in (tmp_path / "expert" / ".eval_results" / "gsm8k.yaml").read_text()


def test_rows_from_files_at_hand_claim_no_benchmark(tmp_path: Path) -> None:
    gsm8k, options = get_task("gsm8k"), arguments(tmp_path, data_files=["test.jsonl"])
    assert train_card.benchmark(gsm8k, options) is None and train_card.task_facts(gsm8k, options)["datasets"] == []
    assert train_card.benchmark(get_task("playground-math"), arguments(tmp_path)) is None
    part = train_card.benchmark(get_task("arc_easy"), arguments(tmp_path, test_prompts=50))
    assert part is not None and (part.dataset, part.config, part.complete) == ("allenai/ai2_arc", "ARC-Easy", False)


def test_a_base_model_that_others_do_not_have_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--model", BASE, "--task", "playground-math", "--output", str(tmp_path / "out"), "--use_cpu"]
    assert main([*command, "--push_to_hub"]) == 1
    assert "is a folder, which others do not have" in capsys.readouterr().err
    with pytest.raises(ValueError, match="once, in the end"):
        train_card.check_can_publish("org/base", {"hub_strategy": "every_save"})
    train_card.check_can_publish("org/base", {})
    assert not (tmp_path / "out").exists()


def test_the_expert_is_uploaded_once_and_only_if_there_is_one(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pushed: list[Any] = []

    def push(source: Any, repo_id: str, **options: Any) -> Any:
        pushed.append((source, repo_id, options["branch"]))
        return SimpleNamespace(url="https://huggingface.co/user/tens")

    monkeypatch.setattr(hub, "push_expert", push)
    monkeypatch.setattr(run.trainer, "hub_model_id", "user/tens", raising=False)
    train_card.publish(run.trainer, run.folder, improved=False)
    assert pushed == [] and "Nothing was uploaded" in capsys.readouterr().out
    train_card.publish(run.trainer, run.folder, improved=True)
    assert pushed == [(run.folder, "user/tens", None)] and "huggingface.co/user/tens" in capsys.readouterr().out
    monkeypatch.setattr(hub, "push_expert", lambda *_, **__: (_ for _ in ()).throw(HubError("no connection")))
    with pytest.raises(HubError, match="no connection"):
        train_card.publish(run.trainer, run.folder, improved=True)


@pytest.fixture(scope="module")
def bank() -> ExpertBank:
    return ExpertBank.from_pretrained(BANK_FOLDER)


# -- few-shot searches -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("per_layer", [False, True])
def test_a_few_shot_mixture_says_how_it_was_made(
    per_layer: bool, bank: ExpertBank, tmp_path: Path, read_card: Read
) -> None:
    task = get_task("playground-math")
    space = MixtureSpace(tuple(bank.experts), bank.layer_groups() if per_layer else ())
    settings = SearchSettings(examples=2, population=4, iterations=1, elite_ratio=0.5)
    dispatcher = FewShotDispatcher(bank, task.load("train", 2), task=task, settings=settings, configurations=[space])
    found = dispatcher.adapt(progress=False)
    folder = dispatcher.save_pretrained(tmp_path / "hard")
    card = read_card(write_expert_card(folder, pictures=False).read_text())
    assert card.headings[0] == "hard" and card.cell("Routing label") == "math"
    for name in bank.experts:
        (row,) = [row for row in card.rows if row[0] == name]
        if per_layer:
            values = [weights[name] for weights in found.weights.values()]
            assert row[3] == f"{min(values):.3g} to {max(values):.3g} in {len(values)} groups of layers"
        else:
            assert row[3] == f"{found.weights[name]:.4g}"
        assert row[4] == f"success on the examples {found.references[name].success:.10g}"
    (result,) = [row for row in card.rows if row[0] == "playground-math, the examples of the search"]
    assert result[1] == "2" and result[3] == f"{100 * found.fitness.success:.1f} % (not recorded)"
    assert "chosen by the very prompts" in card.text and "How it was trained" not in card.headings
    assert found.statement.split(".")[0] in card.text.replace("\\", "")


# -- the playground --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["math", "code", "reasoning"])
def test_the_cards_of_the_embedded_experts_are_made_of_their_facts(name: str, tmp_path: Path) -> None:
    for file in ("adapter_config.json", "adapter_model.safetensors", "expert.json"):
        tmp_path.joinpath(name).mkdir(exist_ok=True)
        shutil.copy(BANK_FOLDER / name / file, tmp_path / name / file)
    card = write_expert_card(tmp_path / name, pictures=False, bank="")
    assert card.read_text() == (BANK_FOLDER / name / "README.md").read_text()
    assert (tmp_path / name / "expert.json").read_text() == (BANK_FOLDER / name / "expert.json").read_text()


def test_the_demo_leaves_cards_of_the_bank_and_its_experts(
    tmp_path: Path, read_card: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_cards, "write_bank_card", partial(write_bank_card, pictures=False))
    shutil.copytree(BANK_FOLDER, tmp_path / "demo")
    report = TrainingReport(3072, 12.3, -0.25, 0.5)
    measured = FamilyResult([True, False] * 10, [True] * 15 + [False] * 5, report)
    families = ("math", "code", "reasoning")
    demo_cards.write_cards(tmp_path / "demo", dict.fromkeys(families, measured), steps=33, seed=5, license="mit")
    bank = read_card((tmp_path / "demo" / "README.md").read_text())
    assert bank.data["license"] == "mit" and bank.headings[0] == "Playground bank"
    (row,) = [row for row in bank.rows if row[0] == "[code](code/README.md)"]
    assert row[2] == "small Python functions of one number" and row[4] == "20" and row[5].startswith("50.0 %")
    expert = read_card((tmp_path / "demo" / "code" / "README.md").read_text())
    for name, value in {"Steps": "33", "Seeds": "5", "Training time": "12 s", "Task": "playground-code"}.items():
        assert expert.cell(name) == value
    assert expert.cell("Checkpoint chosen by") == "validation reward on 128 prompts: -0.25 before, 0.5 at its best"
    facts = json.loads((tmp_path / "demo" / "code" / "expert.json").read_text())
    assert "# Playground expert: code" in render_expert_card(ExpertCardData.from_metadata(facts))
