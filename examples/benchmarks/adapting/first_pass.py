"""What the first pass costs, beside the second one and beside generating the label as the paper does."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice

from report import Report, Row
from timing import Spread, ratios, time_rounds
from transformers import PreTrainedTokenizerBase

from adapting.random_bank import QUICK_SHAPE, SHAPE, describe, generate, padded, prompts, random_bank
from adapting.setting import Setting
from peft_svf import PromptDispatcher
from peft_svf.dispatch import Route
from peft_svf.dispatch.template import RoutingTemplate, default_instruction
from peft_svf.experts import ExpertEntry


EXPERTS = ("math", "code", "reasoning")  # one token each, as in the vocabularies of large models
PROMPTS = 8
INSTRUCTION = 250  # tokens
GOALS = {256: 0.02, 64: 0.06, 8: 0.30}  # answer tokens: pass 1, × of pass 2
TIMES_CHEAPER = 5.0
WHY_MISSED = "both passes read the prompts once, and an answer this short costs little more than that"


def measure(setting: Setting) -> Iterator[str]:
    """Timed in the same rounds: pass 1, pass 2 of three lengths, and the generated label."""
    bank = random_bank(EXPERTS, setting.quick)
    dispatcher = PromptDispatcher(bank, instruction=instruction_of(INSTRUCTION, bank.tokenizer))
    texts = prompts(PROMPTS)
    batch = padded(bank.tokenizer, texts)
    route = Route.one_hot(list(islice(cycle(EXPERTS), PROMPTS)), EXPERTS)
    asked = padded(bank.tokenizer, [dispatcher.scorer.template.render(text) for text in texts])
    label_tokens = 1 + max(map(len, dispatcher.scorer.label_ids))  # and the end token

    def second_pass(new_tokens: int) -> None:
        with bank.routed(route):
            generate(bank, batch, new_tokens)

    def generated_label() -> None:
        with bank.base_only():
            generate(bank, asked, label_tokens)

    lengths = (8,) if setting.quick else tuple(GOALS)
    candidates = {str(length): (lambda length=length: second_pass(length)) for length in lengths}
    candidates |= {"pass 1": lambda: dispatcher.route(texts), "label": generated_label}
    seconds = time_rounds(candidates, setting.rounds, setting.clock)
    tokens = f"prompts of {batch['input_ids'].shape[1]} tokens, instruction of {len(dispatcher.scorer.prefix)}"
    what = f"{describe(QUICK_SHAPE if setting.quick else SHAPE)}; {PROMPTS} {tokens}"
    rows = [
        Row(
            f"pass 1, × of pass 2 with answers of {length} tokens",
            what,
            {"SVF": ratios(seconds, str(length))["pass 1"]},
            GOALS[length],
            WHY_MISSED,
            f"pass 2 takes {Spread.of(seconds[str(length)]).median:.3g} s",
        )
        for length in lengths
    ]
    note = f"{label_tokens} tokens with the end token; pass 1 takes {Spread.of(seconds['pass 1']).median:.3g} s"
    dearer = {"SVF": ratios(seconds, "pass 1")["label"]}
    rows.append(Row("generating the label, × of pass 1", what, dearer, note=note, at_least=TIMES_CHEAPER))
    yield Report(setting.environment, rows, columns=("SVF",)).markdown()


def instruction_of(tokens: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The words of a default instruction, as many as take up so many tokens once rendered."""
    words = default_instruction([ExpertEntry(name) for name in EXPERTS]).split()
    text, following = "Classify:", cycle(words)
    while len(RoutingTemplate(tokenizer, text).prefix_ids()) < tokens:
        text = f"{text} {next(following)}"
    return text
