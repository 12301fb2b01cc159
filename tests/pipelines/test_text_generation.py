"""Transformer2Pipeline: every prompt is answered by its expert, in every form that text generation knows."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig, TextGenerationPipeline, pipeline
from transformers.generation.streamers import TextStreamer
from transformers.pipelines.pt_utils import KeyDataset

from peft_svf import ExpertBank, Transformer2Pipeline


MIXED = ["code: sort a list", "math: 2+2?", "hello", "reasoning: why is the sky blue today?", "math: 17*3"]
EXPERTS = ["code", "math", "others", "reasoning", "math"]


def text(records: list[dict]) -> str:
    assert len(records) == 1
    return records[0]["generated_text"]


def test_the_experts_of_these_tests_write_different_texts(write):
    assert len({write("math: 2+2?", expert) for expert in ("math", "code", "reasoning", "others")}) == 4


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_each_row_of_a_batch_is_written_by_its_expert(pipe, write, batch_size):
    records = pipe(MIXED, batch_size=batch_size)
    assert [text(r) for r in records] == [write(p, e) for p, e in zip(MIXED, EXPERTS, strict=True)]
    assert [r[0]["expert"] for r in records] == EXPERTS
    assert [r[0]["scores"] for r in records] == [{e: 1.0} for e in EXPERTS]


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
def test_beams_and_returned_sequences_stay_with_their_prompt(pipe, bank, write, options, batch_size):
    records = pipe(MIXED, batch_size=batch_size, **options)
    assert [r[0]["generated_text"] for r in records] == [
        write(p, e, num_beams=3) for p, e in zip(MIXED, EXPERTS, strict=True)
    ]
    assert all(len(r) == options.get("num_return_sequences", 1) for r in records)
    assert [{x["expert"] for x in r} for r in records] == [{e} for e in EXPERTS]


def test_beams_from_the_generation_config_work_too(pipe, write):
    pipe.model.generation_config.num_beams = 3
    assert [text(r) for r in pipe(MIXED, batch_size=5)] == [
        write(p, e, num_beams=3) for p, e in zip(MIXED, EXPERTS, strict=True)
    ]


def test_sampled_sequences_of_a_mixed_batch(pipe):
    torch.manual_seed(0)
    records = pipe(MIXED, batch_size=5, do_sample=True, num_return_sequences=3, temperature=1.5)
    assert [len(r) for r in records] == [3] * 5
    assert any(len({x["generated_text"] for x in r}) > 1 for r in records)


def test_a_pinned_call_asks_no_dispatcher(pipe, dispatcher, write):
    records = pipe(["math: 2+2?", "code: x"], expert="reasoning", batch_size=2)
    assert [text(r) for r in records] == [write("math: 2+2?", "reasoning"), write("code: x", "reasoning")]
    assert [(r[0]["expert"], r[0]["scores"]) for r in records] == [("reasoning", None)] * 2
    assert dispatcher.asked == 0
    assert text(pipe("math: 2+2?", expert="others")) == write("math: 2+2?", "others")


@pytest.mark.parametrize("batch_size", [1, 4])
def test_single_prompts_can_be_pinned_in_a_batch(pipe, dispatcher, write, batch_size):
    chat = [{"role": "user", "content": "code: x"}]
    prompts = [{"text": "math: 1", "expert": "code"}, {"text": "math: 1"}, {"text": "y", "expert": "others"}]
    records = pipe([*prompts, {"messages": chat, "expert": "math"}], batch_size=batch_size)
    assert [r[0]["expert"] for r in records] == ["code", "math", "others", "math"]
    assert [r[0]["scores"] for r in records] == [None, {"math": 1.0}, None, None]
    assert [text(r) for r in records[:3]] == [write("math: 1", "code"), write("math: 1", "math"), write("y", "others")]
    assert text(records[3])[-1] == {"role": "assistant", "content": write("code: x", "math")}
    assert dispatcher.asked == 1


def test_an_expert_pinned_at_construction_holds_for_calls_that_name_none(bank, dispatcher):
    pipe = Transformer2Pipeline(bank, dispatcher=dispatcher, expert="code", max_new_tokens=2)
    assert pipe("math: 1")[0]["expert"] == "code"
    assert pipe("math: 1", expert="math")[0]["expert"] == "math"


def test_a_text_is_one_user_message_and_the_record_is_the_answer(pipe, write):
    answer = write("math: 2+2?", "math")
    assert text(pipe("math: 2+2?")) == answer
    assert text(pipe("math: 2+2?", return_full_text=True)) == "math: 2+2?" + answer


def test_without_a_chat_template_a_text_is_continued(pipe, write):
    pipe.tokenizer.chat_template = None
    answer = write("math: 2+2?", "math", as_chat=False)
    assert text(pipe("math: 2+2?")) == answer
    assert text(pipe("math: 2+2?", return_full_text=True)) == "math: 2+2?" + answer


def test_chats_behave_as_in_text_generation(pipe, bank):
    chats = [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "math: 2+2?"}],
        [{"role": "user", "content": "math: x"}, {"role": "assistant", "content": "math: The answer"}],  # prefill
    ]
    records = pipe(chats, batch_size=2)
    bank.model.set_adapter("math")
    stock = TextGenerationPipeline(bank.model, bank.tokenizer)
    expected = stock(chats, max_new_tokens=8, do_sample=False)
    assert [text(r) for r in records] == [text(r) for r in expected]
    assert text(pipe(chats[0])) == text(expected[0])
    assert text(pipe(chats[0], return_full_text=False)) == text(expected[0])[-1]["content"]


def test_generators_and_datasets_are_answered_lazily(pipe, write):
    seen = []

    def prompts():
        for prompt in MIXED:
            seen.append(prompt)
            yield prompt

    answers = pipe(prompts(), batch_size=2)
    first = next(iter(answers))
    assert text(first) == write(MIXED[0], "code")
    assert len(seen) < len(MIXED)
    dataset = KeyDataset([{"question": prompt} for prompt in MIXED], "question")
    assert [r[0]["expert"] for r in pipe(dataset, batch_size=3)] == EXPERTS


def test_generation_settings_of_call_construction_model_and_pipeline_in_this_order(bank, dispatcher):
    def length(pipe: Transformer2Pipeline, **kwargs: object) -> int:
        (record,) = pipe("math: 2+2?", return_tensors=True, **kwargs)
        return len(record["generated_token_ids"]) - len(bank.tokenizer("[user]math: 2+2?\n[assistant]")["input_ids"])

    bank.model.generation_config.eos_token_id = None
    plain = Transformer2Pipeline(bank, dispatcher=dispatcher)
    assert length(plain) == 256
    bank.model.generation_config.max_new_tokens = 5
    assert length(plain) == 5
    configured = Transformer2Pipeline(bank, dispatcher=dispatcher, max_new_tokens=7)
    assert length(configured) == 7
    assert length(configured, max_new_tokens=9) == 9
    assert length(configured, generation_config=GenerationConfig(max_new_tokens=11, do_sample=False)) == 11


def test_the_default_number_of_new_tokens_yields_to_the_context(bank, dispatcher):
    bank.model.generation_config.eos_token_id = None
    pipe = Transformer2Pipeline(bank, dispatcher=dispatcher)
    prompt = "math: " + "x" * 400
    tokens = len(bank.tokenizer(f"[user]{prompt}\n[assistant]")["input_ids"])
    (record,) = pipe(prompt, return_tensors=True)
    assert tokens < 512 == len(record["generated_token_ids"])


def test_a_streamer_sees_the_second_pass_only(pipe, bank, write, capsys):
    pipe.dispatcher = Transformer2Pipeline(bank).dispatcher  # the real one, which computes
    answer = pipe("hello", streamer=TextStreamer(bank.tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == text(answer).strip() != ""


def test_the_default_dispatcher_scores_under_the_base_model(bank):
    (record,) = Transformer2Pipeline(bank, max_new_tokens=2)("2+2?")
    assert set(record["scores"]) == {"math", "code", "reasoning", "others"}
    assert sum(record["scores"].values()) == pytest.approx(1)
    assert record["scores"][record["expert"]] == max(record["scores"].values())


@pytest.mark.parametrize("form", ["bank", "peft_model", "folder", "pipeline-bank", "pipeline-folder"])
def test_a_model_may_be_a_bank_its_folder_or_a_peft_model(bank, dispatcher, write, tmp_path, form):
    kwargs = {"dispatcher": dispatcher, "max_new_tokens": 8}
    if form == "bank":
        pipe = Transformer2Pipeline(bank, **kwargs)
    elif form == "peft_model":
        pipe = pipeline("transformer2-generation", model=bank.model, tokenizer=bank.tokenizer, **kwargs)
    elif form == "pipeline-bank":
        pipe = pipeline("transformer2-generation", model=bank, **kwargs)
    else:
        folder = str(bank.save_pretrained(tmp_path / "bank", include_base=True))
        pipe = (
            Transformer2Pipeline(folder, **kwargs)
            if form == "folder"
            else pipeline("transformer2-generation", model=folder, **kwargs)
        )
    assert [text(r) for r in pipe(MIXED[:3], batch_size=3)] == [
        write(p, e) for p, e in zip(MIXED[:3], EXPERTS[:3], strict=True)
    ]


def test_a_plain_model_answers_everything_itself(tiny_llama, character_tokenizer, write):
    model = tiny_llama(vocab_size=100, max_position_embeddings=512)
    pipe = pipeline("transformer2-generation", model=model, tokenizer=character_tokenizer, max_new_tokens=8)
    records = pipe(MIXED, batch_size=2)
    assert [text(r) for r in records] == [write(p, "others") for p in MIXED]
    assert records[0][0]["scores"] == {"others": 1.0}


def test_another_tokenizer_replaces_the_banks(bank, dispatcher, character_tokenizer):
    assert Transformer2Pipeline(bank, tokenizer=character_tokenizer).bank.tokenizer is character_tokenizer
    assert isinstance(Transformer2Pipeline(bank).bank, ExpertBank)
