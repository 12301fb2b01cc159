"""An adapter meets the base it was trained on, or says which one that is."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from peft_svf import SVFConfig
from peft_svf.tuner import SVFLayer


IDS = torch.tensor([[5, 17, 42, 3, 60]])
Build = Callable[..., LlamaForCausalLM]


@pytest.fixture
def saved(tiny_llama: Build, tmp_path: Path) -> Path:
    """An adapter for `tiny_llama(seed=0)`, which was called 'someone/base'."""
    base = tiny_llama()
    base.name_or_path = "someone/base"
    get_peft_model(base, SVFConfig(init_weights=False)).save_pretrained(tmp_path, save_embedding_layers=False)
    return tmp_path


def load_with_peft(base: LlamaForCausalLM, path: Path) -> None:
    PeftModel.from_pretrained(base, path)


def load_with_peft_in_low_memory(base: LlamaForCausalLM, path: Path) -> None:
    PeftModel.from_pretrained(base, path, low_cpu_mem_usage=True)


def load_second_adapter(base: LlamaForCausalLM, path: Path) -> None:
    config = SVFConfig(target_modules=["q_proj"])
    get_peft_model(base, config, "first").load_adapter(path, "second")


def load_with_transformers(base: LlamaForCausalLM, path: Path) -> None:
    base.load_adapter(str(path))


def inject(base: LlamaForCausalLM, path: Path) -> None:
    inject_adapter_in_model(PeftConfig.from_pretrained(path), base)


ENTRIES = [load_with_peft, load_with_peft_in_low_memory, load_second_adapter, load_with_transformers, inject]


def count(model: torch.nn.Module) -> int:
    return sum(isinstance(module, SVFLayer) for module in model.modules())


def damage(path: Path, change: Callable[[dict], None]) -> None:
    file = path / "adapter_config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def test_saved_config_holds_a_sketch_of_every_adapted_weight(saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    fingerprint = config["base_fingerprint"]
    assert len(fingerprint) == 14 and fingerprint["model.layers.0.self_attn.k_proj"][:2] == [16.0, 32.0]
    assert config["base_model_name_or_path"] == "someone/base"


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_right_base_loads_without_a_warning(tiny_llama: Build, saved: Path, entry: Callable) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="this adapter")
        entry(tiny_llama(), saved)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"seed": 1}, r"'model\.layers\.\d\.\w+\.\w+_proj' differs by \d\.\de\+00 of its norm"),
        ({"intermediate_size": 64}, r"'model\.layers\.0\.mlp\.down_proj' is 32×64 here and was 32×48 in training"),
        ({"hidden_size": 64}, r"'model\.layers\.0\.mlp\.down_proj' is 64×48 here and was 32×48 in training"),
        ({"num_hidden_layers": 1}, r"'model\.layers\.1\.mlp\.down_proj' is not a linear layer of this model"),
    ],
    ids=["other weights", "other width of one layer", "other size", "fewer layers"],
)
def test_another_base_is_refused_in_one_line_before_anything_changes(
    tiny_llama: Build, saved: Path, entry: Callable, overrides: dict, reason: str
) -> None:
    base = tiny_llama(**overrides)
    expected = base(IDS).logits
    with pytest.raises(ValueError, match=rf"another base model: {reason}.*; load it onto 'someone/base'$") as caught:
        entry(base, saved)
    assert "\n" not in str(caught.value)
    if entry is not load_second_adapter:
        assert count(base) == 0
    assert torch.equal(base(IDS).logits, expected)


def test_a_rounded_base_gives_one_warning_with_the_largest_difference(tiny_llama: Build, saved: Path) -> None:
    base = tiny_llama().bfloat16()
    with pytest.warns(UserWarning, match="this adapter meets slightly different weights.*'someone/base'") as caught:
        PeftModel.from_pretrained(base, saved)
    messages = [str(w.message) for w in caught if str(w.message).startswith("this adapter")]
    assert len(messages) == 1
    assert 1e-4 < float(messages[0].split("difference is ")[1].split(",")[0]) < 1e-2


def test_one_changed_weight_is_found_and_named(tiny_llama: Build, saved: Path) -> None:
    base = tiny_llama()
    weight = base.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight.add_(torch.randn_like(weight) * weight.norm() / weight.numel() ** 0.5 * 0.2)
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.up_proj' differs"):
        PeftModel.from_pretrained(base, saved)


def test_a_second_adapter_may_come_while_another_one_is_merged(tiny_llama: Build, saved: Path) -> None:
    expected = PeftModel.from_pretrained(tiny_llama(), saved)(IDS).logits
    model = PeftModel.from_pretrained(tiny_llama(), saved, "first")
    model.merge_adapter()
    model.load_adapter(saved, "second")  # PEFT unmerges here
    model.set_adapter("second")
    assert torch.equal(model(IDS).logits, expected)


def test_a_damaged_fingerprint_is_refused(tiny_llama: Build, saved: Path) -> None:
    def set_nan(config: dict) -> None:
        config["base_fingerprint"]["model.layers.0.self_attn.q_proj"][3] = float("nan")

    damage(saved, set_nan)
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.q_proj' has a damaged fingerprint"):
        PeftModel.from_pretrained(tiny_llama(), saved)


def test_a_config_without_fingerprint_gets_one(tiny_llama: Build, saved: Path) -> None:
    damage(saved, lambda config: config.pop("base_fingerprint"))
    model = PeftModel.from_pretrained(tiny_llama(), saved)
    assert len(model.peft_config["default"].base_fingerprint) == 14


def test_the_same_file_loads_onto_a_base_that_carries_another_method(tiny_llama: Build, saved: Path) -> None:
    base = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny_llama(), "lora")
    inject_adapter_in_model(PeftConfig.from_pretrained(saved), base, "svf")
    assert count(base) == 14


def test_conv1d_weights_are_compared_in_the_same_layout(tmp_path: Path) -> None:
    def build() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()

    model = get_peft_model(build(), SVFConfig(init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    fingerprint = model.peft_config["default"].base_fingerprint
    assert fingerprint["transformer.h.0.attn.c_attn"][:2] == [48.0, 16.0]  # (out, in), stored as (16, 48)
    loaded = PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
