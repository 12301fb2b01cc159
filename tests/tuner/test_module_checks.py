"""Modules that SVF cannot adapt are refused by name, all at once, before anything is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from peft_svf import SVFConfig
from peft_svf.tuner import SVFLayer


Build = Callable[..., LlamaForCausalLM]


class GroupedLinear(nn.Linear):
    """Two independent halves, as in grouped output projections."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat(
            [first @ self.weight[: len(self.weight) // 2].T, second @ self.weight[len(self.weight) // 2 :].T]
        )


class ClippedLinear(nn.Module):
    """A wrapper whose weight sits in a child, as Gemma's clippable linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.clamp(-1, 1))


class Block(nn.Module):
    """One good linear layer and one trap."""

    def __init__(self, trap: nn.Module) -> None:
        super().__init__()
        self.good = nn.Linear(4, 4)
        self.trap = trap


def tied() -> nn.Module:
    pair = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    pair["head"].weight = pair["embedding"].weight
    return pair


@pytest.mark.parametrize(
    ("trap", "target", "message"),
    [
        (nn.Conv2d(1, 1, 3), "trap", "'trap' of type Conv2d: only linear layers"),
        (GroupedLinear(4, 2), "trap", "'trap' of type GroupedLinear: it has a forward of its own"),
        (ClippedLinear(), "trap", "'trap' of type ClippedLinear: only linear layers"),
        (nn.MultiheadAttention(4, 2), "out_proj", r"'trap\.out_proj' because MultiheadAttention reads its weight"),
        (nn.TransformerEncoderLayer(4, 2, 8), "linear1", r"'trap\.linear1' because TransformerEncoderLayer reads its"),
        (tied(), "head", r"'trap\.head' because its weight is tied to 'trap\.embedding'"),
    ],
    ids=["no linear layer", "other forward", "weight in a child", "attention", "encoder layer", "tied"],
)
def test_traps_are_refused_by_name_with_the_remedy(trap: nn.Module, target: str, message: str) -> None:
    model = Block(copy.deepcopy(trap))
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=rf"SVF cannot adapt {message}.*Leave them out: `exclude_modules=\['trap"):
        inject_adapter_in_model(SVFConfig(target_modules=["good", target]), model)
    assert [name for name, _ in model.named_modules()] == names
    adapted = inject_adapter_in_model(SVFConfig(target_modules=["good", target], exclude_modules=[target]), model)
    assert [name for name, module in adapted.named_modules() if isinstance(module, SVFLayer)] == ["good"]


def test_all_traps_are_named_in_one_error_that_can_be_copied() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": GroupedLinear(4, 2), "c": nn.Conv2d(1, 1, 1)})
    with pytest.raises(
        ValueError, match=r"'b' of type GroupedLinear.*'c' of type Conv2d.*`exclude_modules=\['b', 'c'\]`"
    ):
        inject_adapter_in_model(SVFConfig(target_modules=["a", "b", "c"]), model)


def test_the_weight_inside_a_wrapper_can_be_adapted() -> None:
    model = inject_adapter_in_model(SVFConfig(target_modules=["linear"]), Block(ClippedLinear()))
    assert isinstance(model.trap.linear, SVFLayer)


@pytest.fixture
def mamba() -> PreTrainedModel:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=1))


def test_the_output_projection_of_mamba_is_refused_and_the_rest_works(mamba: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"mixer\.out_proj' because the fused kernels of Mamba.*exclude_modules"):
        get_peft_model(mamba, SVFConfig())
    model = get_peft_model(mamba, SVFConfig(exclude_modules=["out_proj"]))
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda weight: weight.zero_(), "the weight is zero"),
        (lambda weight: weight[0].fill_(float("nan")), "the weight holds NaN or infinite values"),
        (lambda weight: weight[0].fill_(float("inf")), "the weight holds NaN or infinite values"),
    ],
    ids=["zero", "NaN", "infinite"],
)
def test_damaged_weights_are_refused_by_name(tiny_llama: Build, damage: Callable, message: str) -> None:
    base = tiny_llama()
    damage(base.model.layers[1].mlp.up_proj.weight.data)
    with pytest.raises(ValueError, match=rf"SVF cannot adapt 'model\.layers\.1\.mlp\.up_proj': {message}"):
        get_peft_model(base, SVFConfig())
    assert not any(isinstance(module, SVFLayer) for module in base.modules())


def test_weights_on_the_meta_device_are_refused_by_name(tiny_llama: Build) -> None:
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.q_proj': the weight is on the meta device"):
        get_peft_model(tiny_llama().to("meta"), SVFConfig())


def test_tied_output_embeddings_are_left_out_by_default(tiny_llama: Build) -> None:
    model = get_peft_model(tiny_llama(tie_word_embeddings=True), SVFConfig())
    assert not isinstance(model.base_model.model.lm_head, SVFLayer)
    with pytest.raises(ValueError, match=r"'lm_head' because its weight is tied to 'model\.embed_tokens'"):
        get_peft_model(tiny_llama(tie_word_embeddings=True), SVFConfig(target_modules=["q_proj", "lm_head"]))
