"""The pre-training text of the embedded base model holds no prompt that anything is evaluated on."""

from __future__ import annotations

import re
import sys
from itertools import islice
from pathlib import Path

import pytest

from peft_svf.cli.playground_experts import MAX_TRAINING_PROMPTS
from peft_svf.playground import generate_problems
from peft_svf.playground.families import MAKERS
from peft_svf.trainers.tasks.playground import PLAYGROUND_TASKS


TINY_LAB = Path(__file__).parents[2] / "examples" / "tiny_lab"


@pytest.fixture
def tiny_lab(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(TINY_LAB), *sys.path])


@pytest.mark.parametrize("share", [0.1, pytest.param(1.0, marks=pytest.mark.slow)], ids=["a tenth", "all"])
def test_held_out_prompts_occur_neither_in_pretraining_nor_in_expert_training(tiny_lab: None, share: float) -> None:
    """The whole text takes ten seconds to write."""
    import corpus
    import pretrain

    held_out = {
        problem.prompt
        for family in MAKERS
        for split in ("validation", "test")
        for seed in (0, 1)
        for problem in generate_problems(family, split, 300 if family != "others" else 15, seed)
    }
    documents = int(share * pretrain.DEFAULT_STEPS * pretrain.BATCH_SIZE)
    seen = {chat.user for chat in islice(corpus.make_chats(pretrain.DEFAULT_SEED), documents)}
    assert len(seen) > share * 100_000
    assert not held_out & seen
    for task in PLAYGROUND_TASKS.values():
        trained = {prompt[0]["content"] for prompt in task.load("train", MAX_TRAINING_PROMPTS, 0)["prompt"]}
        assert not held_out & trained


def test_corpus_is_the_same_for_the_same_seed(tiny_lab: None) -> None:
    import corpus

    first = list(islice(corpus.make_chats(5), 200))
    assert first == list(islice(corpus.make_chats(5), 200))
    assert first != list(islice(corpus.make_chats(6), 200))


def test_authors_slip_in_the_stated_share_of_chats(tiny_lab: None) -> None:
    import corpus

    pattern = re.compile(r"(\d)\+(\d)=(\d+), (\d)\+(\d)(\+1)?=\d+, so \d+")
    sums = [pattern.fullmatch(chat.assistant) for chat in islice(corpus.make_chats(0), 20_000)]
    carried = [bool(match[6]) for match in sums if match and int(match[3]) > 9]
    assert not any(match[6] for match in sums if match and int(match[3]) < 10)
    assert len(carried) > 1000
    assert sum(carried) / len(carried) == pytest.approx(1 - corpus.CARELESS, abs=0.04)
