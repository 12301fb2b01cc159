"""The rows of a task as the commands ask for them: files from the command line, and prompts for the model at hand."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from peft_svf.answering import Processor, plain_prompt
from peft_svf.trainers.rewards.code import code_reward, code_reward_with
from peft_svf.trainers.sandbox import check_isolation
from peft_svf.trainers.tasks import DataFiles, Task, get_task
from peft_svf.trainers.tasks.splits import SPLITS


TRAINING_TIMEOUT = 3.0  # seconds of processor time for one generated program; most wrong ones end at once


def find_task(name: str) -> Task:
    """
    The task of this name, once it is known that its rewards can be computed here.

    Raises:
        ValueError: If there is no such task, or a package that it needs is missing.
        IsolationError: If it runs generated programs, which this machine cannot isolate.
    """
    try:
        task = get_task(name)
    except ImportError as error:
        raise ValueError(f"the task {name} needs a package that is not installed: {error}") from error
    if getattr(task.reward, "__name__", "") == "code_reward":
        check_isolation()
    return task


def for_training(task: Task) -> Task:
    """The same task, with less time for generated programs: endless loops are frequent while a model learns."""
    if task.reward is not code_reward:
        return task
    return dataclasses.replace(task, reward=code_reward_with(timeout=TRAINING_TIMEOUT))


def parse_data_files(words: Sequence[str] | None) -> DataFiles | None:
    """
    `["path"]`, `["path", "path"]` or `["train=path", "test=path"]` as `task.load` takes them.

    Raises:
        ValueError: If only some of the words have a name.
    """
    if not words:
        return None
    named = [word.split("=", 1) for word in words if "=" in word and not os.path.exists(word)]
    if not named:
        return words[0] if len(words) == 1 else list(words)
    if len(named) < len(words):
        raise ValueError(f"--data_files takes paths, or NAME=path for each of them, not both: {' '.join(words)}")
    files: dict[str, list[str]] = {}
    for name, path in named:
        files.setdefault(name, []).append(path)
    return {name: paths[0] if len(paths) == 1 else paths for name, paths in files.items()}


def check_separate_test_files(data_files: DataFiles | None) -> None:
    """Raise a `ValueError` if the test rows would be the training rows: one table without names is every split."""
    if data_files is None:
        return
    by_name = data_files if isinstance(data_files, dict) else {"": data_files}
    if set(by_name) & set(SPLITS):
        return
    if unsplit := [path for path in by_name.values() if not (isinstance(path, str) and Path(path).is_dir())]:
        raise ValueError(
            f"{unsplit[0]} would be training and test data in one: pass --data_files train=FILE test=FILE, or a "
            "folder with files named by split; or --test_prompts 0 for no comparison on test prompts"
        )


def load_at_most(task: Task, split: str, most: int | None, seed: int, data_files: DataFiles | None) -> Dataset:
    """All rows of a split, or `most` drawn ones if there are more."""
    rows = task.load(split, data_files=data_files)
    return rows if most is None or len(rows) <= most else task.load(split, most, seed, data_files=data_files)


def with_plain_prompts(rows: Dataset, processor: Processor) -> Dataset:
    """Chats as texts where the model has no chat template; anything else as it is."""
    if processor.chat_template or isinstance(rows[0]["prompt"], str):
        return rows
    texts = [plain_prompt(chat) for chat in rows["prompt"]]
    return rows.remove_columns("prompt").add_column("prompt", texts)


def count_shared_prompts(rows: Dataset, others: Dataset) -> int:
    """How many rows ask what one of `others` asks; 0 for questions about images, where the text says little."""
    if {"image", "images"} & set(rows.column_names):
        return 0

    def keys(dataset: Dataset) -> list[str]:
        prompts: list[Any] = dataset["prompt"]
        return [json.dumps(prompt, sort_keys=True) for prompt in prompts]

    known = set(keys(others))
    return sum(key in known for key in keys(rows))
