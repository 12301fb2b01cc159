"""The classification expert routes with its own weights, whatever happens to them between two calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from peft_svf import ExpertBank, PromptDispatcher
from peft_svf.dispatch import ClassifierDispatcher
from peft_svf.tuner.hotswap import hotswap_adapter


PROMPTS = ["What is 2+2?", "def f(x):", "Hello there, how are you?"]
NAMES = ("math", "code", "judge")


@pytest.fixture
def build(tiny_llama, add_experts) -> Callable[..., PeftModel]:
    return lambda seed=0: add_experts(tiny_llama(vocab_size=100, max_position_embeddings=512), NAMES, seed=seed)


@pytest.fixture
def bank(build, character_tokenizer) -> ExpertBank:
    return ExpertBank(build(), character_tokenizer, classifier="judge")


@torch.no_grad()
def probabilities(
    model: PeftModel, adapter: str, tokenizer: PreTrainedTokenizerBase, instruction: str
) -> torch.Tensor:
    """Softmax over the labels' log-probabilities, each from a plain forward under the active adapter."""
    model.set_adapter(adapter)
    rows = []
    for prompt in PROMPTS:
        head = tokenizer(f"[system]{instruction}\n[user]{prompt}\n[assistant]")["input_ids"]
        scores = []
        for label in ("math", "code", "others"):
            ids = tokenizer(label)["input_ids"]
            logp = model(torch.tensor([head + ids])).logits[0].log_softmax(-1)
            scores.append(sum(logp[len(head) - 1 + j, token] for j, token in enumerate(ids)))
        rows.append(torch.stack(scores).softmax(0))
    return torch.stack(rows)


def scores(dispatcher: PromptDispatcher) -> torch.Tensor:
    return torch.tensor([list(row.values()) for row in dispatcher.route(PROMPTS).scores])


def assert_routes_under(dispatcher: ClassifierDispatcher, adapter: str) -> None:
    bank = dispatcher.bank
    expected = probabilities(bank.model, adapter, bank.tokenizer, dispatcher.instruction)
    torch.testing.assert_close(scores(dispatcher), expected, atol=1e-5, rtol=1e-4)


def fills(dispatcher: PromptDispatcher) -> int:
    return dispatcher.scorer._cache.fills


def test_scores_are_those_of_the_classification_expert_beside_those_of_the_base(bank):
    classifier, prompt = ClassifierDispatcher(bank), PromptDispatcher(bank)
    base = scores(prompt)
    assert list(classifier.route(PROMPTS).scores[0]) == ["math", "code", "others"]
    assert_routes_under(classifier, "judge")
    torch.testing.assert_close(scores(prompt), base, atol=0, rtol=0)
    assert (scores(classifier) - base).abs().max() > 1e-2
    assert_routes_under(classifier, "judge")
    assert fills(classifier) == fills(prompt) == 1


def by_data(model: PeftModel, *_: object) -> None:
    """A write that PyTorch's version counters do not see."""
    parameters = [p for name, p in model.named_parameters() if ".svf_offset.judge." in name]
    versions = [parameter._version for parameter in parameters]
    for parameter in parameters:
        parameter.data.mul_(-1)
    assert [parameter._version for parameter in parameters] == versions


def by_training(model: PeftModel, *_: object) -> None:
    model.set_adapter("judge")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0)
    ids = torch.arange(5, 40)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()


def by_hotswap(model: PeftModel, build: Callable[..., PeftModel], folder: str) -> None:
    build(seed=1).save_pretrained(folder, selected_adapters=["judge"])
    hotswap_adapter(model, f"{folder}/judge", "judge")


def by_strength(model: PeftModel, *_: object) -> None:
    model.base_model.set_strength("judge", 0.5)


def by_loading_anew(model: PeftModel, build: Callable[..., PeftModel], folder: str) -> None:
    build(seed=2).save_pretrained(folder, selected_adapters=["judge"])
    model.delete_adapter("judge")
    model.load_adapter(f"{folder}/judge", "judge")


@pytest.mark.parametrize("change", [by_data, by_training, by_hotswap, by_strength, by_loading_anew])
def test_the_prefix_is_computed_anew_when_the_classifier_has_changed(bank, build, tmp_path, change):
    dispatcher = ClassifierDispatcher(bank)
    before = scores(dispatcher)
    assert fills(dispatcher) == 1
    change(bank.model, build, str(tmp_path))
    after = scores(dispatcher)
    assert (after - before).abs().max() > 1e-3
    assert_routes_under(dispatcher, "judge")
    assert fills(dispatcher) == 2


def test_a_change_of_another_expert_leaves_the_prefix(bank):
    dispatcher = ClassifierDispatcher(bank)
    before = scores(dispatcher)
    bank.model.base_model.set_strength("math", 0.3)
    torch.testing.assert_close(scores(dispatcher), before, atol=0, rtol=0)
    assert fills(dispatcher) == 1


def test_the_bank_may_get_another_classifier_and_an_argument_stays(bank):
    of_bank, given = ClassifierDispatcher(bank), ClassifierDispatcher(bank, "math")
    scores(of_bank), scores(given)
    bank.classifier = "code"
    assert_routes_under(of_bank, "code")
    assert_routes_under(given, "math")
    bank.classifier = None
    with pytest.raises(ValueError, match="no classification expert; pass classifier="):
        of_bank.route(PROMPTS)


def test_a_classifier_is_loaded_from_a_folder_and_a_bad_one_leaves_nothing(bank, build, tmp_path):
    other = build(seed=1)
    other.save_pretrained(tmp_path, selected_adapters=["judge"])
    dispatcher = ClassifierDispatcher(bank, tmp_path / "judge")
    assert dispatcher.classifier == "classifier"
    expected = probabilities(other, "judge", bank.tokenizer, dispatcher.instruction)
    torch.testing.assert_close(scores(dispatcher), expected, atol=1e-5, rtol=1e-4)
    assert bank.model.active_adapters == ["math"] and list(bank.experts) == ["math", "code"]
    (tmp_path / "judge" / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot be loaded"):
        ClassifierDispatcher(bank, str(tmp_path / "judge"))
    assert set(bank.model.peft_config) == {*NAMES, "classifier"}
    scores(dispatcher)


@pytest.mark.parametrize(
    ("given", "message"),
    [("juge", "neither an adapter of the model, which has math, code, judge, nor a folder"), (None, "no classific")],
)
def test_a_missing_classifier_is_named(build, character_tokenizer, given, message):
    bank = ExpertBank(build(), character_tokenizer)
    with pytest.raises(ValueError, match=message):
        ClassifierDispatcher(bank, given)


def test_an_adapter_of_another_type_is_refused(bank, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no classifier in .* is of type LORA; experts are SVF adapters"):
        ClassifierDispatcher(bank, tmp_path)


def test_a_bank_without_experts_has_nothing_to_classify(tiny_llama, character_tokenizer):
    with pytest.raises(ValueError, match="no experts"):
        ClassifierDispatcher(ExpertBank(tiny_llama(vocab_size=100), character_tokenizer), "judge")
