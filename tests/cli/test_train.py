"""`peft-svf train`: an expert end to end on the playground, what it leaves behind, and mistakes named early."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import compare_trainer_and_checkpoint_args

from peft_svf.cli import main
from peft_svf.cli.train import build_config, is_real_change
from peft_svf.cli.train_arguments import TrainArguments, TrainParser
from peft_svf.playground import BANK_FOLDER
from peft_svf.trainers.evaluation import evaluate
from peft_svf.trainers.statistics import wilson_interval
from peft_svf.trainers.tasks import get_task


BASE = str(BANK_FOLDER / "base")
GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"

# Few steps with large ones: enough for a gain that is seen on 48 prompts.
YAML = f"""
model: {BASE}
task: playground-math
train_prompts: 288
validation_prompts: 32
test_prompts: 48
max_steps: 3
per_device_train_batch_size: 96
gradient_accumulation_steps: 1
per_device_eval_batch_size: 48
learning_rate: 5.0e-2
eval_steps: 3
use_cpu: true
disable_tqdm: true
seed: 0
env:
  PEFT_SVF_TEST_OF_YAML: here
"""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output of one small run, from a YAML file and a flag that wins over it."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "run.yaml").write_text(YAML)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PEFT_SVF_TEST_OF_YAML", "before")
        command = ["train", "--config", str(folder / "run.yaml"), "--output", str(folder / "expert")]
        assert main([*command, "--train-prompts", "192", "--max-steps", "2", "--eval_steps", "2"]) == 0
        assert os.environ["PEFT_SVF_TEST_OF_YAML"] == "here"
    return folder / "expert"


@pytest.fixture
def outcome(run_folder: Path) -> dict[str, Any]:
    return dict(json.loads((run_folder / "results.json").read_text()))


def test_the_results_hold_what_a_card_needs(outcome: dict[str, Any]) -> None:
    assert (outcome["task"], outcome["model"], outcome["improved"]) == ("playground-math", BASE, True)
    training = outcome["training"]
    assert (training["steps"], training["seed"], training["learning_rate"]) == (2, 0, 5e-2)
    assert (training["train_prompts"], training["validation_prompts"]) == (192, 32)
    assert training["parameters"] == 3072 and training["seconds"] > 0
    assert training["config"]["max_completion_length"] == get_task("playground-math").max_new_tokens
    assert outcome["evaluation"]["split"] == "test" and len(outcome["evaluation"]["ids"]) == 48
    assert {"peft-svf", "torch", "trl", "python"} <= set(outcome["versions"])
    for model in ("base", "expert"):
        per_prompt = outcome[model]["success_per_prompt"]
        assert outcome[model]["success"] == pytest.approx(sum(per_prompt) / 48)
        assert outcome[model]["interval"] == pytest.approx(wilson_interval(sum(per_prompt), 48))
    gain = outcome["expert"]["gain_over_base"]
    assert gain["mean"] == pytest.approx(outcome["expert"]["success"] - outcome["base"]["success"])
    assert gain["interval"][0] < gain["mean"] < gain["interval"][1]


def test_the_saved_expert_answers_as_the_results_say(run_folder: Path, outcome: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(BASE)
    task = get_task("playground-math")
    rows = task.load("test", 48)
    assert rows["id"] == outcome["evaluation"]["ids"]
    tokenizer = AutoTokenizer.from_pretrained(run_folder)
    assert evaluate(model, tokenizer, task, rows).shares() == outcome["base"]["success_per_prompt"]
    expert = PeftModel.from_pretrained(model, run_folder)
    assert evaluate(expert, tokenizer, task, rows).shares() == outcome["expert"]["success_per_prompt"]
    assert outcome["expert"]["success"] > outcome["base"]["success"]


def test_the_card_shows_the_measured_success(run_folder: Path, outcome: dict[str, Any]) -> None:
    card = (run_folder / "README.md").read_text()
    assert "| playground-math, test | 48 |" in card
    for model in ("base", "expert"):
        assert f"{100 * outcome[model]['success']:.1f} % (" in card


def test_a_finished_run_is_not_overwritten_but_resumed(
    run_folder: Path, outcome: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    weights = (run_folder / "adapter_model.safetensors").read_bytes()
    command = ["train", "--config", str(run_folder.parent / "run.yaml"), "--output", str(run_folder)]
    command += ["--train-prompts", "192", "--max-steps", "2", "--eval_steps", "2"]
    assert main(command) == 1
    assert "holds a finished run: add --resume" in capsys.readouterr().err
    assert main([*command, "--task", "playground-reasoning", "--resume"]) == 1
    assert "another task ('playground-math', not 'playground-reasoning')" in capsys.readouterr().err
    capsys.readouterr()
    assert main([*command, "--resume"]) == 0
    assert "2 steps; validation reward" in capsys.readouterr().out
    assert (run_folder / "adapter_model.safetensors").read_bytes() == weights
    again = json.loads((run_folder / "results.json").read_text())
    assert again["expert"] == outcome["expert"]


def test_an_expert_that_is_not_better_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a learning rate of 0 nothing changes, so no checkpoint can be better than the base model."""
    output = tmp_path / "expert"
    command = ["train", "--model", BASE, "--task", "playground-reasoning", "--output", str(output), "--use_cpu"]
    command += ["--max-steps", "1", "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1"]
    command += ["--learning-rate", "0", "--validation-prompts", "8", "--test-prompts", "8", "--disable_tqdm"]
    assert main(command) == 0
    assert "no expert is written" in capsys.readouterr().out
    assert not (output / "adapter_model.safetensors").exists() and not (output / "README.md").exists()
    found = json.loads((output / "results.json").read_text())
    assert found["improved"] is False and "expert" not in found and "success" in found["base"]


def test_a_sweep_reports_every_coefficient_and_goes_on_from_an_expert(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "expert"
    command = ["train", "--model", BASE, "--task", "playground-math", "--output", str(output), "--use_cpu"]
    command += ["--adapter", str(run_folder), "--kl-sweep", "0", "0.2", "--max-steps", "1", "--test-prompts", "0"]
    command += ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1", "--disable_tqdm"]
    assert main([*command, "--validation-prompts", "16"]) == 0
    found = json.loads((output / "results.json").read_text())
    assert [run["kl_coef"] for run in found["kl_sweep"]["runs"]] == [0.0, 0.2]
    assert "evaluation" not in found and "base" not in found
    assert "kl_coef" in capsys.readouterr().out
    assert (output / "adapter_model.safetensors").exists() == found["improved"]
    assert not list(output.glob("kl-*/README.md"))  # cards of experts that are not there


def test_a_step_on_gsm8k_from_files_without_a_chat_template(
    stories_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (GSM8K / "train.jsonl.gz").is_file():
        pytest.skip(f"GSM8K is not at {GSM8K}")
    command = ["train", "--model", stories_path, "--task", "gsm8k", "--output", str(tmp_path / "out"), "--use_cpu"]
    command += ["--data_files", f"train={GSM8K / 'train.jsonl.gz'}", f"test={GSM8K / 'test.sample.jsonl'}"]
    command += ["--max-steps", "1", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"]
    command += ["--train-prompts", "16", "--validation-prompts", "4", "--test-prompts", "4"]
    assert main([*command, "--max_completion_length", "4", "--disable_tqdm"]) == 0
    assert "no chat template" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(found["base"]["success_per_prompt"]) == 4
    assert found["training"]["steps"] == 1


# -- the configuration that comes of flags, task and preset -----------------------------------------------------------
@pytest.fixture
def config_of() -> Callable[..., Any]:
    def build(*flags: str) -> Any:
        words = ["--model", BASE, "--task", "playground-math", "--output", "out", "--use_cpu", *flags]
        arguments, given = TrainParser().parse(words)
        return build_config(arguments, given, get_task(arguments.task))

    return build


def test_defaults_validate_and_suit_the_task(config_of: Callable[..., Any]) -> None:
    config = config_of()
    assert config.max_completion_length == get_task("playground-math").max_new_tokens
    assert config.load_best_model_at_end and config.eval_on_start and config.eval_steps == 0.1
    assert config.baseline == "batch" and config.logging_steps == 1


def test_what_is_set_wins_over_the_defaults(config_of: Callable[..., Any]) -> None:
    config = config_of("--max_completion_length", "7", "--eval-strategy", "no")
    assert config.max_completion_length == 7
    assert config.eval_strategy.value == "no" and not config.load_best_model_at_end


def test_the_paper_s_recipe_and_what_is_changed_of_it(config_of: Callable[..., Any]) -> None:
    paper = config_of("--paper", "--per_device_train_batch_size", "32", "--learning-rate", "1e-3")
    assert (paper.baseline, paper.max_grad_norm) == ("none", 1e-3)
    assert paper.per_device_train_batch_size * paper.gradient_accumulation_steps == 256
    assert paper.learning_rate == 1e-3
    assert config_of("--paper", "--baseline", "batch").baseline == "batch"


def test_yaml_takes_one_value_for_a_list_and_a_mapping_of_files(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "model: m\ntask: t\noutput: o\nlayers: 3\ndata_files: {train: a.jsonl, test: b.jsonl}\nlearning_rate: 1e-3\n"
    )
    arguments, given = TrainParser().parse([f"--config={tmp_path / 'a.yaml'}"])
    assert arguments == TrainArguments("m", "t", "o", data_files=["train=a.jsonl", "test=b.jsonl"], layers=[3])
    assert given == {"learning_rate": 1e-3}


@pytest.mark.parametrize(("eval_steps", "batch_size", "is_told"), [(0.1, 2, False), (7, 2, True), (0.1, 4, True)])
def test_a_share_of_all_steps_is_no_change_of_a_resumed_run(
    eval_steps: float, batch_size: int, is_told: bool, config_of: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Through transformers' own comparison: the checkpoint has the number of steps that the share came to."""
    config = config_of("--eval-steps", str(eval_steps), "--per_device_train_batch_size", "2")
    state = TrainerState(eval_steps=1, save_steps=1, logging_steps=1, train_batch_size=batch_size)
    records: list[logging.LogRecord] = []
    log = logging.getLogger("transformers.trainer_utils")
    caplog.set_level(logging.WARNING, logger=log.name)  # an earlier command may have silenced transformers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(log, "handle", records.append)
        compare_trainer_and_checkpoint_args(config, state)
    assert len(records) == 1
    assert is_real_change(records[0]) == is_told


def test_help_shows_our_options_and_few_others(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    short = capsys.readouterr().out
    assert len(short.splitlines()) < 60
    assert all(option in short for option in ("--task", "--kl-sweep", "--learning-rate", "--help-all"))
    assert "vespo" not in short
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help-all"])
    everything = capsys.readouterr().out
    assert re.search(r"--kl-coef .*Default: 0.0", short)
    assert "--weight_decay" in everything and len(everything.splitlines()) > 500


# -- mistakes, before anything is loaded or written -------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"--task": "playground-meth"}, "Did you mean 'playground-math'"),
        ({"--model": "/nowhere/at/all"}, "there is no base model '/nowhere/at/all'"),
        ({"--train-prompts": "5"}, "has 5 rows, but one batch takes 64"),
        ({"--train-prompts": "0"}, "--train_prompts must be at least 1"),
        ({"--test-prompts": "1"}, "--test_prompts must be 0 or at least 2"),
        ({"--data-files": "nowhere.jsonl"}, "would be training and test data in one"),
        ({"--dtype": "float31"}, "--dtype is one of auto, float32"),
        ({"--kl-sweep": "-1"}, "--kl_sweep takes different values of at least 0"),
        ({"--kl_coef": "0.1", "--report_to": "wondb"}, "--report_to wondb: there is no such package here"),
        ({"--layers": "9"}, "the model has no layer 9; its layers are 0 to 3"),
        ({"--adapter": "nowhere"}, "there is no adapter 'nowhere'"),
        ({"--adapter": BASE}, "holds no adapter: there is no adapter_config.json in it"),
        ({"--adapter": "a", "--rank": "4"}, "--rank is settled by the expert"),
        ({"--kl_coef": "-1"}, "`kl_coef` is a penalty and cannot be negative"),
        ({"--paper": "", "--per_device_train_batch_size": "48"}, "not a multiple of"),
        ({"--beta": "0.1"}, "use `kl_coef`"),
        ({"--config": "nowhere.yaml"}, "nowhere.yaml"),
    ],
)
def test_mistakes_are_named_in_one_line_and_leave_nothing(
    flags: dict[str, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    required = {"--model": BASE, "--task": "playground-math", "--output": str(output), "--max_steps": "1"}
    words = [word for pair in {**required, **flags}.items() for word in pair if word]
    assert main(["train", "--use_cpu", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("peft-svf train: ") and message in error
    assert not output.exists()


def test_an_expert_of_another_base_model_is_refused_and_leaves_no_record(
    run_folder: Path, stories_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = ["train", "--model", stories_path, "--task", "playground-math", "--output", str(output), "--use_cpu"]
    assert main([*command, "--adapter", str(run_folder), "--max-steps", "1", "--train-prompts", "64"]) == 1
    assert "this adapter belongs to another base model" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rat", "1"], "unknown argument --learning_rat; did you mean --learning_rate?"),
        (["--max_steps", "many"], "invalid int value: 'many'"),
        (["--output_dir", "x"], "the folder is given by --output"),
        (["--config"], "expected one argument"),
    ],
)
def test_malformed_arguments_exit_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--model", BASE, "--task", "playground-math", "--output", "out", *words])
    assert message in capsys.readouterr().err


def test_missing_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--model", BASE])
    assert "required: --task, --output" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert main(["train", "--model", BASE, "--task", "playground-math", "--output", str(tmp_path)]) == 1
    assert "is no output of `peft-svf train`" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
