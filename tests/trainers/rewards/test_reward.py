"""Reward functions in TRL's signature: what they take, give, log and refuse."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_svf.answering import answer_text
from peft_svf.trainers.rewards import Verdict, number_reward, reward_function, with_negative_reward


@reward_function
def same_reward(completions: list[str], answer: list[str | None], bonus: list[str] | None = None) -> list[Verdict]:
    """+1 for the same text."""
    return [
        Verdict.unjudged("no gold") if gold is None else Verdict.right(text) if text == gold else Verdict.wrong(text)
        for text, gold in zip(completions, answer, strict=True)
    ]


def test_reward_takes_trl_keywords_and_gives_one_number_a_completion() -> None:
    chats = [[{"role": "assistant", "content": text}] for text in "abc"]
    given_by_trl: dict[str, Any] = {"prompts": ["?"] * 3, "completion_ids": [[1]] * 3, "trainer_state": None}
    assert same_reward(completions=chats, answer=["a", "x", None], **given_by_trl) == [1.0, -1.0, None]
    assert same_reward(completions=["a", "b", "c"], answer=["a", "x", None], id=["1", "2", "3"]) == [1.0, -1.0, None]


def test_thoughts_are_not_judged() -> None:
    thinking = "<think>The answer is 3. No, the answer is 4.</think>"
    assert number_reward(completions=[f"{thinking}The answer is 3."], answer=["3"]) == [1.0]
    assert number_reward(completions=[thinking], answer=["4"]) == [-1.0]


def test_reasons_go_to_the_completion_log() -> None:
    logged: dict[str, list[str]] = {}
    same_reward(completions=["a", "b", "c"], answer=["a", "x", None], log_extra=logged.__setitem__)
    assert logged == {"reward_reason": ["right: a", "wrong: b", "not judged: no gold"]}


def test_reward_keeps_name_and_shows_the_columns_that_it_needs() -> None:
    """What TRL names its metrics by, and what the trainer checks a data set for before it starts."""
    assert same_reward.__name__ == "same_reward"
    parameters = inspect.signature(same_reward).parameters
    assert list(parameters) == ["completions", "answer", "bonus", "kwargs"]
    assert parameters["answer"].default is inspect.Parameter.empty
    assert parameters["bonus"].default is None


@pytest.mark.parametrize("value", [-0.1, -1.0, 0.0, -5])
def test_wrong_answers_get_the_other_value_and_nothing_else_changes(value: float) -> None:
    reward = with_negative_reward(same_reward, value)
    assert reward(completions=["a", "b", "c"], answer=["a", "x", None]) == [1.0, value, None]
    assert reward.__name__ == "same_reward"
    assert inspect.signature(reward) == inspect.signature(same_reward)


def test_the_papers_value_is_the_default() -> None:
    assert with_negative_reward(number_reward)(completions=["The answer is 3."], answer=["4"]) == [-0.1]


@pytest.mark.parametrize("value", [0.1, 1.0, math.nan, math.inf])
def test_a_wrong_answer_is_never_rewarded(value: float) -> None:
    with pytest.raises(ValueError, match="must not be rewarded"):
        with_negative_reward(same_reward, value)


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("plain", "plain"),
        ([{"role": "assistant", "content": "said"}], "said"),
        ([{"role": "user", "content": "asked"}, {"role": "assistant", "content": "said"}], "said"),
        (
            [{"role": "assistant", "content": [{"type": "text", "text": "in "}, {"type": "text", "text": "parts"}]}],
            "in parts",
        ),
        ([{"role": "assistant", "content": None}], ""),
        ([{"role": "assistant", "tool_calls": []}], ""),
        ([], ""),
        (None, ""),
    ],
)
def test_text_of_a_completion(completion: Any, text: str) -> None:
    assert answer_text(completion) == text


@given(st.lists(st.dictionaries(st.sampled_from(["role", "content"]), st.text() | st.none() | st.lists(st.text()))))
def test_text_of_any_conversation_is_a_text(messages: list[dict[str, Any]]) -> None:
    assert isinstance(answer_text(messages), str)
