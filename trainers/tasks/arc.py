"""ARC-Easy and ARC-Challenge: school science questions with three to five options (Clark et al., arXiv 1803.05457)."""

from __future__ import annotations

from collections.abc import Mapping

from peft_svf.trainers.rewards.choice import choice_reward
from peft_svf.trainers.tasks.benchmark import BenchmarkLoader, text_of, user_prompt
from peft_svf.trainers.tasks.files import Row
from peft_svf.trainers.tasks.source import HubSource
from peft_svf.trainers.tasks.task import Task


PROMPT = """{question}

{options}

Think step by step. Then end with the line "The answer is X.", where X is the label of the right option."""


def arc_row(row: Row) -> Row:
    """Prompt and reward columns of an official row. Labels are the row's own: most are A to D, some 1 to 4."""
    choices = row["choices"]
    if not isinstance(choices, Mapping) or not {"text", "label"} <= set(choices):
        raise ValueError(f"`choices` must be like {{'text': [...], 'label': [...]}}, but is {choices!r}")
    texts, labels = list(map(str, choices["text"])), list(map(str, choices["label"]))
    answer = str(row["answerKey"])
    if len(texts) != len(labels) or answer not in labels:
        raise ValueError(f"the options {labels} with {len(texts)} texts do not hold the answer {answer!r}")
    options = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
    return {
        "id": row["id"],
        "prompt": user_prompt(PROMPT.format(question=text_of(row, "question"), options=options)),
        "answer": answer,
        "solution": f"The answer is {answer}.",  # the data gives no reasons
        "choices": {"text": texts, "label": labels},
    }


def _task(name: str, config: str, description: str) -> Task:
    source = HubSource(
        "allenai/ai2_arc",
        config,
        "210d026faf9955653af8916fad021475a3f00453",
        ("train", "test"),
        ("id", "question", "choices", "answerKey"),
    )
    loader = BenchmarkLoader(name, source, arc_row, "question")
    return Task(name, "reasoning", loader, choice_reward, 512, description)


ARC_EASY = _task("arc_easy", "ARC-Easy", "School science questions with options; the label chosen is judged.")
"""ARC-Easy: 2,251 training rows in halves of 1,125, 2,376 test rows."""
ARC_CHALLENGE = _task(
    "arc_challenge",
    "ARC-Challenge",
    "School science questions that word statistics answer wrongly, with options; the label chosen is judged.",
)
"""ARC-Challenge: 1,119 training rows in halves of 559, 1,172 test rows."""
