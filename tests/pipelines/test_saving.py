"""A saved pipeline is a folder that `transformers.pipeline` loads, with everything that decides its answers."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
from transformers import pipeline

from peft_svf import ExpertBank, PromptDispatcher, Transformer2Pipeline
from peft_svf.dispatch import ClassifierDispatcher, FixedDispatcher
from peft_svf.experts import ExpertBankError, ExpertEntry
from peft_svf.pipelines.saving import dispatcher_options
from peft_svf.playground import BANK_FOLDER


PROMPTS = ["Tom has 23 apples and buys 18 more. How many apples does Tom have?", "Hello"]


def test_a_saved_pipeline_answers_as_before(tmp_path):
    playground = ExpertBank.from_pretrained(BANK_FOLDER)
    playground.add("second", BANK_FOLDER / "math", label="sums")  # the bank as it is now, not as it was loaded
    pipe = Transformer2Pipeline(playground, dispatcher=PromptDispatcher(playground, mode="soft", top_k=2))
    folder = pipe.save_pretrained(tmp_path / "saved")
    assert not (folder / "base").exists()  # its base has a checkpoint
    loaded = pipeline(model=str(folder))
    assert type(loaded) is Transformer2Pipeline
    described = playground.experts["math"].description  # which is also what the facts of the second say
    assert loaded.bank.experts["second"] == playground.experts["second"] == ExpertEntry("sums", described)
    options = {"batch_size": 2, "max_new_tokens": 12}
    records = loaded(PROMPTS, **options)
    assert records == pipe(PROMPTS, **options)
    assert records[0][0]["expert"] == "mixture"


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, None),
        ({"margin": 0.25}, {"margin": 0.25}),
        ({"mode": "soft", "top_k": 2, "temperature": 2.0}, {"mode": "soft", "top_k": 2, "temperature": 2.0}),
        ({"calibrate": True, "instruction": "Math, code, reasoning or others?"}, ...),
    ],
)
def test_the_options_of_the_dispatcher_are_kept_where_they_are_not_the_default(bank, options, kept):
    dispatcher = PromptDispatcher(bank, **options)
    bank.dispatcher_options = dispatcher_options(dispatcher, bank)
    assert bank.dispatcher_options == (options if kept is ... else kept)
    again = Transformer2Pipeline(bank).dispatcher
    assert type(again) is PromptDispatcher
    assert again.decision == dispatcher.decision
    assert (again.calibrate, again.instruction) == (dispatcher.calibrate, dispatcher.instruction)


def test_which_kind_of_dispatcher_is_kept(bank):
    experts = {name: ExpertEntry(name) for name in ("math", "code")}
    bank = ExpertBank(bank.model, bank.tokenizer, experts, classifier="reasoning")
    for given, kind, kept in (
        (None, ClassifierDispatcher, None),
        ("prompt", PromptDispatcher, {"kind": "prompt"}),
    ):
        dispatcher = Transformer2Pipeline(bank, dispatcher=given).dispatcher
        assert type(dispatcher) is kind
        again = copy.copy(bank)
        again.dispatcher_options = dispatcher_options(dispatcher, bank)
        assert again.dispatcher_options == kept
        assert type(Transformer2Pipeline(again).dispatcher) is kind


def test_a_dispatcher_that_cannot_be_saved_is_named(bank, caplog):
    with caplog.at_level(logging.WARNING):
        assert dispatcher_options(FixedDispatcher(bank, "math"), bank) is None
    assert "The FixedDispatcher is not saved" in caplog.text


def test_a_base_without_a_checkpoint_is_saved_too(bank, tmp_path):
    folder = Transformer2Pipeline(bank, max_new_tokens=8).save_pretrained(tmp_path / "saved")
    assert (folder / "base" / "model.safetensors").is_file()
    loaded = Transformer2Pipeline(folder, max_new_tokens=8)
    loaded.save_pretrained(folder)  # onto itself, though its base lies there
    assert loaded("x") == Transformer2Pipeline(folder, max_new_tokens=8)("x")
    with pytest.raises(ExpertBankError, match="include_base=True"):
        Transformer2Pipeline(bank).save_pretrained(tmp_path / "other", include_base=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("options", [{"kind": "oracle"}, {"margin": 7}, {"depth": 1}], ids=str)
def test_saved_options_that_mean_nothing_here_are_one_clear_error(bank, options: dict[str, Any]):
    bank.dispatcher_options = options
    with pytest.raises(ExpertBankError, match=r"saved with a dispatcher .* pass dispatcher="):
        Transformer2Pipeline(bank)
    assert type(Transformer2Pipeline(bank, dispatcher="prompt").dispatcher) is PromptDispatcher
