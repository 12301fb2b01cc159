"""Tables of completions: what is in the files and on the screen, in training and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from datasets import Dataset

from peft_svf.trainers import SVFPolicyGradientTrainer
from peft_svf.trainers.rewards.reward import reward_function
from peft_svf.trainers.rewards.verdict import Verdict


MakeTrainer = Callable[..., SVFPolicyGradientTrainer]
LOGGED = {"log_completions": True, "report_to": "none", "max_steps": 2}


def words(completion: Any) -> list[str]:
    return (completion if isinstance(completion, str) else completion[0]["content"]).split()


def first_word_even(completions: list[Any], **kwargs: Any) -> list[float | None]:
    """±1 for the first word if it is a number, else None."""
    firsts = [(words(completion) or ["?"])[0] for completion in completions]
    return [(1.0 if int(word) % 2 == 0 else -1.0) if word.isdigit() else None for word in firsts]


def longer_than_five(completions: list[Any], **kwargs: Any) -> list[float]:
    return [1.0 if len(words(completion)) > 5 else -1.0 for completion in completions]


@reward_function
def has_a_seven(completions: list[str]) -> list[Verdict]:
    return [Verdict(1.0 if "7" in text.split() else -1.0, f"read {len(text.split())} words") for text in completions]


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    return {path.name: pd.read_parquet(path) for path in sorted((folder / "run" / "completions").iterdir())}


def leave_one_out(rewards: list[float]) -> list[float]:
    judged = [reward for reward in rewards if not math.isnan(reward)]
    others = max(len(judged) - 1, 1)
    return [0.0 if math.isnan(r) else r - (sum(judged) - r) / others for r in rewards]


@pytest.mark.parametrize("conversational", [True, False])
def test_a_row_has_the_prompt_the_rewards_and_the_advantage_that_was_trained_on(
    conversational: bool, make_trainer: MakeTrainer, tmp_path: Path, tiny: SimpleNamespace
) -> None:
    dataset = tiny.prompts(64)
    if not conversational:
        dataset = Dataset.from_dict({"prompt": [row[0]["content"] for row in dataset["prompt"]]})
    functions = [first_word_even, longer_than_five, has_a_seven]
    trainer = make_trainer(
        {"reward_funcs": functions, "train_dataset": dataset}, **LOGGED, reward_weights=[1.0, 0.5, 0.25]
    )
    trained_on: list[list[float]] = []
    generate = trainer._generate_and_score_completions

    def watched(inputs: Any) -> dict[str, Any]:
        output = generate(inputs)
        trained_on.append(output["advantages"].tolist())
        return output

    trainer._generate_and_score_completions = watched
    trainer.train()
    found = tables(tmp_path)
    assert list(found) == ["completions_00001.parquet", "completions_00002.parquet"]
    for step, advantages in enumerate(trained_on, start=1):
        table = found[f"completions_{step:05d}.parquet"]
        assert set(table["step"]) == {step} and len(table) == 16
        prompts = [prompt if isinstance(prompt, str) else prompt[0]["content"] for prompt in table["prompt"]]
        assert all(prompt.endswith("= ?") for prompt in prompts)
        assert isinstance(table["completion"][0], str) != conversational
        for function in functions[:2]:
            expected = [math.nan if r is None else r for r in function(list(table["completion"]))]
            assert table[function.__name__].tolist() == pytest.approx(expected, nan_ok=True)
        assert table["reward_reason"].tolist() == [f"read {len(words(c))} words" for c in table["completion"]]
        total = table["first_word_even"].fillna(0) + 0.5 * table["longer_than_five"] + 0.25 * table["has_a_seven"]
        assert table["advantage"].tolist() == pytest.approx(leave_one_out(total.tolist()), abs=1e-6)
        assert table["advantage"].tolist() == pytest.approx(advantages)
    assert found["completions_00001.parquet"]["first_word_even"].isna().any()


def test_an_answer_that_nobody_could_judge_has_no_advantage(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer({"reward_funcs": first_word_even}, **LOGGED).train()
    table = tables(tmp_path)["completions_00001.parquet"]
    unjudged = table["first_word_even"].isna()
    assert 0 < unjudged.sum() < len(table)
    assert (table["advantage"][unjudged] == 0).all() and (table["advantage"][~unjudged] != 0).any()
    assert table["advantage"].tolist() == pytest.approx(leave_one_out(table["first_word_even"].tolist()), abs=1e-6)


def test_an_evaluation_has_its_own_complete_file(
    make_trainer: MakeTrainer, tmp_path: Path, tiny: SimpleNamespace
) -> None:
    datasets = {"few": tiny.prompts(5, shift=3), "many": tiny.prompts(37, shift=5)}
    options = {**LOGGED, "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 8}
    make_trainer({"eval_dataset": datasets}, **options).train()
    found = tables(tmp_path)
    names = ["00001", "00002", "00002_eval_few", "00002_eval_many"]
    assert list(found) == [f"completions_{name}.parquet" for name in names]
    for name, dataset in datasets.items():
        table = found[f"completions_00002_eval_{name}.parquet"]
        prompts = [prompt[0]["content"] for prompt in table["prompt"]]
        assert sorted(prompts) == sorted(prompt[0]["content"] for prompt in dataset["prompt"])
        assert table["advantage"].tolist() == table["even_digits"].tolist()
    assert [len(found[f"completions_{name}.parquet"]) for name in names[:2]] == [16, 16]


def test_the_screen_shows_each_step_once(make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    options = {**LOGGED, "eval_strategy": "steps", "eval_steps": 2, "num_completions_to_print": 3}
    make_trainer({"reward_funcs": has_a_seven}, **options).train()
    screen = capsys.readouterr().out
    assert [screen.count(f" Step {step} ") for step in (0, 1, 2)] == [0, 1, 2]  # step 2: training and evaluation
    assert screen.count("read ") == 9
    for heading in ("Prompt", "Completion", "Advantage", "has_a_seven", "reward_reason"):
        assert heading.split("_")[0] in screen


def test_an_evaluation_prints_no_more_than_a_training_batch(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str], tiny: SimpleNamespace
) -> None:
    pytest.importorskip("rich")
    trainer = make_trainer({"eval_dataset": tiny.prompts(40)}, **LOGGED)
    trainer.evaluate()
    assert capsys.readouterr().out.count("ASSISTANT") == 16
    assert trainer.num_completions_to_print is None


def test_two_reward_functions_may_give_reasons(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    @reward_function
    def has_a_three(completions: list[str]) -> list[Verdict]:
        return [Verdict(1.0 if "3" in text.split() else -1.0, "second") for text in completions]

    make_trainer({"reward_funcs": [has_a_seven, has_a_three]}, **LOGGED).train()
    table = tables(tmp_path)["completions_00002.parquet"]
    assert table["reward_reason"].tolist() == [f"read {len(words(c))} words" for c in table["completion"]]
    assert set(table["reward_reason_2"]) == {"second"}


def test_a_column_may_be_missing_in_some_batches(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    calls: list[int] = []

    def sometimes(completions: list[Any], log_extra: Callable[..., None], **kwargs: Any) -> list[float]:
        calls.append(len(calls))
        if len(calls) in (2, 3):
            log_extra("note", [f"batch {len(calls)}"] * len(completions))
        return [1.0] * len(completions)

    options = {"gradient_accumulation_steps": 4, "steps_per_generation": 1, "per_device_train_batch_size": 8}
    trainer = make_trainer({"reward_funcs": sometimes}, **{**LOGGED, "max_steps": 1}, **options)
    trainer._logs = {  # as long as the four batches of the step, to see all of them
        name: value if isinstance(value, dict) else type(value)(maxlen=32) for name, value in trainer._logs.items()
    }
    for name in ("rewards", "extra"):
        trainer._logs[name].default_factory = lambda: type(trainer._logs["prompt"])(maxlen=32)
    trainer.train()
    notes = tables(tmp_path)["completions_00001.parquet"]["note"].fillna("none").tolist()
    assert notes == ["none"] * 8 + ["batch 2"] * 8 + ["batch 3"] * 8 + ["none"] * 8


def test_a_column_of_another_length_is_an_error_that_names_it(make_trainer: MakeTrainer) -> None:
    def one_note(completions: list[Any], log_extra: Callable[..., None], **kwargs: Any) -> list[float]:
        log_extra("note", ["only one"])
        return [1.0] * len(completions)

    with pytest.raises(ValueError, match=r"`log_extra` 1 values for the column 'note' and 16 completions"):
        make_trainer({"reward_funcs": one_note}, **LOGGED).train()


def test_resuming_at_the_end_keeps_the_last_table(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    options = {**LOGGED, "save_strategy": "steps", "save_steps": 2}
    make_trainer(**options).train()
    before = tables(tmp_path)
    make_trainer(**options).train(resume_from_checkpoint=True)
    after = tables(tmp_path)
    assert list(after) == list(before) and all(before[name].equals(after[name]) for name in before)


def test_a_resumed_run_writes_the_tables_of_an_uninterrupted_one(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    options = {**LOGGED, "save_strategy": "steps", "save_steps": 1}
    make_trainer(**options).train()
    before = tables(tmp_path)
    (tmp_path / "run" / "completions" / "completions_00002.parquet").unlink()
    make_trainer(**options).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    after = tables(tmp_path)
    assert list(after) == list(before)
    pd.testing.assert_frame_equal(after["completions_00002.parquet"], before["completions_00002.parquet"])


def test_without_the_option_an_evaluation_keeps_no_texts(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(report_to="none", per_device_train_batch_size=8)
    trainer.evaluate()
    assert len(trainer._logs["prompt"]) <= 8
    assert not (tmp_path / "run" / "completions").exists()
