"""Fixtures of few-shot adaptation: the playground's bank, and a task with a few examples."""

from __future__ import annotations

import pytest
from datasets import Dataset

from peft_svf import ExpertBank
from peft_svf.playground import BANK_FOLDER
from peft_svf.trainers.tasks import Task, get_task


@pytest.fixture(scope="module")
def bank() -> ExpertBank:
    return ExpertBank.from_pretrained(BANK_FOLDER)


@pytest.fixture(scope="module")
def task() -> Task:
    return get_task("playground-reasoning")


@pytest.fixture(scope="module")
def examples(task: Task) -> Dataset:
    return task.load("train", 4)
