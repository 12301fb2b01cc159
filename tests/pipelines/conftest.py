"""A bank on a random model, the text its experts write, and a dispatcher that routes by the first word."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch

from peft_svf import ExpertBank, Transformer2Pipeline
from peft_svf.dispatch import Route


class FirstWordDispatcher:
    """Routes "code: …" to code; counts the prompts it was asked about."""

    def __init__(self, experts: Sequence[str]) -> None:
        self.experts, self.asked = tuple(experts), 0

    def route(self, prompts: Sequence) -> Route:
        self.asked += len(prompts)
        words = [(p if isinstance(p, str) else p[-1]["content"]).split(":")[0] for p in prompts]
        chosen = [word if word in self.experts else "others" for word in words]
        return Route.one_hot(chosen, self.experts, [{name: 1.0} for name in chosen])


@pytest.fixture(scope="session")
def prototypes() -> list[ExpertBank]:
    return []


@pytest.fixture
def bank(prototypes, tiny_llama, character_tokenizer, add_experts) -> ExpertBank:
    if not prototypes:  # a copy costs a quarter of a new one
        base = tiny_llama(vocab_size=100, max_position_embeddings=512)
        model = add_experts(base, names=("math", "code", "reasoning"))
        prototypes.append(ExpertBank(model, character_tokenizer))
    return copy.deepcopy(prototypes[0])


@pytest.fixture
def dispatcher(bank: ExpertBank) -> FirstWordDispatcher:
    return FirstWordDispatcher(list(bank.experts))


@pytest.fixture
def pipe(bank: ExpertBank, dispatcher: FirstWordDispatcher) -> Transformer2Pipeline:
    return Transformer2Pipeline(bank, dispatcher=dispatcher, max_new_tokens=8)


@pytest.fixture
def write(bank: ExpertBank) -> Callable[..., str]:
    """`write(text, expert, **generate_kwargs)`: the answer by hand, with PEFT's `set_adapter` and one `generate`."""

    @torch.no_grad()
    def write(text: str, expert: str, as_chat: bool = True, max_new_tokens: int = 8, **kwargs: object) -> str:
        prompt = f"[user]{text}\n[assistant]" if as_chat else text
        inputs = bank.tokenizer(prompt, return_tensors="pt")
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, **kwargs}
        if expert == "others":
            with bank.model.disable_adapter():
                ids = bank.model.generate(**inputs, **options)
        else:
            bank.model.set_adapter(expert)
            ids = bank.model.generate(**inputs, **options)
        return bank.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    return write
