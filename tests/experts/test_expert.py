"""Expert: files and live models give the same object, which goes back into files and models without a loss."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from peft_svf import SVFConfig
from peft_svf.experts import Expert, ExpertError
from peft_svf.playground import BANK_FOLDER


IDS = torch.arange(5, 29).reshape(2, 12)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def trained(base: Any, seed: int = 0, **settings: Any) -> PeftModel:
    """Random offsets on a model."""
    torch.manual_seed(seed)
    return get_peft_model(base, SVFConfig(init_weights=False, **settings)).eval()


def equal(left: Expert, right: Expert) -> bool:
    """Whether all numbers are the same, bit for bit."""
    return all(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        for one, other in ((left.offsets, right.offsets), (left.others, right.others))
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 5, "rank_pattern": {"down_proj": 9}},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"], "trainable_token_indices": [3, 7]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"save_basis": True, "rank": 6},
    ],
    ids=str,
)
def test_a_folder_and_a_live_model_give_the_same_expert(tiny_llama, tmp_path, settings):
    model = trained(tiny_llama(), **settings)
    live = Expert.from_model(model)
    model.save_pretrained(tmp_path / "saved", save_embedding_layers=False)
    loaded = Expert.from_pretrained(tmp_path / "saved")
    assert equal(live, loaded)
    assert live.fingerprint == loaded.fingerprint and live.fingerprint_id == loaded.fingerprint_id
    expected = {
        name.removeprefix("base_model.model.").removesuffix(".svf_offset.default.weight"): parameter
        for name, parameter in model.named_parameters()
        if "svf_offset" in name
    }
    assert live.offsets.keys() == expected.keys() == live.fingerprint.keys()
    assert all(torch.equal(live.offsets[name], parameter) for name, parameter in expected.items())
    assert all(torch.equal(live.z[name], 1 + parameter) for name, parameter in expected.items())

    base = tiny_llama()
    again = live.put_into(base, "again")
    assert torch.equal(logits(again), logits(model))
    assert equal(Expert.from_model(again, "again"), live)
    assert equal(Expert.from_pretrained(live.save_pretrained(tmp_path / "own")), live)
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "own")
    assert torch.equal(logits(plain), logits(model))


def test_the_released_parametrization_becomes_offsets_by_its_formula_in_float64(tiny_llama, tmp_path):
    model = trained(tiny_llama(), parametrization="sigmoid")
    expert = Expert.from_model(model)
    assert expert.config.parametrization == "offset" and model.peft_config["default"].parametrization == "sigmoid"
    weights = tiny_llama().state_dict()
    for name, offset in expert.offsets.items():
        logit = model.get_parameter(f"base_model.model.{name}.svf_offset.default.weight").detach().double()
        singular_values = torch.linalg.svdvals(weights[f"{name}.weight"].double())
        scaled = singular_values * torch.sigmoid(logit)
        expected = torch.sigmoid(logit) * singular_values.sum() / scaled.sum() - 1
        torch.testing.assert_close(offset.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(expert.put_into(tiny_llama(), "same")), logits(model), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    with pytest.raises(ExpertError, match=r"holds logits .* then Expert\.from_model"):
        Expert.from_pretrained(tmp_path)


def test_the_strength_that_a_model_applies_is_in_the_expert(tiny_llama):
    model = trained(tiny_llama())
    full = Expert.from_model(model)
    model.set_strength("default", 0.25)
    quarter = Expert.from_model(model)
    assert all(torch.equal(quarter.offsets[name], 0.25 * full.offsets[name]) for name in full.offsets)
    torch.testing.assert_close(logits(quarter.put_into(tiny_llama(), "quarter")), logits(model), rtol=1e-5, atol=1e-5)


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralForCausalLM(
        MixtralConfig(**sizes, vocab_size=97, num_hidden_layers=2, num_local_experts=3, initializer_range=0.2)
    ).eval()


@pytest.mark.parametrize("parametrization", ["offset", "sigmoid"])
def test_fused_parameters_of_a_mixture_of_experts_survive(tmp_path, parametrization):
    fused = [f"mlp.experts.{name}" for name in ("down_proj", "gate_up_proj")]
    model = trained(mixtral(), target_modules=["q_proj"], target_parameters=fused, parametrization=parametrization)
    expert = Expert.from_model(model)
    shapes = {tuple(offset.shape) for offset in expert.offsets.values()}
    assert shapes == {(16,), (3, 16)} and len(expert.offsets) == 6
    again = Expert.from_pretrained(expert.save_pretrained(tmp_path / "fused"))
    assert equal(again, expert)
    torch.testing.assert_close(logits(again.put_into(mixtral(), "moe")), logits(model), rtol=1e-4, atol=1e-5)
    doubled = expert.with_offsets({name: 2 * offset for name, offset in expert.offsets.items()})
    assert torch.equal(
        doubled.put_into(mixtral(), "x")
        .get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
        .svf_offset["x"]
        .weight,
        2 * expert.offsets["model.layers.1.self_attn.q_proj"],
    )
    with pytest.raises(ExpertError, match=r"adapts fused parameters .* cannot be described without the model"):
        expert.with_offsets({name: offset[..., :4] for name, offset in expert.offsets.items()})


@pytest.mark.parametrize("change", ["fewer modules", "shorter", "longer", "both"])
def test_other_modules_and_lengths_load_in_peft(tiny_llama, tmp_path, change):
    model = trained(tiny_llama(), rank=4, rank_pattern={"q_proj": 6})
    expert = Expert.from_model(model)
    kept = {
        name: offset for name, offset in expert.offsets.items() if "mlp" in name or change in ("shorter", "longer")
    }
    length = {"shorter": 2, "longer": 32, "both": 3}.get(change)
    made = {
        name: offset if length is None else torch.nn.functional.pad(offset, (0, length - len(offset)))
        for name, offset in kept.items()
    }
    if change == "longer":  # up to all that a weight has
        made = {name: offset[: int(min(expert.fingerprint[name][:2]))] for name, offset in made.items()}
    changed = expert.with_offsets(made)
    loaded = PeftModel.from_pretrained(tiny_llama(), changed.save_pretrained(tmp_path / "changed"))
    assert equal(Expert.from_model(loaded), changed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "svf_offset" in name:
                module = name.removeprefix("base_model.model.").removesuffix(".svf_offset.default.weight")
                parameter[len(made.get(module, ())) :] = 0
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert expert.config.rank == 4 and len(expert.offsets) == 14  # it is as it was


def test_saved_bases_go_along_only_where_they_suffice(tiny_llama, tmp_path):
    expert = Expert.from_model(trained(tiny_llama(), save_basis=True, rank=4))
    shorter = expert.with_offsets({name: offset[:3] for name, offset in expert.offsets.items()})
    assert shorter.config.save_basis and any("saved_basis" in key for key in shorter.others)
    longer = expert.with_offsets({name: torch.ones(5) for name in expert.offsets})
    assert not longer.config.save_basis and not longer.others
    for one in (shorter, longer):
        model = PeftModel.from_pretrained(tiny_llama(), one.save_pretrained(tmp_path / str(one is longer)))
        assert all(torch.equal(one.offsets[name], o) for name, o in Expert.from_model(model).offsets.items())


def test_offsets_that_cannot_be_are_refused(tiny_llama):
    expert = Expert.from_model(trained(tiny_llama()))
    name = next(iter(expert.offsets))
    with pytest.raises(ExpertError, match=f"new offsets of '{re.escape(name)}' are not finite"):
        expert.with_offsets({**expert.offsets, name: torch.full((3,), torch.inf)})
    with pytest.raises(ExpertError, match="at least one module"):
        expert.with_offsets({})


def everything(model: Any) -> tuple[Any, ...]:
    flags = [(name, p.requires_grad) for name, p in model.named_parameters()]
    return [name for name, _ in model.named_modules()], flags, getattr(model, "peft_config", None)


@pytest.mark.parametrize("kind", ["plain", "adapted"])
def test_another_base_is_refused_and_the_model_is_as_it_was(tiny_llama, kind):
    expert = Expert.from_model(trained(tiny_llama(seed=1)))
    model: Any = tiny_llama(seed=2) if kind == "plain" else trained(tiny_llama(seed=2))
    before, expected = copy.deepcopy(everything(model)), logits(model)
    with pytest.raises(ExpertError, match=r"adapter 'default' cannot be loaded: .*belongs to another base model"):
        expert.put_into(model, "guest")
    assert everything(model)[:2] == before[:2] and torch.equal(logits(model), expected)
    if kind == "adapted":
        assert list(model.peft_config) == ["default"]
        with pytest.raises(ExpertError, match="has an adapter 'default' already"):
            expert.put_into(model, "default")


def test_what_is_no_expert_is_refused(tiny_llama, tmp_path):
    model = trained(tiny_llama())
    with pytest.raises(ExpertError, match="no SVF adapter 'typo'; it has 'default'"):
        Expert.from_model(model, "typo")
    with pytest.raises(ExpertError, match="no SVF adapter 'default'; it has none"):
        Expert.from_model(tiny_llama())
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "layers.1.mlp.up_proj.svf_offset" in n)[2] = torch.nan
    with pytest.raises(ExpertError, match=r"'model\.layers\.1\.mlp\.up_proj' are not finite"):
        Expert.from_model(model)
    with pytest.raises(ExpertError, match="nowhere"):
        Expert.from_pretrained(tmp_path / "nowhere")


def test_saving_replaces_an_expert_and_refuses_everything_else(tiny_llama, tmp_path):
    expert = Expert.from_model(trained(tiny_llama()), metadata={"name": "first", "results": [{"n": 3}]})
    folder = expert.save_pretrained(tmp_path / "expert")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "expert.json",
    ]
    assert Expert.from_pretrained(folder).metadata == expert.metadata
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    (folder / "README.md").write_text("a card")
    expert.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files  # the same in every process
    with pytest.raises(ExpertError, match="must be JSON, without NaN"):
        expert.with_offsets(expert.offsets, {"loss": float("nan")}).save_pretrained(folder)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(ExpertError, match=r"holds thesis\.txt, not only an expert; choose a new folder"):
        expert.save_pretrained(folder)
    assert (folder / "thesis.txt").read_text() == "years of work"
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in files} == files
    with pytest.raises(ExpertError, match="holds a file"):
        expert.save_pretrained(folder / "expert.json")
    assert [path.name for path in tmp_path.iterdir()] == ["expert"]


def test_modules_saved_in_full_are_kept_and_algebra_is_told(tiny_llama, tmp_path):
    model = trained(tiny_llama(), modules_to_save=["lm_head"])
    head = "base_model.model.lm_head.modules_to_save.default.weight"
    with torch.no_grad():
        model.get_parameter(head).add_(1)
    expert = Expert.from_model(model)
    assert list(expert.others) == ["base_model.model.lm_head.weight"]
    again = Expert.from_pretrained(expert.save_pretrained(tmp_path / "whole")).put_into(tiny_llama(), "default")
    assert torch.equal(again.get_parameter(head), model.get_parameter(head))
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ExpertError, match=r"more than offsets \(base_model\.model\.lm_head\.weight\), and a mixture"):
        expert.check_only_offsets("a mixture")


def test_an_expert_in_the_folder_of_a_bank_knows_where_its_base_is():
    expert = Expert.from_pretrained(BANK_FOLDER / "math")
    assert expert.base_model == str((BANK_FOLDER / "base").absolute())
    stored = load_file(BANK_FOLDER / "math" / "adapter_model.safetensors")
    assert sum(offset.numel() for offset in expert.offsets.values()) == sum(t.numel() for t in stored.values()) == 3072
    assert re.fullmatch("[0-9a-f]{12}", str(expert.fingerprint_id))
    assert expert.fingerprint_id == Expert.from_pretrained(BANK_FOLDER / "code").fingerprint_id


@pytest.mark.parametrize("how", ["wrapped", "injected"])
def test_models_that_wrap_or_inject_the_adapter_give_the_same_expert(tiny_llama, how):
    from peft import inject_adapter_in_model

    model = trained(tiny_llama(), modules_to_save=["lm_head"])
    expected = Expert.from_model(model)
    if how == "wrapped":
        wrapped: Any = torch.compile(model, backend="eager")
    else:
        torch.manual_seed(0)
        wrapped = inject_adapter_in_model(SVFConfig(init_weights=False, modules_to_save=["lm_head"]), tiny_llama())
    assert equal(Expert.from_model(wrapped), expected)


def test_offsets_that_are_not_finite_cannot_hide_behind_another_tensor_of_their_name(tmp_path) -> None:
    Expert.from_pretrained(BANK_FOLDER / "math").save_pretrained(tmp_path / "math")
    path = tmp_path / "math" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(iter(tensors))
    name = key.removeprefix("base_model.model.").removesuffix(".svf_offset.weight")
    save_file({**tensors, key: torch.full_like(tensors[key], torch.nan), name: torch.zeros(1)}, path)
    with pytest.raises(ExpertError, match=f"'{re.escape(name)}' has values that are not finite"):
        Expert.from_pretrained(tmp_path / "math")


def test_experts_are_compared_as_objects_and_shown_in_a_line() -> None:
    one, other = (Expert.from_pretrained(BANK_FOLDER / "math") for _ in range(2))
    assert one == one and one != other and len({one, other}) == 2
    assert re.fullmatch(r"Expert\(.*math.*: [\d,]+ offsets of \d+ modules of .*\)", repr(one))


def test_an_expert_is_saved_to_where_a_link_leads(tmp_path) -> None:
    expert = Expert.from_pretrained(BANK_FOLDER / "math")
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    expert.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and equal(Expert.from_pretrained(tmp_path / "disk"), expert)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
