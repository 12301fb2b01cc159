"""Merged checkpoints and folders for mergekit: W' is the float64 formula's, nothing of PEFT is left, bases stay."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from peft_svf import SVFConfig
from peft_svf.dispatch import Route
from peft_svf.experts import ExpertBank, ExpertError
from peft_svf.experts.base_state import plain_state_dict
from peft_svf.experts.merged_export import merged_state_dict, save_merged
from peft_svf.experts.mergekit import save_for_mergekit
from peft_svf.playground import BANK_FOLDER


IDS = torch.tensor([[5, 17, 42, 3, 60], [9, 8, 7, 6, 5]])
MIXTURE = {"math": 0.7, "code": -0.4}
Build = Callable[..., LlamaForCausalLM]


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=97, **sizes, num_key_value_heads=2, num_local_experts=3, initializer_range=0.2)
    return MixtralForCausalLM(config).eval()


def experts(base: nn.Module, **kwargs: object) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(base, SVFConfig(init_weights=False, **kwargs), adapter_name="math")
    model.add_adapter("code", SVFConfig(init_weights=False, **kwargs))
    return model.eval()


@pytest.fixture
def bases(tiny_llama: Build) -> dict[str, tuple[Callable[[], Any], dict[str, object]]]:
    fused = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    return {
        "llama": (tiny_llama, {}),
        "tied": (lambda: tiny_llama(tie_word_embeddings=True), {"rank": 7}),
        "gpt2": (gpt2, {}),
        "mixtral": (mixtral, fused),
        "sigmoid": (tiny_llama, {"parametrization": "sigmoid"}),
        "bfloat16": (lambda: tiny_llama().bfloat16(), {}),
    }


@pytest.fixture(scope="module")
def bank() -> ExpertBank:
    return ExpertBank.from_pretrained(BANK_FOLDER)


def formula(weight: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """U Σ diag(z) Vᵀ in float64, by a decomposition of its own; shape (out, in)."""
    left, sigma, right = torch.linalg.svd(weight.double(), full_matrices=False)
    z = torch.ones_like(sigma)
    z[: len(offset)] += offset.double()
    return (left * (sigma * z)) @ right


def expected_weights(base: nn.Module, model: PeftModel, mixture: dict[str, float]) -> dict[str, torch.Tensor]:
    """W' of every adapted parameter by name, float64, from the weights of the untouched `base`."""
    found, inner = {}, model.get_base_model()
    for module_name, layer in inner.named_modules():
        if not hasattr(layer, "svf_offset"):
            continue
        offset = sum(weight * layer.offset(name).detach().double() for name, weight in mixture.items())
        plain = module_name.replace(".base_layer", "")
        name = f"{plain}.{layer.parameter_name}" if hasattr(layer, "parameter_name") else f"{plain}.weight"
        weight = base.get_parameter(name).detach()
        if weight.dim() == 3:
            found[name] = torch.stack([formula(each, numbers) for each, numbers in zip(weight, offset, strict=True)])
        else:
            is_conv = isinstance(base.get_submodule(plain), Conv1D)
            found[name] = formula(weight.T, offset).T if is_conv else formula(weight, offset)
    return found


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("mixture", [{"math": 1.0}, MIXTURE], ids=["one", "mixture"])
@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "mixtral", "sigmoid", "bfloat16"])
def test_weights_are_those_of_the_formula_rounded_once(
    bases: dict[str, Any], name: str, mixture: dict[str, float]
) -> None:
    build, config = bases[name]
    base, model = build(), experts(build(), **config)
    state, error = merged_state_dict(model, mixture)
    expected = expected_weights(base, model, mixture)
    assert state.keys() == base.state_dict().keys() and len(expected) > 4
    missed, whole, change = 0.0, 0.0, 0.0
    for key, before in base.state_dict().items():
        assert state[key].dtype == before.dtype and state[key].shape == before.shape
        if key not in expected:
            assert torch.equal(state[key], before)
            continue
        difference = (state[key].double() - expected[key]).norm()
        assert float(difference / expected[key].norm()) < {torch.bfloat16: 2.2e-3, torch.float32: 1e-6}[before.dtype]
        missed += float(difference**2)
        whole += float(expected[key].norm() ** 2)
        change += float((expected[key] - before.double()).norm() ** 2)
    assert error is not None and error.modules.keys() == {key.removesuffix(".weight") for key in expected}
    # In float32 the offset of a logit is rounded as much as the weight is
    assert error.total == pytest.approx((missed / whole) ** 0.5, rel=0.02, abs=3e-7)
    assert error.of_change == pytest.approx((missed / change) ** 0.5, rel=0.02, abs=2e-6)
    assert error.total > 1e-9


@pytest.mark.parametrize("name", ["llama", "tied", "gpt2", "mixtral", "bfloat16"])
def test_the_checkpoint_is_a_plain_model_with_the_mixtures_logits_and_the_model_stays_as_it_was(
    bases: dict[str, Any], name: str, character_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    build, config = bases[name]
    model = experts(build(), **config)
    bank = ExpertBank(model, character_tokenizer)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    made = save_merged(bank, tmp_path / "merged", MIXTURE)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    text = "".join(path.read_bytes().decode("latin-1") for path in made.folder.iterdir()).lower()
    assert "svf" not in text and "peft" not in text and "base_layer" not in text
    assert made.size == sum(path.stat().st_size for path in made.folder.iterdir())
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in made.folder.iterdir()
    }
    loaded, info = AutoModelForCausalLM.from_pretrained(made.folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == made.dtype and type(loaded) is type(build())
    with torch.no_grad(), bank.routed(MIXTURE):
        live = bank.model(IDS).logits
    close = 0.2 if name == "bfloat16" else 1e-3
    assert (logits(loaded) - live).abs().max() < close < (logits(build()) - live).abs().max()
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    assert tokenizer("7+5").input_ids == character_tokenizer("7+5").input_ids


def test_exact_is_closer_than_the_models_own_bases_on_bfloat16(tiny_llama: Build) -> None:
    base, model = tiny_llama().bfloat16(), experts(tiny_llama().bfloat16())
    expected = expected_weights(base, model, {"math": 1.0})

    def distance(exact: bool) -> float:
        state, error = merged_state_dict(model, "math", dtype=torch.float32, exact=exact)
        assert (error is None) is not exact
        return max(float((state[key].double() - each).norm() / each.norm()) for key, each in expected.items())

    assert distance(exact=True) < 1e-7 < 1e-5 < distance(exact=False) < 2e-3


def test_weights_of_each_layer_from_a_route(tiny_llama: Build) -> None:
    model = experts(tiny_llama())
    route = Route(
        torch.tensor([[[1.0, 0.0], [0.0, 0.5]]]), ("math", "code"), groups=("model.layers.0", "model.layers.1")
    )
    state = merged_state_dict(model, route)[0]
    first, second = merged_state_dict(model, "math")[0], merged_state_dict(model, {"code": 0.5})[0]
    for key in state:
        assert torch.equal(state[key], (second if ".layers.1." in key else first)[key])
    rows = Route(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), ("math", "code"))
    with pytest.raises(ExpertError, match="the route has 2 rows"):
        merged_state_dict(model, rows)


def test_a_basis_that_was_brought_along_defines_the_expert(tiny_llama: Build, tmp_path: Path) -> None:
    experts(tiny_llama(), save_basis=True).save_pretrained(tmp_path, selected_adapters=["math"])
    base = tiny_llama()
    with torch.no_grad():
        for module in base.model.layers.modules():
            if isinstance(module, nn.Linear):
                step = module.weight.abs().max() / 4
                module.weight.copy_((module.weight / step).round() * step)
    model = PeftModel.from_pretrained(base, tmp_path / "math", adapter_name="math")
    merged = base.__class__(base.config).eval()
    merged.load_state_dict(merged_state_dict(model, "math")[0])
    assert (logits(merged) - logits(model)).abs().max() < 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_trained_tokens_and_whole_modules_are_the_adapters(
    tiny_llama: Build, character_tokenizer: PreTrainedTokenizerFast, tied: bool, tmp_path: Path
) -> None:
    model = experts(tiny_llama(tie_word_embeddings=tied), trainable_token_indices=[5, 17], modules_to_save=["norm"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens" in name or "modules_to_save" in name:
                parameter.normal_()
    for name in ("math", "code"):
        model.set_adapter(name)
        save_merged(model, tmp_path / name, name, tokenizer=character_tokenizer)
        assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / name)) - logits(model)).abs().max() < 1e-3
    tensors = load_file(tmp_path / "math" / "model.safetensors")
    assert ("lm_head.weight" in tensors) is not tied
    assert all(
        torch.equal(each, tiny_llama(tie_word_embeddings=tied).state_dict()[key])
        for key, each in plain_state_dict(model.get_base_model()).items()
    )
    with pytest.raises(ExpertError, match="cannot be mixed"):
        merged_state_dict(model, MIXTURE)


def test_another_dtype_is_that_of_all_weights_and_of_the_config(bank: ExpertBank, tmp_path: Path) -> None:
    made = save_merged(bank, tmp_path / "half", "math", dtype=torch.bfloat16)
    assert {each.dtype for each in load_file(made.folder / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((made.folder / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = AutoModelForCausalLM.from_pretrained(made.folder)
    assert loaded.dtype == made.dtype == torch.bfloat16 and bank.base_model.dtype == torch.float32
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert made.error is not None and 1e-3 < made.error.total < 3e-3 < made.error.of_change < 0.1


def test_values_that_do_not_fit_are_named(tiny_llama: Build) -> None:
    model = experts(tiny_llama())
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.up_proj.svf_offset["math"].weight[0] = 1e6
    with pytest.raises(ExpertError, match=r"'model.layers.1.mlp.up_proj' has values that float16 cannot hold"):
        merged_state_dict(model, "math", dtype=torch.float16)
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.up_proj.svf_offset["math"].weight[0] = torch.nan
    with pytest.raises(ExpertError, match=r"'model.layers.1.mlp.up_proj' has NaN"):
        merged_state_dict(model, "math")


def test_what_cannot_be_exact_or_is_not_there_is_refused(tiny_llama: Build, tmp_path: Path) -> None:
    model = experts(tiny_llama())
    for wrong, words in (
        ("poet", "no expert 'poet' to merge; the model has math, code"),
        ({"math": 1.0, "poet": 0.1}, "no expert 'poet'"),
        ("others", "base model itself"),
        ({"math": 0.0}, "base model itself"),
        ({"math": float("nan")}, "finite"),
    ):
        with pytest.raises(ExpertError, match=words):
            merged_state_dict(model, wrong)
    with pytest.raises(ExpertError, match="one of float16"):
        merged_state_dict(model, "math", dtype=torch.int8)
    with pytest.raises(ExpertError, match="no expert to merge"):
        merged_state_dict(tiny_llama(), "math")
    model.merge_adapter(["code"])
    with pytest.raises(ExpertError, match=r"code are merged into the model; call unmerge_adapter\(\) first"):
        merged_state_dict(model, "math")


def test_quantized_bases_are_refused_with_a_remedy(tiny_llama: Build, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    quantized = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(ExpertError, match=r"quantized.*Load the unquantized checkpoint"):
        merged_state_dict(experts(quantized), "math")


def test_nothing_is_half_written_and_nothing_replaced(
    bank: ExpertBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(bank.tokenizer, "save_pretrained", full)
        with pytest.raises(OSError, match="no space left"):
            save_merged(bank, tmp_path / "merged", "math", exact=False)
        with pytest.raises(OSError, match="no space left"):
            save_for_mergekit(bank, tmp_path / "kit", {"math": 1.0}, exact=False)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "diary.txt").write_text("dear diary")
    for save in (save_merged, save_for_mergekit):
        with pytest.raises(ExpertError, match="is not empty; choose a new folder"):
            save(bank, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]


def test_names_of_two_fused_parameters_of_one_module() -> None:
    model = experts(mixtral(), target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    state, plain = plain_state_dict(model.get_base_model()), mixtral().state_dict()
    assert state.keys() == plain.keys() and all(torch.equal(state[key], plain[key]) for key in plain)


# -- mergekit: what its methods compute, from the written folder alone


def read_models(folder: Path, recipe: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    names = {recipe.get("base_model"), *(each["model"] for each in recipe["models"])} - {None}
    return {name: load_file(folder / name / "model.safetensors") for name in names}


@pytest.mark.parametrize(("method", "inside"), [("task_arithmetic", False), ("linear", True)])
def test_the_recipe_is_the_mixture_of_the_bank(bank: ExpertBank, tmp_path: Path, method: Any, inside: bool) -> None:
    weights = {"math": 0.7, "code": -0.4}
    made = save_for_mergekit(bank, tmp_path / "kit", weights, merge_method=method, include_base=inside)
    recipe = yaml.safe_load((made.folder / "mergekit.yaml").read_text())
    assert (recipe["merge_method"], recipe["dtype"], recipe["out_dtype"]) == (method, "float32", "float32")
    models = read_models(made.folder, recipe)
    shares = {each["model"]: each["parameters"]["weight"] for each in recipe["models"]}
    base = "./base" if inside else str(BANK_FOLDER / "base")
    if method == "linear":
        assert sum(shares.values()) == pytest.approx(1) and recipe["parameters"] == {"normalize": False}
    else:
        assert recipe["base_model"] == base and base not in shares
    assert shares.items() >= {f"./{name}": weight for name, weight in weights.items()}.items()
    expected = merged_state_dict(bank, weights)[0]
    for key, before in models[base].items():
        if method == "linear":
            merged = sum(share * models[name][key].double() for name, share in shares.items())
        else:
            deltas = (share * (models[name][key].double() - before) for name, share in shares.items())
            merged = before + sum(deltas)
        assert torch.allclose(merged.float(), expected[key], atol=1e-6), key
    assert made.errors.keys() == weights.keys()
    assert made.command == f"cd {made.folder} && mergekit-yaml mergekit.yaml merged"


def test_loras_for_mergekit_stand_beside_the_base_they_belong_to(bank: ExpertBank, tmp_path: Path) -> None:
    made = save_for_mergekit(bank, tmp_path / "kit", lora_rank=1.0, merge_method="ties", density=0.5)
    recipe = yaml.safe_load((made.folder / "mergekit.yaml").read_text())
    base = recipe["base_model"]
    assert [each["model"] for each in recipe["models"]] == [f"{base}+./{name}" for name in bank.experts]
    assert [each["parameters"] for each in recipe["models"]] == [{"weight": 1 / 3, "density": 0.5}] * 3
    assert "--lora-merge-cache" in made.command
    lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), made.folder / "code")
    with torch.no_grad(), bank.routed("code"):
        assert torch.allclose(logits(lora), bank.model(IDS).logits, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": {"poet": 1.0}}, "no expert 'poet' to export; the bank has math"),
        ({"weights": {}}, "at least one expert"),
        ({"weights": {"math": float("inf")}}, "finite"),
        ({"merge_method": "slerp"}, "task_arithmetic, linear, ties"),
        ({"density": 0.5}, "ties, dare_linear, dare_ties only"),
        ({"density": 2.0, "merge_method": "ties"}, r"\(0, 1\]"),
    ],
)
def test_recipes_that_cannot_be(bank: ExpertBank, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ExpertError, match=words):
        save_for_mergekit(bank, tmp_path / "kit", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_mergekit_would_misread_goes_into_the_folder(
    tiny_llama: Build, character_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path / "llama+1")
    bank = ExpertBank(experts(LlamaForCausalLM.from_pretrained(tmp_path / "llama+1")), character_tokenizer)
    with pytest.raises(ExpertError, match=r"pass include_base=True"):
        save_for_mergekit(bank, tmp_path / "kit")
    made = save_for_mergekit(bank, tmp_path / "kit", include_base=True)
    found = load_file(made.folder / "base" / "model.safetensors")
    assert all(torch.equal(found[key], each) for key, each in tiny_llama().state_dict().items())
