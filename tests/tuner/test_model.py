"""SVF through PEFT's own life cycle: create, train, switch, disable, merge, unload, delete."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model, inject_adapter_in_model
from peft.tuners.lora.conversion import convert_to_lora
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedModel,
)

from peft_svf import SVFConfig, SVFModel
from peft_svf.tuner import SVFLayer


IDS = torch.tensor([[5, 17, 42, 3, 60], [9, 8, 7, 6, 5]])
Build = Callable[..., LlamaForCausalLM]


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def with_adapters(base: nn.Module, *names: str) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(base, SVFConfig(init_weights=False), names[0])
    for name in names[1:]:
        model.add_adapter(name, SVFConfig(init_weights=False))
    return model.eval()


def adapted(model: nn.Module) -> dict[str, SVFLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, SVFLayer)}


def test_default_config_adapts_every_linear_layer_but_the_head(tiny_llama: Build) -> None:
    base = tiny_llama()
    ranks = sum(min(m.weight.shape) for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head")
    model = get_peft_model(base, SVFConfig())
    assert isinstance(model.base_model, SVFModel)
    assert len(adapted(model)) == 14
    assert not isinstance(model.base_model.model.lm_head, SVFLayer)
    assert model.get_nb_trainable_parameters()[0] == ranks


@pytest.mark.parametrize(
    ("build", "task_type"),
    [
        (BertForSequenceClassification, "SEQ_CLS"),
        (BertForTokenClassification, "TOKEN_CLS"),
        (BertForQuestionAnswering, "QUESTION_ANS"),
    ],
)
def test_heads_that_peft_trains_in_full_are_not_adapted(build: type[PreTrainedModel], task_type: str) -> None:
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = get_peft_model(build(config), SVFConfig(task_type=task_type))
    assert any("modules_to_save" in name and p.requires_grad for name, p in model.named_parameters())
    assert all("encoder" in name or "pooler" in name for name in adapted(model))


@pytest.mark.parametrize("target_modules", [None, "all-linear"])
def test_no_target_modules_means_all_linear(tiny_llama: Build, target_modules: str | None) -> None:
    assert len(adapted(get_peft_model(tiny_llama(), SVFConfig(target_modules=target_modules)))) == 14


def test_a_new_adapter_is_the_base_model_bit_for_bit(stories_path: str) -> None:
    base = LlamaForCausalLM.from_pretrained(stories_path)
    before = logits(base)
    assert torch.equal(logits(get_peft_model(base, SVFConfig())), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("asked", [True, False])
def test_offsets_are_float32_on_half_precision_bases_unless_asked_otherwise(
    tiny_llama: Build, dtype: torch.dtype, asked: bool
) -> None:
    base = tiny_llama().to(dtype)
    before = logits(base)
    model = get_peft_model(base, SVFConfig(), autocast_adapter_dtype=asked)
    model.add_adapter("second", SVFConfig(), autocast_adapter_dtype=asked)
    expected = torch.float32 if asked else dtype
    assert {p.dtype for n, p in model.named_parameters() if "svf_" in n} == {expected}
    after = logits(model)
    assert after.dtype == dtype and torch.equal(after, before)


def test_offsets_are_float32_where_transformers_adds_them(tiny_llama: Build) -> None:
    model = tiny_llama().bfloat16()
    model.add_adapter(SVFConfig())
    assert {p.dtype for n, p in model.named_parameters() if "svf_" in n} == {torch.float32}


def test_training_changes_only_the_offsets(tiny_llama: Build) -> None:
    base = tiny_llama()
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    model = get_peft_model(base, SVFConfig())
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.05)
    losses = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    assert all(n.endswith("svf_offset.default.weight") for n, p in model.named_parameters() if p.requires_grad)
    assert all(p.grad is not None for p in trainable)
    after = dict(model.unload().named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_gradient_checkpointing_gives_the_same_gradients(tiny_llama: Build) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = with_adapters(tiny_llama(), "default").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append(torch.cat([p.grad for p in model.parameters() if p.requires_grad]))
    assert torch.equal(*gradients) and gradients[0].norm() > 0


def test_adapters_switch_disable_and_come_back(tiny_llama: Build) -> None:
    base = tiny_llama()
    before = logits(base)
    model = with_adapters(base, "a", "b")
    a = logits(model)
    model.set_adapter("b")
    b = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert not torch.allclose(a, b) and not torch.allclose(a, before)
    assert torch.equal(logits(model), b)
    model.set_adapter("a")
    assert torch.equal(logits(model), a)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"a"}


def test_adapters_share_the_basis_of_every_layer(tiny_llama: Build) -> None:
    model = with_adapters(tiny_llama(), "a")
    pointers = {name: layer.svf_basis.data_ptr() for name, layer in adapted(model).items()}
    model.add_adapter("b", SVFConfig())
    layers = adapted(model)
    assert {name: layer.svf_basis.data_ptr() for name, layer in layers.items()} == pointers
    assert all(sorted(layer.svf_offset) == ["a", "b"] for layer in layers.values())
    assert not [key for key in model.state_dict() if "basis" in key]


def test_deleted_adapter_is_gone_and_the_other_one_works(tiny_llama: Build) -> None:
    model = with_adapters(tiny_llama(), "a", "b")
    model.set_adapter("b")
    b = logits(model)
    model.delete_adapter("a")
    assert list(model.peft_config) == ["b"] and not [n for n, _ in model.named_parameters() if ".a." in n]
    assert torch.equal(logits(model), b)


def test_merge_and_unload_is_a_plain_model_with_close_logits(tiny_llama: Build) -> None:
    model = with_adapters(tiny_llama(), "default")
    before = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is LlamaForCausalLM and not adapted(merged) and not hasattr(merged, "peft_config")
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)


def test_unload_returns_the_base_model_bit_for_bit(tiny_llama: Build) -> None:
    base = tiny_llama()
    before = logits(base)
    unloaded = with_adapters(base, "default").unload()
    assert not adapted(unloaded) and torch.equal(logits(unloaded), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merge_and_unmerge_of_a_model_is_bit_exact(tiny_llama: Build, dtype: torch.dtype) -> None:
    model = with_adapters(tiny_llama().to(dtype), "a")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    output = logits(model)
    model.merge_adapter()
    assert any(not torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(model), output)


def test_conv1d_model_keeps_and_merges(tmp_path: object) -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    before = logits(base)
    model = with_adapters(base, "default")
    assert len(adapted(model)) == 8
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    adapted_logits = logits(model)
    assert not torch.allclose(adapted_logits, before, atol=1e-3)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), adapted_logits, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)  # safetensors wants contiguous weights
    assert torch.equal(logits(GPT2LMHeadModel.from_pretrained(tmp_path)), logits(merged))


def test_conversion_to_lora_at_full_rank_is_the_same_model(tiny_llama: Build) -> None:
    model = with_adapters(tiny_llama(), "default")
    expected = logits(model)
    config, state_dict = convert_to_lora(model, rank=16)  # the smallest r of the model; exact where r = 16
    lora = {k: v for k, v in state_dict.items() if "k_proj" in k}
    name, layer = next((n, m) for n, m in adapted(model).items() if "k_proj" in n)
    key = name.removeprefix("base_model.model.")
    a, b = (next(v for k, v in lora.items() if key in k and part in k) for part in ("lora_A", "lora_B"))
    torch.testing.assert_close(b @ a, layer.get_delta_weight("default"), rtol=1e-4, atol=1e-5)
    assert config.r == 16 and torch.equal(logits(model), expected)


def test_one_config_object_serves_two_models(tiny_llama: Build, tmp_path: Path) -> None:
    config = SVFConfig(init_weights=False)
    first = get_peft_model(tiny_llama(seed=0), config).eval()
    second = get_peft_model(tiny_llama(seed=1), config).eval()
    assert first.peft_config["default"] is second.peft_config["default"] is config
    first.save_pretrained(tmp_path)  # writes the fingerprint of its own base
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(seed=0), tmp_path)), logits(first))
    with pytest.raises(ValueError, match="another base model"):
        PeftModel.from_pretrained(tiny_llama(seed=1), tmp_path)


def test_the_tuner_keeps_no_parameter_alive_that_the_model_gives_up(tiny_llama: Build) -> None:
    model = get_peft_model(tiny_llama(), SVFConfig())
    layer = model.base_model.model.model.layers[0].mlp.up_proj.base_layer
    old = weakref.ref(layer.weight)
    layer.weight = nn.Parameter(layer.weight.detach().clone())  # as FSDP does it
    gc.collect()
    assert old() is None


def test_model_with_adapters_can_be_deep_copied(tiny_llama: Build) -> None:
    model = with_adapters(tiny_llama(), "a")
    clone = copy.deepcopy(model)
    expected = logits(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(clone), expected)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_config_survives_copying(clone: Callable[[SVFConfig], SVFConfig]) -> None:
    config = SVFConfig(target_modules=["q_proj"], base_fingerprint={"q_proj": [1.0, 2.0]})
    restored = clone(config)
    assert restored == config and restored.peft_type is PeftType.SVF


def test_transformers_native_adapters(tiny_llama: Build) -> None:
    model = tiny_llama()
    before = logits(model)
    model.add_adapter(SVFConfig(init_weights=False), "a")
    model.add_adapter(SVFConfig(init_weights=False), "b")
    assert model.peft_config["a"].base_fingerprint.keys() == adapted(model).keys()
    model.set_adapter("a")
    a = logits(model)
    model.disable_adapters()
    assert torch.equal(logits(model), before)
    model.enable_adapters()
    assert torch.equal(logits(model), a)
    model.delete_adapter("b")
    assert torch.equal(logits(model), a)


def test_modules_to_save_and_token_indices_train_next_to_the_offsets(tiny_llama: Build) -> None:
    config = SVFConfig(modules_to_save=["lm_head"], trainable_token_indices=[3, 4])
    model = get_peft_model(tiny_llama(), config)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert any("lm_head.modules_to_save" in n for n in trainable)
    assert any("trainable_tokens" in n for n in trainable)
    assert sum("svf_offset" in n for n in trainable) == 14


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"target_modules": ["q_proj", "up_proj"]}, 4),
        ({"target_modules": r".*layers\.1.*proj"}, 7),
        ({"exclude_modules": ["down_proj"]}, 12),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 1),
        ({"layers_to_transform": 1}, 7),
        ({"layers_to_transform": [0, 1], "layers_pattern": "layers"}, 14),
    ],
    ids=["list", "regular expression", "exclude", "layers", "layers of all-linear", "layers with a pattern"],
)
def test_modules_are_selected_as_in_every_peft_method(tiny_llama: Build, settings: dict, expected: int) -> None:
    assert len(adapted(get_peft_model(tiny_llama(), SVFConfig(**settings)))) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers_pattern": "layers"}, "needs `layers_to_transform`"),
        ({"rank": 0}, "`rank` must be a whole number of at least 1, got 0"),
        ({"rank": 2.5}, r"`rank` must be .* got 2\.5"),
        ({"rank": True}, "`rank` must be .* got True"),
        ({"rank_pattern": {"q_proj": -1}}, r"`rank_pattern\['q_proj'\]` must be .* got -1"),
        ({"parametrization": "exp"}, "`parametrization` must be 'offset' or 'sigmoid', got 'exp'"),
    ],
)
def test_bad_configs_are_refused_at_once(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SVFConfig(**settings)


@pytest.mark.parametrize("name", ["a.b", "keys", "training", "", "mlp", "model", "0"])
def test_adapter_names_that_cannot_be_used(tiny_llama: Build, name: str) -> None:
    base = tiny_llama()
    with pytest.raises(ValueError, match="cannot be named"):
        get_peft_model(base, SVFConfig(), name)
    assert not adapted(base)


def test_a_layer_that_is_not_linear_is_named(tiny_llama: Build) -> None:
    base = tiny_llama()
    with pytest.raises(ValueError, match=r"'model\.embed_tokens' of type Embedding"):
        get_peft_model(base, SVFConfig(target_modules=["q_proj", "embed_tokens"]))
    assert not adapted(base)


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"], "trainable_token_indices": [3]}], ids=str)
@pytest.mark.parametrize("existing", [False, True])
def test_a_failing_injection_leaves_the_model_as_it_was(tiny_llama: Build, existing: bool, settings: dict) -> None:
    base = tiny_llama()
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight.zero_()
    if existing:
        inject_adapter_in_model(SVFConfig(target_modules=["q_proj"], init_weights=False), base, "first")
    before, modules = logits(base), [name for name, _ in base.named_modules()]
    trainable = [name for name, parameter in base.named_parameters() if parameter.requires_grad]
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.down_proj': the weight is zero"):
        inject_adapter_in_model(SVFConfig(init_weights=False, **settings), base, "second")
    assert torch.equal(logits(base), before)
    assert [name for name, _ in base.named_modules()] == modules
    assert [name for name, parameter in base.named_parameters() if parameter.requires_grad] == trainable
    assert list(base.peft_config) == ["first"] if existing else not hasattr(base, "peft_config")
