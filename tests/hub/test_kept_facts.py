"""Facts are not lost on the way: from folder to live model to the Hub, and by a push that knows fewer of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import LlamaForCausalLM
from transformers.utils import logging

from peft_svf import Expert, ExpertBank, ExpertEntry
from peft_svf.experts.live_facts import attach_facts, facts_of
from peft_svf.hub import push_bank, push_expert


RESULTS = [{"task": "sums", "n": 50, "base": 0.5, "expert": 0.9}]
FACTS = {"name": "Adder", "label": "sums", "task": "adding", "steps": 7, "license": "mit", "results": RESULTS}
EXPERTS: list[Expert] = []


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_svf.plots.plot_levers", lambda expert, path, title=None: path.write_bytes(b"levers"))


@pytest.fixture
def base(tiny_llama: Callable[..., LlamaForCausalLM], hub: Any) -> LlamaForCausalLM:
    """The base model, which the Hub knows by its name only."""
    hub.put("user/base", {"config.json": b"{}"})
    return tiny_llama(vocab_size=100)


@pytest.fixture
def expert(base: LlamaForCausalLM, add_experts: Callable[..., PeftModel]) -> Expert:
    if not EXPERTS:
        EXPERTS.append(Expert.from_model(add_experts(base, names=("default",)).eval(), metadata=FACTS))
        EXPERTS[0].config.base_model_name_or_path = "user/base"
    return EXPERTS[0]


@pytest.fixture
def base_again(tiny_llama: Callable[..., LlamaForCausalLM], expert: Expert) -> LlamaForCausalLM:
    """The same base model without adapters."""
    return tiny_llama(vocab_size=100)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logging.enable_propagation()
    yield caplog
    logging.disable_propagation()


def said(hub: Any, path: str = "expert.json", name: str = "user/sums") -> dict[str, Any]:
    return json.loads(hub.files(name)[path])


def without_facts(expert: Expert, factor: float = 1.0) -> Expert:
    return expert.with_offsets({name: factor * offset for name, offset in expert.offsets.items()}, {})


# -- with the live model ---------------------------------------------------------------------------------------------
def test_a_live_model_is_pushed_with_the_facts_it_was_loaded_with(
    hub: Any, expert: Expert, base_again: LlamaForCausalLM
) -> None:
    model = expert.put_into(base_again, "sums")
    model.push_to_hub("user/sums")
    assert said(hub).items() >= FACTS.items()
    assert ModelCard(hub.files("user/sums")["README.md"].decode()).data.license == "mit"


def test_an_expert_that_is_trained_on_does_not_claim_the_results_of_the_former(
    hub: Any, expert: Expert, base_again: LlamaForCausalLM, warnings: pytest.LogCaptureFixture
) -> None:
    model = expert.put_into(base_again, "sums")
    parameter = next(p for name, p in model.named_parameters() if "svf_offset" in name)
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(0.01)
    assert Expert.from_model(model, "sums").metadata == {}
    model.push_to_hub("user/sums")
    assert "results" not in said(hub) and "has changed since its facts were recorded" in warnings.text
    with torch.no_grad():
        parameter.copy_(before)
    assert Expert.from_model(model, "sums").metadata == FACTS
    assert Expert.from_model(model, "sums", metadata={}).metadata == {}


def test_facts_follow_an_expert_through_banks(
    expert: Expert, base_again: LlamaForCausalLM, character_tokenizer: Any
) -> None:
    bank = ExpertBank(base_again, character_tokenizer)
    bank.add("sums", expert)
    bank.rename("sums", "adder")
    assert facts_of(bank.model, "adder") == FACTS and facts_of(bank.model, "sums") == {}
    again = ExpertBank(bank.model, character_tokenizer)
    assert again.facts == {"adder": FACTS}
    later = ExpertBank(bank.model, character_tokenizer, experts={})
    later.add("adder")
    assert later.facts == {"adder": FACTS} and later.experts["adder"].label == "sums"
    facts_of(bank.model, "adder")["results"].clear()
    assert facts_of(bank.model, "adder") == FACTS  # they are a copy
    attach_facts(bank.model, "adder", {})
    assert facts_of(bank.model, "adder") == {}


# -- on the Hub ------------------------------------------------------------------------------------------------------
def test_a_push_of_the_same_expert_with_fewer_facts_takes_none_back(hub: Any, expert: Expert) -> None:
    first = push_expert(expert, "user/sums")
    again = push_expert(without_facts(expert), "user/sums")
    assert again.unchanged and again.commit == first.commit
    push_expert(without_facts(expert), "user/sums", facts={"license": None, "description": "Adds.", "steps": 8})
    assert said(hub).items() >= {**{k: v for k, v in FACTS.items() if k != "license"}, "steps": 8}.items()
    assert "license" not in said(hub) and said(hub)["description"] == "Adds."


def test_another_expert_keeps_what_the_repository_is_about_and_claims_no_results(
    hub: Any, expert: Expert, warnings: pytest.LogCaptureFixture
) -> None:
    commit = push_expert(expert, "user/sums").commit
    push_expert(without_facts(expert, 2.0), "user/sums")
    assert said(hub).items() >= {"name": "Adder", "label": "sums", "license": "mit"}.items()
    assert not {"results", "task", "steps"} & said(hub).keys()
    assert "this is not known: results, steps, task. Push again with facts={...}" in warnings.text
    assert f"in commit {commit[:7]}" in warnings.text


@pytest.mark.parametrize("content", [b"{", b'{"steps": "many"}', b"[]"])
def test_facts_on_the_hub_that_cannot_be_used_are_replaced(hub: Any, expert: Expert, content: bytes) -> None:
    push_expert(expert, "user/sums")
    hub.put("user/sums", {"expert.json": content})
    push_expert(expert, "user/sums")
    assert said(hub).items() >= FACTS.items()


def test_a_bank_keeps_the_facts_of_its_experts_and_its_own(
    hub: Any, expert: Expert, base_again: LlamaForCausalLM, character_tokenizer: Any
) -> None:
    bank = ExpertBank(base_again, character_tokenizer)
    bank.add("sums", expert)
    confusion = {"true": ["sums"], "chosen": ["sums"], "counts": [[5]]}
    options = {"base_model": "user/base"}
    push_bank(bank, "user/bank", facts={"license": "mit", "confusion": confusion}, **options)
    known = said(hub, "bank.json", "user/bank")
    poor = ExpertBank(bank.model, character_tokenizer, {"sums": ExpertEntry("sums")}, facts={})
    assert push_bank(poor, "user/bank", **options).unchanged
    poor.add("more", without_facts(expert, 2.0))
    push_bank(poor, "user/bank", **options)
    assert said(hub, "sums/expert.json", "user/bank")["results"] == RESULTS
    assert "results" not in said(hub, "more/expert.json", "user/bank")
    assert known["confusion"]["counts"] == [[5]]  # of a bank without the new expert
    assert "confusion" not in said(hub, "bank.json", "user/bank")
    assert said(hub, "bank.json", "user/bank")["license"] == "mit"
