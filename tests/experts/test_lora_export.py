"""Experts as LoRA: the reported error is the measured one, nothing of the same rank is closer, plain PEFT loads it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import conversion as peft_conversion
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from peft_svf import SVFConfig
from peft_svf.experts import LoraError, convert_to_lora, save_as_lora
from peft_svf.tuner import SVFLayer


IDS = torch.tensor([[5, 17, 42, 3, 60], [9, 8, 7, 6, 5]])
PREFIX = "base_model.model."
RANKS = [1, 6, 0.9, 1.0]
Build = Callable[..., LlamaForCausalLM]


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


def expert(base: nn.Module, **kwargs: object) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(base, SVFConfig(init_weights=False, **kwargs)).eval()


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def layers_of(model: nn.Module, kind: type[nn.Module]) -> dict[str, nn.Module]:
    return {name.removeprefix(PREFIX): m for name, m in model.named_modules() if isinstance(m, kind)}


def true_change(layer: SVFLayer, adapter: str = "default") -> torch.Tensor:
    """ΔW = U diag(σ · offset) Vᵀ in float64, from a decomposition of the base weight; shape (out, in)."""
    base = layer.get_base_layer()
    weight = (base.weight.T if isinstance(base, Conv1D) else base.weight).detach().double()
    left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
    trained = layer.svf_offset[adapter].weight.detach().double()
    k = len(trained)
    if type(layer.svf_offset[adapter]).__name__ == "SVFLogit":
        z = torch.sigmoid(trained) * sigma[:k].sum() / (sigma[:k] * torch.sigmoid(trained)).sum()
    else:
        z = 1 + trained
    return (left[:, :k] * (sigma[:k] * (z - 1))) @ right[:k]


def lora_change(layer: LoraLayer) -> torch.Tensor:
    """B A as the loaded LoRA layer applies it, shape (out, in)."""
    change = layer.get_delta_weight("default").detach().double()
    return change.T if isinstance(layer.get_base_layer(), Conv1D) else change


def measure(lora: PeftModel, svf: PeftModel) -> LoraError:
    loaded, trained = layers_of(lora, LoraLayer), layers_of(svf, SVFLayer)
    assert loaded.keys() == trained.keys()
    assert all(layer.scaling == {"default": 1.0} for layer in loaded.values())
    changes = {name: true_change(layer) for name, layer in trained.items()}
    missed = {name: float((changes[name] - lora_change(layer)).norm()) for name, layer in loaded.items()}
    norms = {name: float(change.norm()) for name, change in changes.items()}
    total = torch.tensor(list(missed.values())).norm() / torch.tensor(list(norms.values())).norm()
    return LoraError(float(total), {name: missed[name] / norms[name] for name in missed})


@pytest.fixture
def bases(tiny_llama: Build) -> dict[str, Callable[[], nn.Module]]:
    return {"llama": tiny_llama, "gpt2": gpt2}


# The offset that follows from a logit is itself rounded to float32, near 1e-7 of a z that is larger than it.
@pytest.mark.parametrize("rank", RANKS, ids=str)
@pytest.mark.parametrize(
    ("base", "config", "tolerance"),
    [
        ("llama", {}, 1e-6),
        ("gpt2", {}, 1e-6),
        ("llama", {"rank": 8}, 1e-6),
        ("llama", {"rank_pattern": {"q_proj": 3, "down_proj": 7}, "rank": 30}, 1e-6),
        ("llama", {"parametrization": "sigmoid"}, 5e-6),
        ("gpt2", {"parametrization": "sigmoid", "rank": 9}, 5e-6),
    ],
    ids=lambda value: str(value).replace("'", "") if isinstance(value, (dict, str)) else "",
)
def test_the_reported_error_is_the_measured_one(
    bases: dict[str, Callable[[], nn.Module]],
    base: str,
    config: dict[str, object],
    tolerance: float,
    rank: float,
    tmp_path: Path,
) -> None:
    model = expert(bases[base](), **config)
    sides = {layer.svf_side for layer in layers_of(model, SVFLayer).values()}
    assert sides == {"input", "output"}
    reported = save_as_lora(tmp_path / "lora", model, rank)
    measured = measure(PeftModel.from_pretrained(bases[base](), tmp_path / "lora"), model)
    assert reported.total == pytest.approx(measured.total, abs=tolerance)
    assert reported.modules == pytest.approx(measured.modules, abs=tolerance)
    everything = isinstance(rank, float) and rank == 1
    assert (reported.total == 0) if everything else (0.05 < reported.total < 1)


@pytest.mark.parametrize("rank", [1, 6, 0.9, 32], ids=str)
def test_on_bfloat16_the_error_is_measured_up_to_the_rounding_of_the_basis(
    tiny_llama: Build, rank: float, tmp_path: Path
) -> None:
    model = expert(tiny_llama().bfloat16())
    reported = save_as_lora(tmp_path / "lora", model, rank)
    measured = measure(PeftModel.from_pretrained(tiny_llama().bfloat16(), tmp_path / "lora"), model)
    assert {tensor.dtype for tensor in load_file(tmp_path / "lora" / "adapter_model.safetensors").values()} == {
        torch.float32
    }
    rounding = 4e-3  # what full rank misses: one bfloat16 rounding of every entry of Q
    for name, error in reported.modules.items():
        assert (
            error <= measured.modules[name] + 1e-4 and measured.modules[name] <= (error**2 + rounding**2) ** 0.5 + 1e-4
        )


def test_on_float64_nothing_is_lost_at_full_rank(tiny_llama: Build, tmp_path: Path) -> None:
    model = expert(tiny_llama().double())
    assert save_as_lora(tmp_path / "lora", model, 1.0).total == 0
    lora = PeftModel.from_pretrained(tiny_llama().double(), tmp_path / "lora")
    assert (logits(lora) - logits(model)).abs().max() < 1e-10


@pytest.mark.parametrize("rank", [1, 6, 16], ids=str)
def test_no_lora_of_the_same_rank_is_closer(tiny_llama: Build, rank: int) -> None:
    model = expert(tiny_llama())
    error = convert_to_lora(model, rank)[2]
    for name, layer in layers_of(model, SVFLayer).items():
        energy = torch.linalg.svdvals(true_change(layer)).square()
        assert error.modules[name] == pytest.approx(float((energy[rank:].sum() / energy.sum()).sqrt()), abs=1e-7)


@pytest.mark.parametrize("rank", [6, 0.9], ids=str)
def test_equals_the_conversion_of_peft(tiny_llama: Build, rank: float) -> None:
    model = expert(tiny_llama())
    ours, theirs = convert_to_lora(model, rank)[1], peft_conversion.convert_to_lora(model, rank)[1]
    assert ours.keys() == theirs.keys()
    for name in layers_of(model, SVFLayer):
        key = f"{PREFIX}{name}"
        changes = [each[f"{key}.lora_B.weight"] @ each[f"{key}.lora_A.weight"] for each in (ours, theirs)]
        assert torch.allclose(*changes, atol=1e-5)


@pytest.mark.parametrize("base", ["llama", "gpt2"])
@pytest.mark.parametrize("rank", [16, 1.0, 0.999], ids=str)
def test_the_conversion_of_peft_works_too(
    bases: dict[str, Callable[[], nn.Module]], base: str, rank: float, tmp_path: Path
) -> None:
    model = expert(bases[base](), rank=16)  # rank 16 is all there is
    peft_conversion.save_as_lora(tmp_path, model, rank)
    lora = PeftModel.from_pretrained(bases[base](), tmp_path)
    assert isinstance(lora.peft_config["default"], LoraConfig)
    expected = logits(model)
    assert (expected - logits(bases[base]())).abs().max() > 0.1
    assert (logits(lora) - expected).abs().max() < (0.1 if rank == 0.999 else 1e-4)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_a_share_is_kept_by_the_smallest_rank_of_every_matrix(tiny_llama: Build, share: float) -> None:
    model = expert(tiny_llama())
    _, tensors, error = convert_to_lora(model, share)
    ranks = {name: len(tensors[f"{PREFIX}{name}.lora_A.weight"]) for name in error.modules}
    assert len(set(ranks.values())) > 2
    for name, layer in layers_of(model, SVFLayer).items():
        kept = torch.linalg.svdvals(true_change(layer)).square().cumsum(0)
        assert kept[ranks[name] - 1] >= share * kept[-1] * (1 - 1e-6)
        assert ranks[name] == 1 or kept[ranks[name] - 2] < share * kept[-1]


def test_both_factors_carry_the_root_of_every_component(tiny_llama: Build) -> None:
    _, tensors, error = convert_to_lora(expert(tiny_llama()), 6)
    for name in error.modules:
        rows, columns = (tensors[f"{PREFIX}{name}.lora_{factor}.weight"] for factor in "AB")
        assert torch.allclose(rows.norm(dim=1), columns.norm(dim=0), rtol=1e-4)


def test_a_matrix_with_fewer_components_gets_all_of_them(tiny_llama: Build, tmp_path: Path) -> None:
    model = expert(tiny_llama())  # keys and values are 16 by 32
    error = save_as_lora(tmp_path / "lora", model, 20)
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 20
    assert config["rank_pattern"] == config["alpha_pattern"] and set(config["rank_pattern"].values()) == {16}
    small = {name for name in error.modules if name.endswith(("k_proj", "v_proj"))}
    assert {name for name, value in error.modules.items() if value == 0} == small and len(small) == 4


def test_readers_without_patterns_see_the_largest_rank_and_scale_by_one(tiny_llama: Build) -> None:
    config, tensors, _ = convert_to_lora(expert(tiny_llama()), 0.9)
    largest = max(len(tensor) for key, tensor in tensors.items() if "lora_A" in key)
    assert config.r == config.lora_alpha == largest and largest > min(config.rank_pattern.values())


def test_short_names_where_they_mean_the_adapted_modules_only(tiny_llama: Build, tmp_path: Path) -> None:
    assert convert_to_lora(expert(tiny_llama()), 4)[0].target_modules == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    model = expert(tiny_llama(), layers_to_transform=[1])
    save_as_lora(tmp_path / "lora", model, 1.0)
    lora = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    assert len(layers_of(lora, LoraLayer)) == 7
    assert torch.allclose(logits(lora), logits(model), atol=1e-4)


class Nested(nn.Module):
    """A module whose name is the ending of another's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(12, 12)
        self.sub = nn.ModuleDict({"lin": nn.Linear(12, 9)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.sub["lin"](torch.tanh(self.lin(x)))


@pytest.mark.parametrize("targets", [["lin"], ["sub.lin"]])
def test_a_name_that_is_the_ending_of_another(targets: list[str], tmp_path: Path) -> None:
    model = expert(Nested(), target_modules=targets)
    layers = layers_of(model, SVFLayer)
    with torch.no_grad():
        for i, layer in enumerate(layers.values()):
            layer.svf_offset["default"].weight.zero_()[: 2 + 3 * i] = 0.7  # ranks 2 and 5
    save_as_lora(tmp_path / "lora", model, 1.0)
    lora = PeftModel.from_pretrained(Nested(), tmp_path / "lora")
    assert [len(layer.lora_A["default"].weight) for layer in layers_of(lora, LoraLayer).values()] == [2, 5][
        : len(layers)
    ]
    assert measure(lora, model).total < 1e-6
    x = torch.randn(3, 12)
    assert torch.allclose(lora(x), model(x), atol=1e-5)


def test_the_strength_of_the_expert_is_converted(tiny_llama: Build, tmp_path: Path) -> None:
    model = expert(tiny_llama())
    model.base_model.set_strength("default", 0.5)
    save_as_lora(tmp_path / "lora", model, 1.0)
    lora = logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora"))
    assert torch.allclose(lora, logits(model), atol=1e-4)
    model.base_model.set_strength("default", 1.0)
    assert not torch.allclose(lora, logits(model), atol=1e-2)


def merged(model: PeftModel) -> nn.Module:
    model.merge_adapter()
    return model


def compiled(model: PeftModel) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_inside(model: PeftModel) -> nn.Module:
    model.base_model.model = torch.compile(model.base_model.model, backend="eager")
    return model


def with_another(model: PeftModel) -> nn.Module:
    model.add_adapter("code", SVFConfig(init_weights=False))
    return model


@pytest.mark.parametrize("change", [merged, compiled, compiled_inside, with_another], ids=lambda f: f.__name__)
def test_the_state_of_the_model_does_not_matter(
    tiny_llama: Build, change: Callable[[PeftModel], nn.Module], tmp_path: Path
) -> None:
    model = expert(tiny_llama(), target_modules=["q_proj", "down_proj"])
    expected, tensors = logits(model), convert_to_lora(model, 6)[1]
    model = change(model)
    for key, tensor in convert_to_lora(model, 6)[1].items():
        assert torch.equal(tensor, tensors[key])
    save_as_lora(tmp_path / "lora", model, 1.0)
    assert torch.allclose(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")), expected, atol=1e-4)


def test_adapters_injected_by_transformers(tiny_llama: Build, tmp_path: Path) -> None:
    model = tiny_llama()
    model.add_adapter(SVFConfig(init_weights=False), "default")
    assert save_as_lora(tmp_path / "lora", model, 1.0).total == 0
    lora = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    assert len(layers_of(lora, LoraLayer)) == 14
    assert torch.allclose(logits(lora), logits(model), atol=1e-4)


def classifier() -> LlamaForSequenceClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=97, **sizes, initializer_range=0.2, pad_token_id=0, num_labels=3)
    return LlamaForSequenceClassification(config).eval()


def test_modules_to_save_are_those_of_the_expert(tmp_path: Path) -> None:
    model = expert(classifier(), task_type="SEQ_CLS")
    model.add_adapter("code", SVFConfig(task_type="SEQ_CLS", init_weights=False))
    with torch.no_grad():
        for head in model.base_model.model.score.modules_to_save.values():
            head.weight.normal_()
    for name in ("default", "code"):
        model.set_adapter(name)
        save_as_lora(tmp_path / name, model, 1.0, name)
        lora = PeftModel.from_pretrained(classifier(), tmp_path / name)
        assert torch.allclose(logits(lora), logits(model), atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_trained_tokens_go_along(tiny_llama: Build, tied: bool, tmp_path: Path) -> None:
    model = expert(tiny_llama(tie_word_embeddings=tied), trainable_token_indices=[5, 17])
    before = logits(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name:
                parameter.normal_()
    assert (logits(model) - before).abs().max() > 0.1
    save_as_lora(tmp_path / "lora", model, 1.0)
    lora = PeftModel.from_pretrained(tiny_llama(tie_word_embeddings=tied), tmp_path / "lora")
    assert torch.allclose(logits(lora), logits(model), atol=1e-4)


def test_resized_embeddings_go_along(tiny_llama: Build, tmp_path: Path) -> None:
    def resized() -> LlamaForCausalLM:
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        base.resize_token_embeddings(101)
        return base.eval()

    tiny_llama().save_pretrained(tmp_path / "base")
    model = expert(resized())
    with torch.no_grad():
        model.get_input_embeddings().weight[97:].normal_()
    save_as_lora(tmp_path / "lora", model, 1.0)
    lora, ids = PeftModel.from_pretrained(resized(), tmp_path / "lora"), torch.tensor([[5, 99, 98]])
    assert torch.allclose(logits(lora, ids), logits(model, ids), atol=1e-4)


def test_an_untrained_expert_is_a_lora_that_does_nothing(tiny_llama: Build, tmp_path: Path) -> None:
    error = save_as_lora(tmp_path / "lora", get_peft_model(tiny_llama(), SVFConfig()), 4)
    assert error.total == 0 and set(error.modules.values()) == {0}
    lora = PeftModel.from_pretrained(tiny_llama(), tmp_path / "lora")
    assert torch.equal(logits(lora), logits(tiny_llama()))


@pytest.mark.parametrize("rank", [4, 0.8], ids=str)
def test_the_error_where_the_basis_is_that_of_other_weights(tiny_llama: Build, rank: float, tmp_path: Path) -> None:
    """An expert that brings its basis, on a base rounded to few bits: Q is not the singular basis of these weights."""
    source = expert(tiny_llama(), save_basis=True)
    source.save_pretrained(tmp_path / "expert")
    base = tiny_llama()
    with torch.no_grad():
        for module in layers_of(base, nn.Linear).values():
            step = module.weight.abs().max() / 4
            module.weight.copy_((module.weight / step).round() * step)
    model = PeftModel.from_pretrained(base, tmp_path / "expert")
    _, tensors, error = convert_to_lora(model, rank)
    by_sigma = convert_to_lora(source, rank)[2]
    for name, layer in layers_of(model, SVFLayer).items():
        change = layer.get_delta_weight("default")
        approximation = tensors[f"{PREFIX}{name}.lora_B.weight"] @ tensors[f"{PREFIX}{name}.lora_A.weight"]
        assert error.modules[name] == pytest.approx(float((change - approximation).norm() / change.norm()), abs=1e-6)
    assert abs(error.total - by_sigma.total) > 1e-3


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (0, "between 1 and 32"),
        (-2, "between 1 and 32"),
        (33, "between 1 and 32"),
        (True, "whole number"),
        ("8", "whole number"),
        (0.0, "share"),
        (1.5, "share"),
        (float("nan"), "share"),
    ],
)
def test_ranks_that_cannot_be(tiny_llama: Build, rank: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        convert_to_lora(expert(tiny_llama()), rank)


def test_an_adapter_that_is_not_there(tiny_llama: Build) -> None:
    with pytest.raises(ValueError, match="no SVF adapter named 'code'; loaded are default"):
        convert_to_lora(expert(tiny_llama()), 4, "code")
    with pytest.raises(ValueError, match="no SVF adapter named 'default'; loaded are none"):
        convert_to_lora(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])), 4)
    with pytest.raises(ValueError, match="loaded are none"):
        convert_to_lora(tiny_llama(), 4)


def test_broken_offsets_are_named(tiny_llama: Build) -> None:
    model = expert(tiny_llama())
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.up_proj.svf_offset["default"].weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj' hold NaN"):
        convert_to_lora(model, 4)


def test_a_weight_that_cannot_be_read_is_named(tiny_llama: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = expert(tiny_llama(), target_modules=["q_proj"])

    def opaque(self: SVFLayer) -> torch.Tensor:
        raise TypeError("format 'gptq' cannot be dequantized")  # as PEFT's forward-only backends do

    monkeypatch.setattr(SVFLayer, "unmerged_weight", opaque)
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj' cannot be converted.*gptq"):
        convert_to_lora(model, 4)


def test_a_basis_that_was_not_loaded_is_named(tiny_llama: Build, tmp_path: Path) -> None:
    expert(tiny_llama(), save_basis=True).save_pretrained(tmp_path)
    empty = get_peft_model(tiny_llama(), SVFConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.q_proj' cannot be converted"):
        convert_to_lora(empty, 4)


def test_fused_experts_are_refused_by_name() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = MixtralForCausalLM(MixtralConfig(vocab_size=97, **sizes, num_key_value_heads=2, num_local_experts=2))
    model = expert(base, target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(ValueError, match=r"down_proj\) cannot be converted to LoRA; merge"):
        convert_to_lora(model, 4)


def test_the_folder_of_the_expert_itself_is_not_overwritten(tiny_llama: Build, tmp_path: Path) -> None:
    model = expert(tiny_llama())
    model.save_pretrained(tmp_path / "expert")
    before = {path.name: path.read_bytes() for path in (tmp_path / "expert").iterdir()}
    with pytest.raises(FileExistsError, match="not only a LoRA; choose a new folder"):
        save_as_lora(tmp_path / "expert", model, 4)
    assert {path.name: path.read_bytes() for path in (tmp_path / "expert").iterdir()} == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    with pytest.raises(FileExistsError, match=r"diary\.txt"):
        save_as_lora(tmp_path / "notes", model, 4)


def test_an_earlier_lora_is_replaced_as_a_whole(
    tiny_llama: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = expert(tiny_llama()), tmp_path / "lora"
    save_as_lora(folder, model, 4)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert before.keys() == {"adapter_config.json", "adapter_model.safetensors"}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LoraConfig, "save_pretrained", full)
        with pytest.raises(OSError, match="no space left"):
            save_as_lora(folder, model, 8)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_as_lora(folder, model, 8)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.iterdir())


PLAIN_PEFT = """
import sys
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

base_path, prompt, *lora_paths = sys.argv[1:]
ids = AutoTokenizer.from_pretrained(base_path)(prompt, return_tensors="pt").input_ids
for path in lora_paths:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_path), path)
    results = {}
    with torch.no_grad():
        results["logits"] = model(ids).logits
        results["auto"] = AutoPeftModelForCausalLM.from_pretrained(path)(ids).logits
        for name, module in model.named_modules():
            if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
                results[name] = module.get_delta_weight("default").contiguous()
    save_file(results, path + ".result")
assert "peft_svf" not in sys.modules
"""


def test_a_real_expert_in_a_process_without_peft_svf(stories_path: str, tmp_path: Path) -> None:
    prompt = "Once upon a time, Lily and Tom"
    model = expert(AutoModelForCausalLM.from_pretrained(stories_path), task_type="CAUSAL_LM")
    reported = {str(tmp_path / str(rank)): save_as_lora(tmp_path / str(rank), model, rank) for rank in (8, 0.97, 1.0)}
    for path in reported:
        config = json.loads((Path(path) / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["task_type"]) == (stories_path, "CAUSAL_LM")

    command = [sys.executable, "-c", PLAIN_PEFT, stories_path, prompt, *reported]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stderr[-3000:]

    ids = AutoTokenizer.from_pretrained(stories_path)(prompt, return_tensors="pt").input_ids
    expected = logits(model, ids)
    with model.disable_adapter():
        base_distance = (logits(model, ids) - expected).norm()
    changes = {name: true_change(layer) for name, layer in layers_of(model, SVFLayer).items()}
    totals, distances = [], []
    for path, error in reported.items():
        found = load_file(f"{path}.result")
        assert torch.equal(found["auto"], found["logits"])
        distances.append(float((found["logits"] - expected).norm() / base_distance))
        missed = {name: (change - found[PREFIX + name].double()).norm() for name, change in changes.items()}
        measured = {name: float(missed[name] / change.norm()) for name, change in changes.items()}
        assert error.modules == pytest.approx(measured, abs=1e-6)
        totals.append(error.total)
        whole = torch.stack([change.norm() for change in changes.values()]).norm()
        assert error.total == pytest.approx(float(torch.stack(list(missed.values())).norm() / whole), abs=1e-6)
    assert totals[0] > totals[1] > totals[2] == 0
    assert distances[0] > distances[1] > distances[2] and distances[2] < 1e-4
