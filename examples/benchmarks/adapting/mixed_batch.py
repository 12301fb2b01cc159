"""A mixed batch under eight experts, beside the same batch under one, and beside one expert after another."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from report import Report, Row
from timing import Spread, ratios, time_rounds
from torch import Tensor

from adapting.random_bank import QUICK_SHAPE, SHAPE, describe, generate, padded, prompts, random_bank
from adapting.setting import Setting
from peft_svf.dispatch import Route


PROMPTS = 32
EXPERTS = tuple(f"expert{number}" for number in range(8))
ANSWER = 64  # tokens
MOST, TIMES_FASTER = 1.10, 3.0
WHY_MISSED = "this processor is busy with four rows already, so that eight times as many cost nearly that much more"


def measure(setting: Setting) -> Iterator[str]:
    """One expert and one after another are PEFT's ordinary way: `set_adapter`, then generate.

    Raises:
        RuntimeError: The mixed batch gives other tokens than one expert after another.
    """
    bank = random_bank(EXPERTS, setting.quick)
    batch = padded(bank.tokenizer, prompts(PROMPTS))
    new_tokens = 4 if setting.quick else ANSWER
    route = Route.one_hot([EXPERTS[row % len(EXPERTS)] for row in range(PROMPTS)], EXPERTS)
    tokens: dict[str, Tensor] = {}

    def one_expert() -> None:
        bank.model.set_adapter(EXPERTS[0])
        generate(bank, batch, new_tokens)

    def mixed() -> None:
        with bank.routed(route):
            tokens["mixed"] = generate(bank, batch, new_tokens)

    def in_turn() -> None:
        found = torch.zeros(PROMPTS, new_tokens, dtype=torch.long)
        for number, name in enumerate(EXPERTS):
            rows = slice(number, None, len(EXPERTS))
            bank.model.set_adapter(name)
            found[rows] = generate(bank, {key: value[rows] for key, value in batch.items()}, new_tokens)
        tokens["in turn"] = found

    seconds = time_rounds({"one": one_expert, "mixed": mixed, "in turn": in_turn}, setting.rounds, setting.clock)
    if not torch.equal(tokens["mixed"], tokens["in turn"]):
        rows = (tokens["mixed"] != tokens["in turn"]).any(1).sum().item()
        raise RuntimeError(f"{rows} of {PROMPTS} rows of the mixed batch differ from one expert after another.")
    length = batch["input_ids"].shape[1]
    shape = describe(QUICK_SHAPE if setting.quick else SHAPE)
    what = f"{shape}; {PROMPTS} prompts of {length} tokens, {len(EXPERTS)} experts, answers of {new_tokens} tokens"
    note = f"the same tokens; the mixed batch takes {Spread.of(seconds['mixed']).median:.3g} s"
    yield Report(
        setting.environment,
        [
            Row("mixed batch, × of one expert", what, {"SVF": ratios(seconds, "one")["mixed"]}, MOST, note=note),
            Row(
                "one expert after another, × of the mixed batch",
                what,
                {"SVF": ratios(seconds, "mixed")["in turn"]},
                why_missed=WHY_MISSED,
                at_least=TIMES_FASTER,
            ),
        ],
        columns=("SVF",),
    ).markdown()
