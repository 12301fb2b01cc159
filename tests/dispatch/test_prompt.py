"""The prompt dispatcher: scores under the base model, labels to names, margin to the base model."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM

from peft_svf import ExpertBank, PromptDispatcher, SVFConfig
from peft_svf.dispatch import Dispatcher
from peft_svf.experts import ExpertEntry
from peft_svf.tuner.layer import SVFLayer


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


def test_options_reach_the_decision_and_bad_ones_are_refused(bank):
    probabilities = torch.tensor([list(row.values()) for row in PromptDispatcher(bank).route(PROMPTS).scores])
    soft = PromptDispatcher(bank, mode="soft").route(PROMPTS)
    torch.testing.assert_close(soft.weights, probabilities[:, :2])
    assert PromptDispatcher(bank, margin=1.0).route(PROMPTS).chosen() == ["others"] * 3
    with pytest.raises(ValueError, match="between 0 and 1"):
        PromptDispatcher(bank, margin=1.5)


def test_an_expert_that_comes_or_goes_is_known_to_the_next_route(bank):
    bank.model.add_adapter("poems", SVFConfig(task_type="CAUSAL_LM"))
    dispatcher = PromptDispatcher(bank)
    before = dispatcher.route(PROMPTS)
    assert dispatcher.scorer is dispatcher.scorer  # not made anew for each call
    bank.experts["poems"] = ExpertEntry("verse", "rhymes")
    assert list(dispatcher.route(PROMPTS).scores[0]) == ["arithmetic", "programs", "verse", "others"]
    assert "- verse: rhymes" in dispatcher.instruction
    del bank.experts["poems"]
    after = dispatcher.route(PROMPTS)
    assert after.scores == before.scores and after.experts == ("math", "code")
    bank.experts["math"] = ExpertEntry("arithmetic", "and more")
    assert "and more" in dispatcher.instruction
    bank.experts.clear()
    assert dispatcher.route(PROMPTS).row_weights() == [{}] * 3


def test_an_instruction_that_does_not_name_a_label_is_reported(bank, caplog):
    PromptDispatcher(bank, instruction="Arithmetic or others?")
    assert "does not name programs" in caplog.text
    caplog.clear()
    PromptDispatcher(bank)
    assert not caplog.text


def test_calibrated_scores_are_probabilities_over_those_after_content_free_prompts(bank):
    plain, calibrated = PromptDispatcher(bank), PromptDispatcher(bank, calibrate=True)
    raw, free = (
        torch.tensor([list(row.values()) for row in plain.route(prompts).scores])
        for prompts in (PROMPTS, ["N/A", "[MASK]", ""])
    )
    expected = raw / free.mean(0)
    scores = torch.tensor([list(row.values()) for row in calibrated.route(PROMPTS).scores])
    torch.testing.assert_close(scores, expected / expected.sum(1, keepdim=True))
    assert (scores - raw).abs().max() > 0.05


def test_threads_share_a_dispatcher_while_the_bank_changes(bank):
    dispatcher = PromptDispatcher(bank)
    expected = dispatcher.route(PROMPTS).scores
    entry = bank.experts.pop("code")
    without = dispatcher.route(PROMPTS).scores
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            bank.experts["code"] = entry
            bank.experts.pop("code")

    with ThreadPoolExecutor(3) as pool:
        pool.submit(come_and_go)
        routed = [pool.submit(lambda: [dispatcher.route(PROMPTS).scores for _ in range(8)]) for _ in range(2)]
        try:
            seen = [scores for future in routed for scores in future.result()]
        finally:
            stop.set()
    for scores in seen:
        wanted = expected if len(scores[0]) == 3 else without
        assert all(row == pytest.approx(other, abs=1e-5) for row, other in zip(scores, wanted, strict=True))


# -------------------------------------------------------------------- hundreds of experts
@pytest.fixture
def large_bank(tiny_llama, character_tokenizer) -> ExpertBank:
    """300 experts on one matrix, without PEFT's 10 ms and more for each."""
    base = tiny_llama(vocab_size=100, num_hidden_layers=1, max_position_embeddings=256)
    model = get_peft_model(base, SVFConfig(task_type="CAUSAL_LM", target_modules=["up_proj"]), "skill000")
    layers = [module for module in model.modules() if isinstance(module, SVFLayer)]
    for name in (f"skill{i:03d}" for i in range(1, 300)):
        model.peft_config[name] = SVFConfig(task_type="CAUSAL_LM", init_weights=False)
        for layer in layers:
            layer.update_layer(name, model.peft_config[name])
    experts = {f"skill{i:03d}": ExpertEntry(f"skill {i}" if i % 2 else f"topic {i:03d}") for i in range(300)}
    return ExpertBank(model, character_tokenizer, experts)


def test_300_experts_are_routed_like_by_brute_force(large_bank):
    dispatcher = PromptDispatcher(large_bank, instruction="Which?")
    dispatcher.scorer.max_logits = 100 * 200  # in several forwards
    route = dispatcher.route(PROMPTS)
    labels = [*large_bank.labels, "others"]
    assert route.weights.shape == (3, 300) and list(route.scores[0]) == labels
    end = large_bank.tokenizer.eos_token  # "skill 1" begins "skill 11"
    with large_bank.base_only() as base:
        for prompt, scores in zip(PROMPTS[:1], route.scores, strict=False):
            expected = label_probabilities(
                base, large_bank.tokenizer, "Which?", prompt, [label + end for label in labels]
            )
            torch.testing.assert_close(torch.tensor(list(scores.values())), expected, atol=1e-5, rtol=1e-3)
    ids = torch.arange(5, 25).expand(3, -1)
    with torch.no_grad(), large_bank.routed(route) as model:
        mixed = model(ids).logits
    for row, name in enumerate(route.chosen()):
        if name != "others":
            large_bank.model.set_adapter(name)
            torch.testing.assert_close(large_bank.model(ids[row : row + 1]).logits[0], mixed[row])
