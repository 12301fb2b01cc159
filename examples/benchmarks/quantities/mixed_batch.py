"""One batch whose rows run under different experts, against the same batch under one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from models import adapt, add_experts, basis_cache, random_tokens
from peft import PeftModel
from report import Row
from timing import Spread, ratios

from quantities.setting import Setting


GOAL = 1.10
WHY_MISSED = "the matrix products are so small here that collecting the offsets of the rows shows"
ROWS = 64
DECODED = 8  # tokens of one timed generation


def measure(setting: Setting) -> Iterator[Row]:
    """Forward over a batch of 64 rows, and decoding from it, each row under an expert of its own."""
    rows = 8 if setting.quick else ROWS
    names = [f"expert{number}" for number in range(rows)]
    _, length = setting.tokens(cuda=(rows, 128), cpu=(rows, 16), slow=(rows, 4))
    tokens = random_tokens(rows, length, setting.device, setting.seed)
    forward, decode = {}, {}
    for method in ("SVF", "LoRA r16"):
        model = _with_experts(setting, method, names)
        forward[method] = _ratio(setting, _forward(model, tokens, None), _forward(model, tokens, names))
        decode[method] = _ratio(setting, _decode(model, tokens[:, :1], None), _decode(model, tokens[:, :1], names))
        del model
    what = f"{rows} rows under {rows} experts"
    yield Row(f"forward of {what}, {length} tokens each, × of one expert", str(setting), forward, GOAL, WHY_MISSED)
    yield Row(f"decoding of {what}, × of one expert", str(setting), decode, GOAL, WHY_MISSED)


def _with_experts(setting: Setting, method: str, names: list[str]) -> PeftModel:
    with basis_cache("off"):
        model = adapt(setting.build_base(), method, names[0])
        add_experts(model, method, names[1:])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".expert" in name:
                parameter.normal_(std=0.02)
    return model.eval()


def _ratio(setting: Setting, single: Callable[[], object], mixed: Callable[[], object]) -> Spread:
    return ratios(setting.time({"single": single, "mixed": mixed}), "single")["mixed"]


def _forward(model: PeftModel, tokens: torch.Tensor, names: list[str] | None) -> Callable[[], object]:
    arguments = {} if names is None else {"adapter_names": names}

    @torch.no_grad()
    def run() -> None:
        model(input_ids=tokens, use_cache=False, **arguments)

    return run


def _decode(model: PeftModel, prompts: torch.Tensor, names: list[str] | None) -> Callable[[], object]:
    arguments = {} if names is None else {"adapter_names": names}
    mask = torch.ones_like(prompts)
    return lambda: model.generate(
        input_ids=prompts,
        attention_mask=mask,
        max_new_tokens=DECODED,
        min_new_tokens=DECODED,
        do_sample=False,
        **arguments,
    )
