"""Banks: saved as a whole, loaded exactly, and clear about what is wrong with a folder."""

from __future__ import annotations

import copy
import json
import shutil
import stat
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from peft_svf import ExpertBank, SVFConfig
from peft_svf.experts import ExpertBankError, ExpertEntry


IDS = torch.arange(3, 23).reshape(2, 10)
ENTRIES = {"math": ExpertEntry("arithmetic", "sums"), "code": ExpertEntry("programs")}


PROTOTYPE: list[tuple[ExpertBank, Path]] = []  # the tests get copies of it


@pytest.fixture
def prototype(tiny_llama, character_tokenizer, add_experts, tmp_path_factory) -> tuple[ExpertBank, Path]:
    """A bank and the folder that it is saved in."""
    if not PROTOTYPE:
        model = add_experts(tiny_llama(vocab_size=100))
        bank = ExpertBank(model, character_tokenizer, ENTRIES, instruction="Which?")
        folder = bank.save_pretrained(tmp_path_factory.mktemp("prototype") / "bank", include_base=True)
        PROTOTYPE.append((bank, folder))
    return PROTOTYPE[0]


@pytest.fixture
def bank(prototype: tuple[ExpertBank, Path]) -> ExpertBank:
    return copy.deepcopy(prototype[0])


@pytest.fixture
def folder(prototype: tuple[ExpertBank, Path], tmp_path: Path) -> Path:
    return shutil.copytree(prototype[1], tmp_path / "bank")


@torch.no_grad()
def logits(bank: ExpertBank, name: str) -> torch.Tensor:
    return bank.model(IDS, adapter_names=[name] * 2).logits


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_by_default_every_svf_adapter_is_an_expert_with_its_name_as_label(
    tiny_llama, character_tokenizer, add_experts
):
    bank = ExpertBank(add_experts(tiny_llama(vocab_size=100)), character_tokenizer)
    assert bank.experts == {"math": ExpertEntry("math"), "code": ExpertEntry("code")}
    assert bank.labels == {"math": "math", "code": "code"}
    assert not bank.model.training


@pytest.mark.parametrize("tied", [False, True])
def test_a_saved_bank_loads_with_the_same_logits(tiny_llama, character_tokenizer, add_experts, tmp_path, tied):
    base = tiny_llama(vocab_size=100, tie_word_embeddings=tied)
    with torch.no_grad():
        base_logits = base(IDS).logits
    bank = ExpertBank(add_experts(base), character_tokenizer, ENTRIES, instruction="Which?")
    loaded = ExpertBank.from_pretrained(bank.save_pretrained(tmp_path / "bank", include_base=True))
    assert loaded.experts == ENTRIES
    assert loaded.instruction == "Which?"
    assert loaded.tokenizer.chat_template == character_tokenizer.chat_template
    for name in ("math", "code"):
        assert torch.equal(logits(loaded, name), logits(bank, name))
        assert (logits(loaded, name) - base_logits).abs().max() > 0.1
    with loaded.base_only() as model, torch.no_grad():
        assert torch.equal(model(IDS).logits, base_logits)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_the_saved_base_is_an_ordinary_checkpoint(bank, folder, tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    for name, tensor in tiny_llama(vocab_size=100).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


def test_a_loaded_bank_saves_again_beside_its_base(folder, tmp_path):
    bank = ExpertBank.from_pretrained(folder)
    again = ExpertBank.from_pretrained(bank.save_pretrained(tmp_path / "again"))
    assert json.loads((tmp_path / "again" / "config.json").read_text())["base_model_name_or_path"] == f"{folder}/base"
    assert torch.equal(logits(again, "math"), logits(bank, "math"))


def test_an_adapter_called_default_is_saved_in_its_own_folder(tiny_llama, character_tokenizer, add_experts, tmp_path):
    bank = ExpertBank(add_experts(tiny_llama(vocab_size=100), names=("default", "code")), character_tokenizer)
    folder = bank.save_pretrained(tmp_path / "bank", include_base=True)
    assert {"base", "code", "config.json", "default"} <= {path.name for path in folder.iterdir()}
    assert torch.equal(logits(ExpertBank.from_pretrained(folder), "default"), logits(bank, "default"))


def test_auto_classes_load_a_bank_as_a_peft_model(bank, folder):
    assert AutoConfig.from_pretrained(folder).experts["math"]["label"] == "arithmetic"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, PeftModel)
    assert model.expert_bank.model is model
    assert torch.equal(logits(model.expert_bank, "math"), logits(bank, "math"))


def test_every_saved_file_is_readable_by_others_and_no_card_or_root_adapter_is_left(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) >= 8
    assert all(path.stat().st_mode & stat.S_IROTH for path in files)
    stubs = ["modeling_transformer2.py", "transformer2.py"]
    assert sorted(path.name for path in folder.iterdir()) == ["base", "code", "config.json", "math", *stubs]
    assert sorted(path.name for path in (folder / "math").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_failed_save_leaves_the_old_bank_and_nothing_else(bank, folder, monkeypatch):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(bank.tokenizer, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        bank.save_pretrained(folder, include_base=True)
    with pytest.raises(OSError, match="disk full"):
        bank.save_pretrained(folder.parent / "new", include_base=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["bank"]


def test_saving_replaces_a_bank_but_no_other_folder(bank, folder):
    bank.instruction = "New?"
    bank.save_pretrained(folder, include_base=True)
    assert ExpertBank.from_pretrained(folder).instruction == "New?"
    other = folder.parent / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("precious")
    with pytest.raises(ExpertBankError, match="exists and is not a bank"):
        bank.save_pretrained(other, include_base=True)
    assert (other / "thesis.txt").read_text() == "precious"


def test_a_bank_is_not_saved_without_its_base_where_that_would_lose_it(bank, folder, tmp_path):
    with pytest.raises(ExpertBankError, match="include_base=True"):  # built in memory, no checkpoint
        bank.save_pretrained(tmp_path / "new")
    with pytest.raises(ExpertBankError, match="include_base=True"):  # its base lies in the folder to be replaced
        ExpertBank.from_pretrained(folder).save_pretrained(folder)
    ExpertBank.from_pretrained(folder)


def test_merged_weights_are_not_saved_as_the_base(bank, tmp_path):
    bank.model.merge_adapter(["math"])
    with pytest.raises(ExpertBankError, match="unmerge_adapter"):
        bank.save_pretrained(tmp_path / "bank", include_base=True)
    bank.model.unmerge_adapter()
    bank.save_pretrained(tmp_path / "bank", include_base=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "no bank folder"),
        (lambda f: (f / "config.json").unlink(), "is not a bank: it has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "is not a bank"),
        (lambda f: edit_config(f, model_type="llama"), "is not a bank"),
        (lambda f: edit_config(f, experts={}), "names no experts"),
        (lambda f: edit_config(f, experts=["math"]), "names no experts"),
        (lambda f: edit_config(f, experts={"math": {}}), "expert 'math' needs a label"),
        (lambda f: edit_config(f, experts={"../math": {"label": "math"}}), "cannot name an expert"),
        (lambda f: edit_config(f, instruction=3), "instruction must be a string"),
        (lambda f: edit_config(f, base_model_name_or_path=None), "no base_model_name_or_path"),
        (lambda f: edit_config(f, base_model_name_or_path="/nowhere/base"), "cannot load its base model '/nowhere"),
        (lambda f: (f / "base" / "model.safetensors").write_bytes(b"x"), "cannot load its base model"),
        (lambda f: shutil.rmtree(f / "math"), "incomplete: math/adapter_config.json is missing"),
        (lambda f: (f / "math" / "adapter_model.safetensors").unlink(), "math/adapter_model.safetensors is missing"),
        (lambda f: (f / "math" / "adapter_model.safetensors").write_bytes(b"x"), "Expert 'math' .* cannot be loaded"),
        (lambda f: (f / "math" / "adapter_config.json").write_text("{"), "Expert 'math' .* cannot be loaded"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_folder_gets_an_error_that_names_the_fault(folder, damage, message):
    damage(folder)
    with pytest.raises(ExpertBankError, match=message):
        ExpertBank.from_pretrained(folder)


def test_an_expert_of_another_base_is_named(folder, tiny_llama, character_tokenizer, add_experts):
    other = ExpertBank(add_experts(tiny_llama(seed=1, vocab_size=100)), character_tokenizer)
    other.save_pretrained(folder.parent / "other", include_base=True)
    shutil.rmtree(folder / "code")
    shutil.copytree(folder.parent / "other" / "code", folder / "code")
    with pytest.raises(ExpertBankError, match=r"Expert 'code' .*belongs to another base model"):
        ExpertBank.from_pretrained(folder)


def test_a_lora_adapter_is_no_expert(folder, tiny_llama, character_tokenizer):
    lora = get_peft_model(tiny_llama(vocab_size=100), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ExpertBankError, match="no SVF adapter"):
        ExpertBank(lora, character_tokenizer)
    shutil.rmtree(folder / "code")
    lora.save_pretrained(folder / "code")
    with pytest.raises(ExpertBankError, match=r"'code' .* is of type LORA"):
        ExpertBank.from_pretrained(folder)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"maths": ExpertEntry("math")}, "'maths' is no SVF adapter"),
        ({"others": ExpertEntry("math")}, "'others' cannot name an expert"),
        ({"math": ExpertEntry("others")}, "a label is unique"),
        ({"math": ExpertEntry(" ")}, "a label is unique"),
        ({"math": ExpertEntry("x"), "code": ExpertEntry("x")}, "a label is unique"),
    ],
)
def test_names_and_labels_are_checked(tiny_llama, character_tokenizer, add_experts, experts, message):
    with pytest.raises(ExpertBankError, match=message):
        ExpertBank(add_experts(tiny_llama(vocab_size=100)), character_tokenizer, experts)


def test_base_only_restores_the_model_after_an_exception(bank):
    bank.model.set_adapter("code", inference_mode=True)
    before = logits(bank, "math")
    with pytest.raises(RuntimeError, match="boom"), bank.base_only():
        raise RuntimeError("boom")
    assert bank.model.active_adapter == "code"
    assert not any(p.requires_grad for name, p in bank.model.named_parameters() if "svf_" in name)
    assert torch.equal(logits(bank, "math"), before)


def test_the_base_of_fused_experts_is_saved_as_it_was(character_tokenizer, tmp_path):
    """Two adapted parameters of one module, which PEFT wraps one around the other, and a module trained whole."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_local_experts": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = MixtralForCausalLM(MixtralConfig(vocab_size=100, initializer_range=0.3, **sizes, **heads)).eval()
        weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        fused = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        options = {"target_modules": ["q_proj"], "target_parameters": fused, "modules_to_save": ["lm_head"]}
        model = get_peft_model(base, SVFConfig(task_type="CAUSAL_LM", init_weights=False, **options), "math")
    bank = ExpertBank(model, character_tokenizer)
    folder = bank.save_pretrained(tmp_path / "bank", include_base=True)
    saved = AutoModelForCausalLM.from_pretrained(folder / "base").state_dict()
    assert saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in weights)
    bank.model.set_adapter("math")
    with torch.no_grad():
        expected = bank.model(IDS).logits
    loaded = ExpertBank.from_pretrained(folder)
    with loaded.routed("math") as routed, torch.no_grad():
        torch.testing.assert_close(routed(IDS).logits, expected)
    assert not torch.allclose(expected, AutoModelForCausalLM.from_pretrained(folder / "base")(IDS).logits, atol=1e-3)
