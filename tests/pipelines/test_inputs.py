"""Every form of prompts that transformers knows, and what it says to the others."""

from __future__ import annotations

import datasets
import pytest
import torch
from tokenizers import processors
from transformers import GenerationConfig, pipeline
from transformers.generation.streamers import TextStreamer
from transformers.pipelines.pt_utils import KeyDataset

from peft_svf import ExpertBank, Transformer2Pipeline
from peft_svf.answering import AnswerGenerator
from peft_svf.playground import BANK_FOLDER, generate_problems


ROWS = [
    {"text": "math: 2+2?", "expert": None},
    {"text": "a longer prompt", "expert": "code"},
    {"text": "hello", "expert": None},
]
EXPERTS = ["math", "code", "others"]


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> dict:
        return ROWS[index]


def texts(records: list) -> list[str]:
    return [record["generated_text"] for (record,) in records]


@pytest.fixture
def pipe(bank, dispatcher) -> Transformer2Pipeline:
    return Transformer2Pipeline(bank, dispatcher=dispatcher, max_new_tokens=3)


@pytest.fixture
def expected(write) -> list[str]:
    return [write(row["text"], expert, max_new_tokens=3) for row, expert in zip(ROWS, EXPERTS, strict=True)]


@pytest.mark.parametrize(
    "inputs",
    [
        lambda: ROWS,
        lambda: tuple(ROWS),
        lambda: Rows(),
        lambda: datasets.Dataset.from_list(ROWS),
        lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
        lambda: (row for row in ROWS),
        lambda: KeyDataset([{"question": row} for row in ROWS], "question"),
    ],
    ids=["list", "tuple", "torch dataset", "dataset", "iterable dataset", "generator", "column of a dataset"],
)
def test_rows_with_their_own_experts_in_every_container(pipe, expected, inputs):
    records = list(pipe(inputs(), batch_size=2))
    assert texts(records) == expected
    assert [record["expert"] for (record,) in records] == EXPERTS


def test_chats_of_a_dataset(pipe, write):
    chats = [[{"role": "user", "content": row["text"]}] for row in ROWS]
    dataset = datasets.Dataset.from_dict({"messages": chats, "expert": EXPERTS})
    records = list(pipe(dataset, batch_size=3, return_full_text=False))
    assert texts(records) == [
        write(row["text"], expert, max_new_tokens=3) for row, expert in zip(ROWS, EXPERTS, strict=True)
    ]
    assert [record["expert"] for (record,) in pipe(KeyDataset(dataset, "messages"))] == ["math", "others", "others"]


def test_workers_that_prepare_prompts_change_nothing(pipe, expected):
    assert texts(pipe(ROWS, batch_size=2, num_workers=1)) == expected


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (lambda: datasets.Dataset.from_list(ROWS)["text"], TypeError, r"pass list\(column\), or .*KeyDataset"),
        (lambda: datasets.Dataset.from_dict({"question": ["x"]}), ValueError, r"columns \['question'\].*KeyDataset"),
        (lambda: datasets.DatasetDict(), TypeError, "A DatasetDict"),
    ],
)
def test_a_dataset_that_cannot_be_read_names_the_remedy(pipe, inputs, error, message):
    with pytest.raises(error, match=message):
        pipe(inputs())


def test_a_pipeline_may_be_chosen_by_its_class(bank, dispatcher, expected):
    kwargs = {"pipeline_class": Transformer2Pipeline, "dispatcher": dispatcher, "max_new_tokens": 3}
    pipe = pipeline("text-generation", model=bank.model, tokenizer=bank.tokenizer, **kwargs)
    assert texts(pipe(ROWS, batch_size=3)) == expected


def test_a_generation_config_of_the_call_replaces_the_settings_of_construction(bank, dispatcher):
    pipe = Transformer2Pipeline(bank, dispatcher=dispatcher, max_new_tokens=4, num_beams=2, num_return_sequences=2)
    assert len(pipe("math: 2+2?")) == 2
    assert len(pipe("math: 2+2?", generation_config=GenerationConfig(max_new_tokens=4, do_sample=False))) == 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_returned_sequences_of_a_generation_config_stay_with_their_prompt(pipe, write, batch_size):
    config = GenerationConfig(max_new_tokens=3, num_beams=3, num_return_sequences=3, do_sample=False)
    records = pipe(ROWS, batch_size=batch_size, generation_config=config)
    assert [len(r) for r in records] == [3, 3, 3]
    assert [r[0]["generated_text"] for r in records] == [
        write(row["text"], expert, num_beams=3, max_new_tokens=3) for row, expert in zip(ROWS, EXPERTS, strict=True)
    ]


def test_scores_of_generation_come_with_the_records(pipe, expected):
    records = pipe(ROWS, batch_size=3, return_dict_in_generate=True, output_logits=True)
    assert texts(records) == expected
    assert [record["expert"] for (record,) in records] == EXPERTS


def test_a_streamer_takes_one_prompt_at_a_time_and_a_refusal_leaves_no_trace(pipe, bank, expected):
    with pytest.raises(ValueError, match="batch size 1"):
        pipe(ROWS, batch_size=3, streamer=TextStreamer(bank.tokenizer))
    assert texts(pipe(ROWS, batch_size=3)) == expected


# ---------------------------------------------------------------- rendering, in the pipeline and in evaluation
CHATS = [
    [{"role": "user", "content": "2+2?"}],
    [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "2+2?"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "text", "text": "c"}]},
    ],
]


@pytest.fixture
def tokens_of_both(pipe, bank):
    """Ids of a prompt in the pipeline and in `AnswerGenerator`; the tokenizer puts <s> in front of texts."""
    bank.tokenizer._tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    generator = AnswerGenerator(bank.model, bank.tokenizer, 8, 0.0, {})

    def tokens_of_both(prompt) -> tuple[list[int], list[int]]:
        ours = pipe.preprocess(prompt)["input_ids"]
        theirs = generator._inputs([generator.render(prompt)], [prompt], None)["input_ids"]
        return ours[0].tolist(), theirs[0].tolist()

    return tokens_of_both


@pytest.mark.parametrize("prompt", CHATS[:2], ids=["question", "system message"])
def test_a_chat_has_the_tokens_that_evaluation_gives_it(tokens_of_both, prompt):
    ours, theirs = tokens_of_both(prompt)
    assert ours == theirs
    assert ours[0] != 1


@pytest.mark.parametrize("prompt", ["2+2?", *CHATS], ids=["text", "question", "system message", "typed parts"])
def test_without_a_chat_template_too(tokens_of_both, bank, prompt):
    bank.tokenizer.chat_template = None
    ours, theirs = tokens_of_both(prompt)
    assert ours == theirs
    assert ours[0] == 1


def test_a_text_is_a_user_message_here_and_a_text_to_be_continued_there(tokens_of_both):
    ours, theirs = tokens_of_both("2+2?")
    assert ours == tokens_of_both([{"role": "user", "content": "2+2?"}])[1]
    assert theirs != ours


def test_an_answer_that_was_begun_is_continued_without_a_chat_template(pipe, bank, write):
    bank.tokenizer.chat_template = None
    question, begun = {"role": "user", "content": "math: 2+2?"}, {"role": "assistant", "content": "It is"}
    answer = write("math: 2+2?\nIt is", "math", as_chat=False, max_new_tokens=3)
    (record,) = pipe([question, begun], expert="math")
    assert record["generated_text"] == [question, {"role": "assistant", "content": "It is" + answer}]
    (record,) = pipe([question], expert="math")
    assert record["generated_text"][-1]["content"] == write("math: 2+2?\n", "math", as_chat=False, max_new_tokens=3)


def test_the_playground_answers_as_in_evaluation():
    bank = ExpertBank.from_pretrained(BANK_FOLDER)
    chats = [
        [{"role": "user", "content": problem.prompt}]
        for family in ("math", "code", "reasoning")
        for problem in generate_problems(family, "test", 2, seed=1)
    ]
    pipe = Transformer2Pipeline(bank, max_new_tokens=16)
    generator = AnswerGenerator(bank.model, bank.tokenizer, 16, 0.0, {})
    answers = set()
    for expert in ("math", "others"):
        records = pipe(chats, expert=expert, batch_size=6, return_full_text=False)
        with generator.ready(seed=0), bank.routed(expert):
            expected = generator.answers([generator.render(chat) for chat in chats], chats)
        assert texts(records) == expected
        answers.add(tuple(expected))
    assert len(answers) == 2
