"""What strangers may push: each hostile expert and bank gets an error that names the fault, and nothing is loaded."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
import torch
from hub_playground import BANK, EXPERTS, MATH, adapter, config
from huggingface_hub import constants
from safetensors.torch import save

from peft_svf import Transformer2Pipeline
from peft_svf.experts import Expert, ExpertBank, ExpertError, HubError, adapter_files, download
from peft_svf.hub import pull


ENDING = ".svf_offset.weight"
DOWN_PROJ = f"base_model.model.model.layers.0.mlp.down_proj{ENDING}"


def cached_files() -> list[Path]:
    return [path for path in Path(constants.HF_HUB_CACHE).rglob("*") if "snapshots" in path.parts]


def tensors_of(key: str, tensor: torch.Tensor) -> dict[str, bytes]:
    return {"adapter_model.safetensors": save({key: tensor})}


def file_of(header: str, content: bytes = b"", size: int | None = None) -> dict[str, bytes]:
    """A safetensors file as its header says it is, or not."""
    return {
        "adapter_model.safetensors": struct.pack("<Q", len(header) if size is None else size)
        + header.encode()
        + content
    }


def entry(key: str = DOWN_PROJ, shape: str = "[8]", end: int = 32) -> str:
    return f'"{key}": {{"dtype": "F32", "shape": {shape}, "data_offsets": [0, {end}]}}'


HOSTILE: dict[str, tuple[dict[str, bytes | None], str]] = {
    "pickles only": (
        {"adapter_model.safetensors": None, "adapter_model.bin": b"evil"},
        "adapter_model.bin and no .* never read",
    ),
    "no adapter": ({"adapter_config.json": None}, "no adapter_config.json"),
    "more offsets than singular values": (
        tensors_of(DOWN_PROJ, torch.zeros(129)),
        "'model.layers.0.mlp.down_proj' has 129 offsets",
    ),
    "a shape of three": (tensors_of(DOWN_PROJ, torch.zeros(1, 2, 3)), r"down_proj' have the shape \[1, 2, 3\]"),
    "a scalar": (tensors_of(DOWN_PROJ, torch.zeros(())), r"down_proj' have the shape \[\]"),
    "NaN": (tensors_of(DOWN_PROJ, torch.full((8,), float("nan"))), "down_proj' has values that are not finite"),
    "overflow": (
        tensors_of(DOWN_PROJ, torch.full((8,), 1e300, dtype=torch.float64)),
        "down_proj' has values that are not",
    ),
    "NaN in another tensor": (
        {"adapter_model.safetensors": save({DOWN_PROJ: torch.zeros(8), "x": torch.full((1,), float("inf"))})},
        "'x' has values that",
    ),
    "integers": (tensors_of(DOWN_PROJ, torch.zeros(8, dtype=torch.int64)), "down_proj' holds torch.int64"),
    "eight bits": (tensors_of(DOWN_PROJ, torch.zeros(8).to(torch.float8_e4m3fn)), "down_proj' holds torch.float8"),
    "a key that is a path": (tensors_of(f"base_model.model.../../x{ENDING}", torch.zeros(8)), "no name of a module"),
    "a key for the terminal": (
        tensors_of(f"base_model.model.\x1b[2J{ENDING}", torch.zeros(8)),
        r"offsets for '\\x1b\[2J'",
    ),
    "no offsets": (tensors_of("weight", torch.zeros(8)), "no offsets"),
    "a header that ends behind the file": (
        file_of("{" + entry(end=10**9) + "}", bytes(32)),
        "adapter_model.safetensors is damaged",
    ),
    "a header of 2^60 bytes": (file_of("{}", size=2**60), "adapter_model.safetensors is damaged"),
    "a header longer than the file": (
        file_of("{" + entry() + "}", size=10**6),
        "adapter_model.safetensors is damaged",
    ),
    "tensors that overlap": (
        file_of("{" + entry() + "," + entry("x") + "}", bytes(32)),
        "adapter_model.safetensors is damaged",
    ),
    "a tensor of 2^80": (
        file_of("{" + entry(shape=f"[{2**40}, {2**40}]") + "}", bytes(32)),
        "adapter_model.safetensors is damaged",
    ),
    "a key that is there twice": (file_of("{" + entry() + "," + entry() + "}", bytes(32)), "is there twice"),
    "a web page": ({"adapter_model.safetensors": b"<html></html>"}, "adapter_model.safetensors is damaged"),
    "another method": ({"adapter_config.json": adapter(peft_type="LORA")}, "is of type LORA"),
    "two methods": (
        {"adapter_config.json": b'{"peft_type": "LORA", "peft_type": "SVF"}'},
        "'peft_type' is there twice",
    ),
    "a list": ({"adapter_config.json": b"[]"}, "adapter_config.json holds no JSON object"),
    "deep JSON": ({"adapter_config.json": b"[" * 30_000}, "adapter_config.json is damaged"),
    "huge JSON": ({"adapter_config.json": adapter(layers_pattern="x" * 50_000)}, "adapter_config.json is larger than"),
    "a damaged fingerprint": (
        {"adapter_config.json": adapter(base_fingerprint={"x": [1]})},
        "the fingerprint of its base model is damaged",
    ),
    "a fingerprint beyond numbers": (
        {"adapter_config.json": adapter(base_fingerprint={"x": [10**400] * 7})},
        "fingerprint .* is damaged",
    ),
    "a base model that is a list": (
        {"adapter_config.json": adapter(base_model_name_or_path=["x"])},
        "base_model_name_or_path must be",
    ),
    "modules that are a number": ({"adapter_config.json": adapter(target_modules=5)}, "target_modules must be"),
    "deep facts": (
        {"expert.json": b'{"a": ' * 400 + b"1" + b"}" * 400},
        "expert.json is damaged .*more than 200 deep",
    ),
    "facts that are not finite": ({"expert.json": b'{"score": 1e999}'}, "expert.json is damaged"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_expert_is_refused(hub, monkeypatch, kind):
    changes, message = HOSTILE[kind]
    monkeypatch.setattr(adapter_files, "LARGEST_CONFIG", 40_000)
    hub.put("user/math", MATH)
    hub.put("user/math", changes)
    with pytest.raises(ExpertError, match=message) as caught:
        Expert.from_pretrained("user/math")
    assert "user/math" in str(caught.value)


@pytest.mark.parametrize(
    "kind", ["pickles only", "NaN", "more offsets than singular values", "a key that is there twice"]
)
def test_a_hostile_expert_does_not_get_into_a_bank(hub, kind):
    changes, message = HOSTILE[kind]
    hub.put("user/bank", BANK)
    hub.put("user/bank", {f"code/{path}": content for path, content in changes.items()})
    with pytest.raises(ExpertError, match=message) as caught:
        ExpertBank.from_pretrained("user/bank")
    assert "code" in str(caught.value)


@pytest.mark.parametrize(
    "path", ["../../adapter_config.json", "/etc/x", "a\\..\\x.json", "C:x.json", "math/../../../x", "a\nb"]
)
def test_paths_that_lead_out_of_the_repository_are_refused_before_anything_is_fetched(hub, path):
    hub.put("user/math", MATH | {path: b"evil"})
    with pytest.raises(HubError, match="outside of its folder"):
        Expert.from_pretrained("user/math")
    assert not hub.asked("resolve") and not cached_files()


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (
            "LARGEST_WEIGHTS",
            r"adapter_model.safetensors has [\d,]+ bytes, more than an expert needs .*hf download user/math",
        ),
        ("LARGEST_OTHER", r"README.md has [\d,]+ bytes, more than"),
        ("LARGEST_TOTAL", r"user/math at \w{7} has [\d,]+ bytes, more than an expert needs"),
        ("MOST_FILES", "has 4 files to download, more than"),
    ],
)
def test_what_is_larger_than_an_expert_is_refused_before_anything_is_fetched(hub, monkeypatch, limit, message):
    hub.put("user/math", MATH | {"README.md": bytes(9000)})
    size = {"MOST_FILES": 2, "LARGEST_OTHER": 8999}.get(limit, 15_000)
    monkeypatch.setattr(download, limit, size)
    with pytest.raises(HubError, match=message):
        Expert.from_pretrained("user/math")
    assert not hub.asked("resolve")


def test_the_base_model_in_a_bank_may_be_larger(hub, monkeypatch):
    monkeypatch.setattr(download, "LARGEST_WEIGHTS", 100_000)
    hub.put("user/bank", BANK)
    assert len(BANK["base/model.safetensors"]) > 100_000
    assert len(ExpertBank.from_pretrained("user/bank")) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": "/etc"}, "'/etc', a folder of the computer"),
        ({"base_model_name_or_path": "../../etc"}, r"base_model_name_or_path '../../etc' is neither"),
        ({"base_model_name_or_path": "..\\etc"}, "is neither a Hub id"),
        ({"base_model_name_or_path": "./math"}, "a folder of the computer"),
        ({"experts": {"../math": {"label": "math"}}}, "'../math' cannot name an expert"),
        ({"experts": {"/etc": {"label": "math"}}}, "'/etc' cannot name an expert"),
        ({"classifier": "../math"}, "'../math' cannot name an expert"),
        (
            {"base_model_name_or_path": "org/missing"},
            "Cannot load the base model of the bank .* from org/missing: there",
        ),
    ],
)
def test_a_hostile_bank_is_refused(hub, changes, message):
    hub.put("user/bank", EXPERTS | {"config.json": config(**changes)})
    with pytest.raises(ExpertError, match=message):
        ExpertBank.from_pretrained("user/bank")


def test_a_bank_without_the_base_that_it_says_it_has_is_incomplete(hub):
    hub.put("user/bank", EXPERTS | {"config.json": config()})
    with pytest.raises(ExpertError, match="cannot load its base model 'base'"):
        ExpertBank.from_pretrained("user/bank")


def test_links_out_of_the_cache_are_not_followed(hub, tmp_path):
    hub.put("user/math", MATH)
    Expert.from_pretrained("user/math")
    (found,) = [path for path in cached_files() if path.name == "adapter_model.safetensors"]
    target = tmp_path / "elsewhere"
    target.write_bytes(found.read_bytes())
    found.unlink()
    found.symlink_to(target)
    with pytest.raises(HubError, match="leads out of it"):
        Expert.from_pretrained("user/math")


def test_a_base_on_somebodys_computer_is_forgotten(hub):
    for name, kept in (
        ("/home/me/base", None),
        ("../base", None),
        ("base", None),
        ("org/base", "org/base"),
        ("gpt2", "gpt2"),
    ):
        hub.put("user/math", MATH | {"adapter_config.json": adapter(base_model_name_or_path=name)})
        assert Expert.from_pretrained("user/math").base_model == kept
        if kept is None:
            with pytest.raises(ExpertError, match=re.escape(f"cannot load its base model '{name}'")):
                Transformer2Pipeline("user/math")


def test_a_bank_cannot_choose_a_folder_of_whoever_pulls_it(hub, tmp_path):
    hub.put("user/bank", BANK | {"config.json": config(base_model_name_or_path=str(tmp_path))})
    with pytest.raises(ExpertError, match="a folder of the computer that it was made on"):
        pull("user/bank", tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


@pytest.mark.parametrize("revision", ["/etc/hostname", "../../../secret"])
def test_a_revision_cannot_be_a_path(hub, offline, revision):
    (Path(constants.HF_HUB_CACHE).parent / "secret").parent.mkdir(parents=True, exist_ok=True)
    (Path(constants.HF_HUB_CACHE).parent / "secret").write_text("secret")
    offline()
    with pytest.raises(HubError, match="is no branch, tag or commit"):
        download.resolve("user/base", revision, None, "the base model")


@pytest.mark.parametrize("architectures", [[[]], [{}]])
def test_architectures_that_are_no_texts_are_refused(tmp_path, architectures):
    (tmp_path / "config.json").write_bytes(config(architectures=architectures))
    with pytest.raises(ExpertError, match="architectures must be one of"):
        ExpertBank.from_pretrained(tmp_path)
