"""Checkpoints of the paper's released code: W' is the code's formula in float64; nothing in a file is executed."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from peft_svf import SVFConfig
from peft_svf.experts import Expert, ExpertError, released_code
from peft_svf.experts.merged_export import merged_state_dict
from peft_svf.experts.released_code import import_released_expert, read_tensors


IDS = torch.tensor([[5, 17, 42, 3, 60], [9, 8, 7, 6, 5]])
Build = Callable[..., LlamaForCausalLM]
Vectors = dict[str, torch.Tensor]


class Policy(nn.Module):
    """What the code trains: a vector for every parameter with "mlp" in its name, in a list without names."""

    def __init__(self, base: nn.Module, seed: int = 0, std: float = 0.7) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.vectors = {}
        for key, value in base.state_dict().items():
            if "mlp" in key:
                numbers = 0.1 + std * torch.randn(min(value.shape), generator=generator)
                self.vectors[key] = nn.Parameter(numbers.to(torch.bfloat16))
        self.learnable_params_module_list = nn.ParameterList(self.vectors.values())


class Search(nn.Module):
    """What its few-shot search trains: coefficients, beside the vectors of the experts that it mixes."""

    def __init__(self, experts: list[Vectors], coefficients: torch.Tensor) -> None:
        super().__init__()
        self.adaptive_weights = nn.Parameter(coefficients)
        for key in experts[0]:
            for index, vectors in enumerate(experts):
                self.register_buffer(f"weights_{index}_k_{key.replace('.', '_')}", vectors[key].detach().clone())


def composed(base: nn.Module, masks: Vectors) -> Vectors:
    """W' of every weight, by the code's formula with its own decomposition, in float64."""
    found = {}
    for key, mask in masks.items():
        left, sigma, right = torch.svd(base.get_parameter(key).detach().double())
        scaled = sigma * mask.double()
        found[key] = left @ torch.diag_embed(scaled) @ right.T * (sigma.sum() / scaled.sum())
    return found


def check(expert: Expert, build: Callable[[], Any], masks: Vectors) -> None:
    """Every W' and the logits of the expert on a float64 base are those of the formula to 1e-6."""
    base = build()
    expected = composed(base, masks)
    assert expert.offsets.keys() == {key.removesuffix(".weight") for key in masks}
    model = expert.put_into(build(), "released").eval()
    found = merged_state_dict(model, "released")[0]
    with torch.no_grad():
        before = base(IDS).logits
        for key, weight in expected.items():
            assert float((found[key] - weight).norm() / weight.norm()) < 1e-6
            assert float((base.get_parameter(key) - weight).norm() / weight.norm()) > 0.05
            base.get_parameter(key).copy_(weight)
        assert (
            (model(IDS).logits - base(IDS).logits).abs().max() < 1e-5 < 0.1 < (before - base(IDS).logits).abs().max()
        )


@pytest.fixture
def build(tiny_llama: Build) -> Callable[[], LlamaForCausalLM]:
    return lambda: tiny_llama().double()


@pytest.fixture
def policy(build: Callable[[], LlamaForCausalLM]) -> Policy:
    return Policy(build())


def sigmoids(vectors: Vectors) -> Vectors:
    return {key: torch.sigmoid(vector.detach().double()) for key, vector in vectors.items()}


def test_vectors_by_name_and_by_number_are_the_codes_formula(
    build: Callable[[], LlamaForCausalLM], policy: Policy, tmp_path: Path
) -> None:
    torch.save(policy.vectors, tmp_path / "learnable_params.pt")
    torch.save(policy.state_dict(), tmp_path / "policy_params.pt")
    by_name = import_released_expert(tmp_path / "learnable_params.pt", build())
    by_number = import_released_expert(tmp_path / "policy_params.pt", build())
    assert len(by_name.offsets) == 6 and all(not key.isdigit() for key in by_name.offsets)
    for name, offset in by_name.offsets.items():
        assert torch.equal(offset, by_number.offsets[name]) and offset.dtype == torch.float32
    check(by_number, build, sigmoids(policy.vectors))


def test_it_is_what_our_own_parametrization_of_the_formula_computes(
    build: Callable[[], LlamaForCausalLM], policy: Policy, tmp_path: Path
) -> None:
    torch.save(policy.vectors, tmp_path / "learnable_params.pt")
    model = get_peft_model(build(), SVFConfig.paper(target_modules=r".*\.mlp\.(gate|up|down)_proj"))
    with torch.no_grad():
        for key, vector in policy.vectors.items():
            model.get_submodule(f"base_model.model.{key}".removesuffix(".weight")).svf_offset["default"].weight.copy_(
                vector
            )
    ours, imported = Expert.from_model(model), import_released_expert(tmp_path / "learnable_params.pt", build())
    for name, offset in imported.offsets.items():
        assert ours.fingerprint[name] == pytest.approx(imported.fingerprint[name])
        assert torch.allclose(offset, ours.offsets[name], atol=2e-6)


def test_rounding_the_mask_is_that_of_the_code_and_multipliers_cancel(
    build: Callable[[], LlamaForCausalLM], policy: Policy, tmp_path: Path
) -> None:
    torch.save(policy.vectors, tmp_path / "learnable_params.pt")
    expert = import_released_expert(tmp_path / "learnable_params.pt", build(), round_mask=True)
    # As get_mask of the code has it: of bfloat16 logits, in bfloat16, times max_mult
    masks = {key: torch.sigmoid(vector.detach()).to(torch.bfloat16) * 2 for key, vector in policy.vectors.items()}
    check(expert, build, masks)
    plain = import_released_expert(tmp_path / "learnable_params.pt", build())
    differences = [(offset - plain.offsets[name]).abs().max() for name, offset in expert.offsets.items()]
    assert 1e-4 < max(differences) < 1e-2


@pytest.mark.parametrize(("per_layer", "normalized"), [(False, True), (True, False)])
def test_a_few_shot_search_mixes_the_vectors_as_they_are(
    build: Callable[[], LlamaForCausalLM], tmp_path: Path, per_layer: bool, normalized: bool
) -> None:
    base = build()
    experts = [Policy(base, seed, std=0.02).vectors for seed in (1, 2)]
    for key, vector in experts[1].items():  # far enough from equal vectors, which would be the base model
        experts[1][key] = nn.Parameter((vector + torch.linspace(0, 0.5, len(vector))).detach().to(torch.bfloat16))
    columns = len(experts[0]) if per_layer else 1
    coefficients = 0.2 + torch.rand(2, columns, generator=torch.Generator().manual_seed(3))
    torch.save(Search(experts, coefficients).state_dict(), tmp_path / "policy_params.pt")
    used = coefficients / coefficients.sum(0) if normalized else coefficients
    used = used.expand(2, len(experts[0])).double()
    masks = {
        key: sum(used[k, i] * experts[k][key].detach().double() for k in range(2)) for i, key in enumerate(experts[0])
    }
    expert = import_released_expert(tmp_path / "policy_params.pt", build())
    assert expert.metadata["origin"]["settings"]["kind"] == "few-shot search"
    check(expert, build, masks)
    torch.save({key: mask.to(torch.float32) for key, mask in masks.items()}, tmp_path / "learnable_params.pt")
    by_name = import_released_expert(tmp_path / "learnable_params.pt", build(), mask="identity")
    for name, offset in expert.offsets.items():
        assert torch.allclose(offset, by_name.offsets[name], atol=1e-5)
    with pytest.raises(ExpertError, match="few-shot search has the mask 'identity'"):
        import_released_expert(tmp_path / "policy_params.pt", build(), mask="sigmoid")
    with pytest.raises(ExpertError, match="has none of"):
        import_released_expert(tmp_path / "policy_params.pt", build(), round_mask=True)


def test_modules_that_are_not_in_the_file_are_those_of_the_base_model(
    build: Callable[[], LlamaForCausalLM], policy: Policy, tmp_path: Path
) -> None:
    half = {key: vector for key, vector in policy.vectors.items() if ".layers.1." in key}
    torch.save(half, tmp_path / "learnable_params.pt")
    torch.save({f"learnable_params_module_list.{i}": v for i, v in enumerate(half.values())}, tmp_path / "policy.pt")
    by_name = import_released_expert(tmp_path / "learnable_params.pt", build())
    check(by_name, build, sigmoids(half))
    assert by_name.metadata["origin"]["settings"]["matrices"] == "3 of 6"
    with pytest.raises(ExpertError, match=r"3 vectors, without names, and the model 6 MLP weights.*`layers`"):
        import_released_expert(tmp_path / "policy.pt", build())
    by_number = import_released_expert(tmp_path / "policy.pt", build(), layers=[1])
    assert all(torch.equal(offset, by_name.offsets[name]) for name, offset in by_number.offsets.items())


def test_a_bfloat16_base_and_one_with_transposed_weights(tiny_llama: Build, tmp_path: Path) -> None:
    base = tiny_llama().bfloat16()
    policy = Policy(base)
    torch.save(policy.vectors, tmp_path / "half.pt")
    check(
        import_released_expert(tmp_path / "half.pt", base),
        lambda: tiny_llama().bfloat16().double(),
        sigmoids(policy.vectors),
    )
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 97, "initializer_range": 0.2}
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes)).double().eval()
    weights = {key: value for key, value in gpt2.state_dict().items() if "mlp" in key and value.dim() == 2}
    vectors = {key: torch.linspace(-1, 1, min(value.shape)) for key, value in weights.items()}
    torch.save(vectors, tmp_path / "gpt2.pt")
    model = import_released_expert(tmp_path / "gpt2.pt", gpt2).put_into(gpt2, "released")
    found = merged_state_dict(model, "released")[0]
    for key, vector in vectors.items():
        left, sigma, right = torch.svd(weights[key])
        scaled = sigma * torch.sigmoid(vector.double())
        weight = (left * scaled) @ right.T * (sigma.sum() / scaled.sum())
        assert float((found[key] - weight).norm() / weight.norm()) < 1e-6


def test_the_expert_knows_where_it_comes_from_and_survives_saving(
    build: Callable[[], LlamaForCausalLM], policy: Policy, tmp_path: Path
) -> None:
    path = tmp_path / "policy_params.pt"
    torch.save(policy.state_dict(), path)
    expert = import_released_expert(path, build(), metadata={"name": "math", "label": "math"}, base_revision="abc")
    expert.save_pretrained(tmp_path / "expert")
    again = Expert.from_pretrained(tmp_path / "expert")
    assert all(torch.equal(offset, again.offsets[name]) for name, offset in expert.offsets.items())
    assert again.metadata == expert.metadata and again.metadata["label"] == "math"
    origin = again.metadata["origin"]
    assert origin["operation"] == "import" and "sigmoid(p)" in origin["formula"]
    assert origin["sources"] == [{"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}]
    assert (again.base_revision, again.fingerprint.keys()) == ("abc", expert.offsets.keys())
    with pytest.raises(ExpertError, match="another base model"):
        again.put_into(LlamaForCausalLM(build().config).double(), "released")


# -- files of strangers


class Attack:
    """A pickle that creates a file when it is loaded the ordinary way."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def test_pickles_with_code_are_not_executed_and_the_error_says_so(tmp_path: Path) -> None:
    target = tmp_path / "executed"
    torch.save({"model.layers.0.mlp.up_proj.weight": Attack(target)}, tmp_path / "zipped.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Attack(target)))
    torch.save(Attack(target), tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ExpertError, match=r"posix\.system.*could run code.*nothing of it was run") as caught:
        read_tensors(tmp_path / "zipped.pt")
    assert "weights_only" not in str(caught.value)
    for name in ("plain.pt", "legacy.pt"):
        with pytest.raises(ExpertError, match=r"no checkpoint of torch\.save"):
            read_tensors(tmp_path / name)
    assert not target.exists()
    torch.load(tmp_path / "zipped.pt", weights_only=False)  # it is a real attack
    assert target.exists()


KEY = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(3)], "holds list, not tensors by name"),
        ({}, "holds dict, not tensors by name"),
        ({KEY: 0.5}, "holds float as 'model.layers.0"),
        ({3: torch.zeros(3)}, "holds Tensor as 3"),
        ({KEY: torch.zeros(3, dtype=torch.long)}, "not only vectors by name"),
        ({KEY: torch.zeros(3).to_sparse()}, "not only vectors by name"),
        ({KEY: torch.zeros(3, device="meta")}, "not only vectors by name"),
        ({KEY: torch.zeros(1).expand(2**40)}, "1,099,511,627,776 numbers, which no expert has"),
        ({KEY: torch.tensor([0.1, torch.nan])}, "NaN or infinite"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_contents_that_are_no_vectors_by_name(tmp_path: Path, content: Any, words: str) -> None:
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ExpertError, match=words):
        read_tensors(tmp_path / "file.pt")


def test_files_that_are_missing_packed_damaged_or_too_large(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ExpertError, match="There is no file"):
        read_tensors(tmp_path / "missing.pt")
    path = tmp_path / "policy_params.pt"
    torch.save(policy.state_dict(), path)
    assert len(read_tensors(path)) == 6
    whole = path.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ExpertError, match="damaged"):
        read_tensors(tmp_path / "cut.pt")
    with zipfile.ZipFile(io.BytesIO(whole)) as source, zipfile.ZipFile(tmp_path / "packed.pt", "w") as packed:
        for entry in source.infolist():
            packed.writestr(entry.filename, source.read(entry), zipfile.ZIP_DEFLATED)
    with pytest.raises(ExpertError, match=r"packed as torch\.save does not pack"):
        read_tensors(tmp_path / "packed.pt")
    with zipfile.ZipFile(tmp_path / "empty.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"nonsense")
    with pytest.raises(ExpertError, match=r"cannot be read|more than tensors"):
        read_tensors(tmp_path / "empty.pt")
    monkeypatch.setattr(released_code, "LARGEST_FILE", 1000)
    with pytest.raises(ExpertError, match="larger than"):
        read_tensors(path)


def test_checkpoints_of_other_models_are_refused(
    build: Callable[[], LlamaForCausalLM], policy: Policy, tiny_llama: Build, tmp_path: Path
) -> None:
    def refused(content: Any, words: str, base: Any = None) -> None:
        torch.save(content, tmp_path / "file.pt")
        with pytest.raises(ExpertError, match=words):
            import_released_expert(tmp_path / "file.pt", build() if base is None else base)

    deeper, wider = tiny_llama(num_hidden_layers=3), tiny_llama(intermediate_size=24)
    refused(policy.state_dict(), "6 vectors, without names, and the model 9 MLP weights", deeper)
    refused(policy.state_dict(), "'model.layers.0.mlp.gate_proj' has 24 singular values, .* shape \\(32,\\)", wider)
    refused(Policy(deeper).vectors, "there is no 'model.layers.2.mlp.gate_proj'")
    refused({KEY: torch.zeros(32, 32)}, "shape \\(32, 32\\)")
    refused({"model.norm.weight": torch.zeros(32)}, "holds model.norm.weight, which is no expert")
    numbers = {f"learnable_params_module_list.{index}": torch.zeros(32) for index in (0, 1, 2, 3, 4, 6)}
    refused(numbers, "another base model")
    search = Search([policy.vectors, policy.vectors], torch.ones(2, 1)).state_dict()
    other = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1))
    refused(search, "has no weight for 'weights_0_k_model_layers_0", other)
    refused({**search, "adaptive_weights": torch.ones(3, 1)}, "coefficients of shape \\(3, 1\\)")
    refused(
        {key: v for key, v in search.items() if key != "weights_1_k_" + KEY.replace(".", "_")}, "it has the experts"
    )
    refused({KEY: torch.linspace(-1, 1, 32) - 1e30}, "nuclear norm to zero")
    with pytest.raises(ExpertError, match="adapters in it"):
        import_released_expert(tmp_path / "file.pt", get_peft_model(build(), SVFConfig()))
