"""Experts of a mixture-of-experts model: rows that cannot be generated at once are answered as each alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.generation.streamers import TextStreamer

from peft_svf import ExpertBank, SVFConfig, Transformer2Pipeline
from peft_svf.dispatch import Route
from peft_svf.pipelines.row_groups import join_rows


FUSED = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]}
CHOSEN: list[Any] = ["math", "code", "others", {"math": 0.5, "code": -0.8}, "math"]
TEXTS = ["2+2?", "a longer prompt", "x", "why?", "17*3"]
ROWS = [{"text": text, "expert": expert} for text, expert in zip(TEXTS, CHOSEN, strict=True)]


@pytest.fixture(scope="module")
def model() -> Any:
    """Two adapters on the fused experts of a Mixtral, and two on its attention alone."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    base = MixtralForCausalLM(
        MixtralConfig(vocab_size=100, initializer_range=0.3, eos_token_id=None, **sizes, **heads)
    )
    model = get_peft_model(base, SVFConfig(init_weights=False, **FUSED), "math")
    model.add_adapter("code", SVFConfig(init_weights=False, **FUSED))
    for name in ("attention", "more"):
        model.add_adapter(name, SVFConfig(init_weights=False, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if ".svf_offset." in name:
            parameter.data.mul_(8)
    return model


@pytest.fixture
def bank(model, character_tokenizer) -> ExpertBank:
    return ExpertBank(model, character_tokenizer)


@pytest.fixture
def pipe(bank) -> Transformer2Pipeline:
    return Transformer2Pipeline(bank, dispatcher="others", max_new_tokens=6)


@pytest.fixture
def batches(pipe, monkeypatch) -> list[int]:
    """How many rows each call of generate had."""
    rows: list[int] = []
    generate = pipe.model.generate

    def count(**kwargs: Any) -> Any:
        rows.append(len(kwargs["input_ids"]))
        return generate(**kwargs)

    monkeypatch.setattr(pipe.model, "generate", count)
    return rows


@pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_a_mixed_batch_answers_as_single_calls(pipe, batches, write, options):
    records = pipe(ROWS, batch_size=5, **options)
    assert batches == [2, 1, 1, 1]  # one generate for the rows of each expert or mixture
    assert records == [pipe(row, **options) for row in ROWS]
    beams = {name: value for name, value in options.items() if name == "num_beams"}
    by_hand = [write(TEXTS[row], CHOSEN[row], max_new_tokens=6, **beams) for row in (0, 1, 2, 4)]
    assert [records[row][0]["generated_text"] for row in (0, 1, 2, 4)] == by_hand
    assert len({write(TEXTS[0], expert) for expert in ("math", "code", "others")}) == 3  # the experts matter


def test_answers_of_different_lengths_and_scores_come_back_in_order(pipe, bank):
    end = bank.tokenizer.convert_tokens_to_ids(pipe(ROWS[0])[0]["generated_text"][0])
    options = {"return_dict_in_generate": True, "output_logits": True, "batch_size": 5, "eos_token_id": end}
    records, alone = pipe(ROWS, **options), [pipe(row, **options) for row in ROWS]
    assert [r["generated_text"] for (r,) in records] == [r["generated_text"] for (r,) in alone]
    lengths = [len(r["logits"]) for (r,) in alone]
    assert len(set(lengths)) > 1
    for (record,), (single,), length in zip(records, alone, lengths, strict=True):
        assert len(record["logits"]) == max(lengths)
        torch.testing.assert_close(
            torch.tensor(record["logits"])[:length], torch.tensor(single["logits"]), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("experts", [["math"] * 3, ["attention", "others", "more"]], ids=["alike", "attention"])
def test_rows_that_can_be_generated_at_once_are(pipe, batches, write, experts):
    rows = [{"text": text, "expert": expert} for text, expert in zip(TEXTS, experts, strict=False)]
    records = pipe(rows, batch_size=3)
    assert batches == [3]
    assert [record["generated_text"] for (record,) in records] == [
        write(row["text"], row["expert"], max_new_tokens=6) for row in rows
    ]


def test_weights_of_each_layer_and_a_dispatcher_too(bank, write):
    weights = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # (rows, groups, experts)
    route = Route(weights, ("math", "code"), groups=("model",), residual=False)
    pipe = Transformer2Pipeline(bank, dispatcher=lambda prompts: route[: len(prompts)], max_new_tokens=6)
    records = pipe(TEXTS[:2], batch_size=2)
    expected = [write(text, expert, max_new_tokens=6) for text, expert in zip(TEXTS, ["math", "code"], strict=False)]
    assert [record["generated_text"] for (record,) in records] == expected


def test_a_streamer_takes_one_prompt_at_a_time(pipe, batches, bank, capsys):
    streamer = TextStreamer(bank.tokenizer, skip_prompt=True)
    with pytest.raises(ValueError, match=r"cannot tell rows apart.*batch_size=1"):
        pipe(ROWS[:2], batch_size=2, streamer=streamer)
    assert batches == []
    records = pipe(ROWS[:2], streamer=streamer)
    assert capsys.readouterr().out.split("\n")[:2] == [record["generated_text"] for (record,) in records]


def test_prompts_and_answers_of_several_lengths_are_aligned_where_the_answers_begin():
    ids = [torch.tensor([[1, 2, 3]]), torch.tensor([[4], [5]])]
    sequences = [torch.tensor([[[1, 2, 3, 6]]]), torch.tensor([[[4, 7, 8]], [[5, 9, 0]]])]
    parts = [{"generated_sequence": s, "input_ids": i} for s, i in zip(sequences, ids, strict=True)]
    joined = join_rows(parts, [[1], [0, 2]], pad_token=0)
    assert joined["input_ids"].tolist() == [[0, 0, 4], [1, 2, 3], [0, 0, 5]]
    assert joined["generated_sequence"].tolist() == [[[0, 0, 4, 7, 8]], [[1, 2, 3, 6, 0]], [[0, 0, 5, 9, 0]]]
