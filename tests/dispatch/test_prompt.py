"""The prompt dispatcher: scores under the base model, labels to names, margin to the base model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from peft_svf import ExpertBank, PromptDispatcher
from peft_svf.dispatch import Dispatcher
from peft_svf.experts import ExpertEntry


PROMPTS = ["What is 2+2?", "def f(x):", "Hello there, how are you?"]


@pytest.fixture
def bank(tiny_llama, character_tokenizer, add_experts) -> ExpertBank:
    model = add_experts(tiny_llama(vocab_size=100, max_position_embeddings=512))
    experts = {"math": ExpertEntry("arithmetic", "sums"), "code": ExpertEntry("programs")}
    return ExpertBank(model, character_tokenizer, experts)


@torch.no_grad()
def label_probabilities(model: LlamaForCausalLM, tokenizer, instruction: str, prompt: str, labels: list[str]):
    """Softmax over the labels' log-probabilities, each from a plain forward of the written-out conversation."""
    head = tokenizer(f"[system]{instruction}\n[user]{prompt}\n[assistant]")["input_ids"]
    scores = []
    for label in labels:
        ids = tokenizer(label)["input_ids"]
        logp = model(torch.tensor([head + ids])).logits[0].log_softmax(-1)
        scores.append(sum(logp[len(head) - 1 + j, token] for j, token in enumerate(ids)))
    return torch.stack(scores).softmax(0)


def test_scores_are_those_of_the_base_model_and_the_best_label_wins(bank, tiny_llama, character_tokenizer):
    dispatcher = PromptDispatcher(bank)
    assert isinstance(dispatcher, Dispatcher)
    route = dispatcher.route(PROMPTS)
    base, labels = tiny_llama(vocab_size=100, max_position_embeddings=512), ["arithmetic", "programs", "others"]
    for prompt, scores, chosen in zip(PROMPTS, route.scores, route.chosen(), strict=True):
        expected = label_probabilities(base, character_tokenizer, dispatcher.instruction, prompt, labels)
        assert list(scores) == labels
        torch.testing.assert_close(torch.tensor(list(scores.values())), expected, atol=1e-4, rtol=1e-4)
        assert chosen == ["math", "code", "others"][int(expected.argmax())]


def test_the_active_adapter_and_trainability_survive_routing(bank):
    bank.model.set_adapter("code", inference_mode=True)
    before = [(name, p.requires_grad) for name, p in bank.model.named_parameters()]
    PromptDispatcher(bank).route(PROMPTS)
    assert bank.model.active_adapter == "code"
    assert [(name, p.requires_grad) for name, p in bank.model.named_parameters()] == before
    assert not any(flag for name, flag in before if "svf_offset" in name)


def test_a_chat_is_classified_by_its_last_user_message(bank):
    chat = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": "2+2?"},
    ]
    dispatcher = PromptDispatcher(bank)
    assert dispatcher.route([chat]).scores == dispatcher.route(["2+2?"]).scores


def test_the_instruction_comes_from_the_argument_then_the_bank_then_the_default(bank):
    assert "arithmetic: sums" in PromptDispatcher(bank).instruction
    bank.instruction = "Which?"
    assert PromptDispatcher(bank).instruction == "Which?"
    assert PromptDispatcher(bank, instruction="What kind?").instruction == "What kind?"


def test_a_bank_without_experts_sends_everything_to_the_base_model(tiny_llama, character_tokenizer):
    bank = ExpertBank(tiny_llama(vocab_size=100), character_tokenizer)
    route = PromptDispatcher(bank).route(["x", "y"])
    assert route.chosen() == ["others", "others"]
    assert route.weights.shape == (2, 0)
