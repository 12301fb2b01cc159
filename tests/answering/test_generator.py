"""Answers under a route: each row of a batch under its own weights, and what its tokens are worth to those weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerBase

from peft_svf import ExpertBank, SVFConfig
from peft_svf.answering import AnswerGenerator, ScoredAnswer
from peft_svf.answering.likelihood import AnswerLikelihoods
from peft_svf.dispatch import Route
from peft_svf.playground import BANK_FOLDER, generate_problems


EXPERTS = ("math", "code", "reasoning")


@pytest.fixture(scope="module")
def bank() -> ExpertBank:
    return ExpertBank.from_pretrained(BANK_FOLDER)


@pytest.fixture(scope="module")
def prompts() -> list[list[dict[str, str]]]:
    problems = [problem for family in EXPERTS for problem in generate_problems(family, "test", 2, 0)]
    return [[{"role": "user", "content": problem.prompt}] for problem in problems]


@pytest.fixture(scope="module")
def route(bank: ExpertBank) -> Route:
    """Six rows of weights for each layer, free ones: their sums scale the singular values."""
    groups = bank.layer_groups()
    weights = torch.rand(6, len(groups), 3, generator=torch.Generator().manual_seed(0))
    weights = weights / weights.sum(-1, keepdim=True) * torch.linspace(0.7, 1.4, 6)[:, None, None]
    return Route(weights, EXPERTS, groups=groups, residual=False)


def generator_of(bank: ExpertBank, temperature: float = 0.0) -> AnswerGenerator:
    return AnswerGenerator(bank.model, bank.tokenizer, 26, temperature, {}, bank)


def merged(bank: ExpertBank, route: Route, row: int) -> torch.nn.Module:
    """The base model in float64 with z' = Σ αₖ zₖ written into its weights, from an SVD of each."""
    model = copy.deepcopy(bank.base_model).double()
    for name, layer in model.named_modules():
        if not hasattr(layer, "svf_offset"):
            continue
        group = next(i for i, own in enumerate(route.groups) if name.startswith(f"{own}."))
        alpha = route.weights[row, group].double()
        u, s, vh = torch.linalg.svd(layer.base_layer.weight, full_matrices=False)
        z = sum(a * (1 + layer.svf_offset[k].weight) for a, k in zip(alpha, route.experts, strict=True))
        layer.base_layer.weight.data = (u * (s * z)) @ vh
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)
    return model


def answer(bank: ExpertBank, prompts: Any, route: Route | None, temperature: float = 0.0) -> list[ScoredAnswer]:
    generator = generator_of(bank, temperature)
    with torch.no_grad(), generator.ready(seed=1):
        return generator.scored_answers([generator.render(prompt) for prompt in prompts], prompts, route=route)


def likelihood(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: Any, text: str) -> float:
    """Σ log p of the answer and the end token after it, by one forward."""
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    new = tokenizer(text, add_special_tokens=False)["input_ids"]
    new = [*new, tokenizer.eos_token_id] if len(new) < 26 else new
    logits = model(input_ids=torch.tensor([[*start, *new]])).logits[0, len(start) - 1 : -1]
    return float(logits.log_softmax(-1)[torch.arange(len(new)), torch.tensor(new)].sum())


@pytest.fixture(scope="module")
def found(bank: ExpertBank, prompts: list[Any], route: Route) -> list[ScoredAnswer]:
    return answer(bank, prompts, route)


@torch.no_grad()
def test_each_row_is_answered_and_scored_under_its_own_weights(
    bank: ExpertBank, prompts: list[Any], route: Route, found: list[ScoredAnswer]
) -> None:
    plain = answer(bank, prompts, None)
    assert [own.text for own in found] != [own.text for own in plain]
    for row, prompt in enumerate(prompts):
        model = merged(bank, route, row)
        ids = bank.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")
        output = model.generate(**ids, max_new_tokens=26, do_sample=False)
        text = bank.tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert found[row].text == text
        assert found[row].log_likelihood == pytest.approx(likelihood(model, bank.tokenizer, prompt, text), abs=1e-3)


def test_likelihoods_are_those_of_the_model_and_not_of_the_temperature(bank: ExpertBank, prompts: list[Any]) -> None:
    route = Route.one_hot(["math"] * len(prompts), EXPERTS)
    sampled = answer(bank, prompts, route, temperature=0.7)
    bank.model.set_adapter("math")
    with torch.no_grad():
        for prompt, (text, found) in zip(prompts, sampled, strict=True):
            assert found == pytest.approx(likelihood(bank.model, bank.tokenizer, prompt, text), abs=1e-3)


def test_halving_keeps_rows_and_routes_together(
    bank: ExpertBank, prompts: list[Any], route: Route, found: list[ScoredAnswer], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, sizes = bank.model.generate, []

    def small_memory(input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        sizes.append(len(input_ids))
        if len(input_ids) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return generate(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(bank.model, "generate", small_memory)
    generator = generator_of(bank)
    with torch.no_grad(), generator.ready(seed=0):
        halves = generator.scored_answers([generator.render(prompt) for prompt in prompts], prompts, route=route)
    assert sizes == [6, 3, 1, 2, 3, 1, 2]
    assert generator.too_large == 3
    assert [own.text for own in halves] == [own.text for own in found]
    likelihoods = [own.log_likelihood for own in halves]
    assert likelihoods == pytest.approx([own.log_likelihood for own in found], abs=1e-4)


def test_one_prompt_under_many_routes_is_encoded_once(bank: ExpertBank, prompts: list[Any]) -> None:
    generator = generator_of(bank)
    tokenizer, encoded = generator.tokenizer, []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, text: str, **kwargs: Any) -> Any:
            encoded.append(text)
            return tokenizer(text, **kwargs)

    generator.tokenizer = Counting()
    asked = [prompts[row] for row in (0, 1, 0, 0, 1)]
    texts = [generator.render(prompt) for prompt in asked]
    with torch.no_grad(), generator.ready(seed=0):
        answers = generator.answers(texts, asked, route=Route.mixture({"math": 1.0}, rows=5))
    assert sorted(encoded) == sorted({text for text, _ in texts})
    assert answers[0] == answers[2] == answers[3] and answers[1] == answers[4] != answers[0]


def test_a_route_that_does_not_fit_is_refused(bank: ExpertBank, prompts: list[Any]) -> None:
    generator = generator_of(bank)
    texts = [generator.render(prompt) for prompt in prompts]
    with pytest.raises(ValueError, match="route has 2 rows, but there are 6 prompts"):
        generator.answers(texts, prompts, route=Route.mixture({"math": 1.0}, rows=2))
    generator.bank = None
    with pytest.raises(ValueError, match="pass `bank`"):
        generator.answers(texts, prompts, route=Route.mixture({"math": 1.0}, rows=6))


def test_rows_that_a_mixture_of_experts_cannot_tell_apart_are_answered_route_by_route(
    character_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig(vocab_size=100, initializer_range=0.3, **sizes, **heads))
    config: Any = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"], "init_weights": False}
    model: Any = get_peft_model(base, SVFConfig(**config), "one")
    model.add_adapter("two", SVFConfig(**config))
    for name, parameter in model.named_parameters():
        if ".svf_offset." in name:
            parameter.data.mul_(8)
    bank = ExpertBank(model, character_tokenizer)
    route = Route(torch.tensor([[1.0, 0.0], [0.3, 0.7], [1.0, 0.0], [0.0, 0.0]]), ("one", "two"))
    prompts = ["abc", "a longer one", "abc", "abc"]
    generate, rows = model.generate, []
    monkeypatch.setattr(
        model, "generate", lambda **kwargs: rows.append(len(kwargs["input_ids"])) or generate(**kwargs)
    )
    together = answer(bank, prompts, route)
    assert rows == [2, 1, 1]
    alone = [answer(bank, [prompt], route[[row]])[0] for row, prompt in enumerate(prompts)]
    assert [own.text for own in together] == [own.text for own in alone] and len({own.text for own in alone}) == 3
    assert [own.log_likelihood for own in together] == pytest.approx([own.log_likelihood for own in alone], abs=1e-4)


@torch.no_grad()
def test_the_end_token_counts_and_the_padding_behind_it_does_not(tiny_llama: Any) -> None:
    """In a random model, where ending an answer is as unlikely as any other token."""
    model = tiny_llama()
    ids = torch.randint(3, 97, (2, 5), generator=torch.Generator().manual_seed(0))
    free = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, 5:]
    end = int(free[0, 3])
    lengths = [row.tolist().index(end) + 1 if end in row.tolist() else 8 for row in free]
    assert lengths[0] <= 4 < lengths[1]  # one row ends early and is padded
    likelihoods = AnswerLikelihoods()
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
    output = model.generate(ids, **options, **likelihoods.generate_kwargs)
    found = likelihoods.of(output[:, 5:], [end])
    logp = model.double()(output).logits[:, 4:-1].log_softmax(-1).gather(2, output[:, 5:, None])[..., 0]
    expected = [float(row[:length].sum()) for row, length in zip(logp, lengths, strict=True)]
    assert found == pytest.approx(expected, abs=1e-4)
