"""Experts and banks from the Hub: one commit, only what is needed, from the cache without one; what is hostile is refused."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save
from transformers import pipeline

from peft_svf import Transformer2Pipeline
from peft_svf.experts import Expert, ExpertBank, ExpertError, HubError, adapter_files, download
from peft_svf.playground import BANK_FOLDER


ENDING = ".svf_offset.weight"
DOWN_PROJ = f"base_model.model.model.layers.0.mlp.down_proj{ENDING}"
QUESTION = "Tom has 23 apples and buys 18 more. How many apples does Tom have?"


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


BANK = content_of(BANK_FOLDER)
BASE = {path.removeprefix("base/"): content for path, content in BANK.items() if path.startswith("base/")}
EXPERTS = {path: content for path, content in BANK.items() if path.split("/")[0] in ("math", "code", "reasoning")}
MATH = {path.removeprefix("math/"): content for path, content in BANK.items() if path.startswith("math/")}
CONFIG, ADAPTER = json.loads(BANK["config.json"]), json.loads(MATH["adapter_config.json"])


def config(**changes: Any) -> bytes:
    return json.dumps(CONFIG | changes).encode()


def adapter(**changes: Any) -> bytes:
    return json.dumps(ADAPTER | changes).encode()


def scaled(factor: float) -> dict[str, bytes]:
    """The expert with other offsets."""
    tensors = load_file(BANK_FOLDER / "math" / "adapter_model.safetensors")
    return {"adapter_model.safetensors": save({key: factor * value for key, value in tensors.items()})}


@pytest.fixture
def never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a test fail in which a request is tried again."""

    def wait(seconds: float) -> None:
        if seconds >= 0.5:  # of the client; a server's threads wait for moments
            raise AssertionError(f"waits {seconds} s for a Hub that is not there")

    monkeypatch.setattr("time.sleep", wait)


@pytest.fixture
def stopped(hub) -> Any:
    """`stopped()`: the Hub cannot be reached until the test ends."""
    yield hub.stop
    hub.start()


def test_an_expert_by_id_branch_tag_and_commit(hub):
    first = hub.put("user/math", MATH)
    HfApi().create_tag("user/math", tag="v1")
    hub.put("user/math", scaled(2.0))
    hub.put("user/math", scaled(3.0), branch="try/three")
    true = Expert.from_pretrained(BANK_FOLDER / "math").offsets
    for revision, factor in ((None, 2.0), ("main", 2.0), ("v1", 1.0), ("try/three", 3.0), (first, 1.0)):
        offsets = Expert.from_pretrained("user/math", revision=revision).offsets
        assert offsets.keys() == true.keys()
        assert all(torch.equal(offsets[name], factor * true[name]) for name in true)


def test_everything_comes_from_the_commit_that_main_was(hub):
    commit = hub.put("user/math", MATH)
    Expert.from_pretrained("user/math")
    named_main, rest = hub.requests[0], hub.requests[1:]
    assert "/revision/main" in named_main.path
    assert rest and all(commit in request.path for request in rest)


def test_a_commit_in_the_cache_needs_no_request(hub):
    commit = hub.put("user/math", MATH)
    Expert.from_pretrained("user/math")
    hub.requests.clear()
    Expert.from_pretrained("user/math", revision=commit)
    assert hub.asked() == []


def test_half_a_commit_in_the_cache_is_completed(hub):
    commit = hub.put("user/math", MATH)
    first = download.download("user/math", None, None, ["adapter_config.json"], "an expert")
    assert first.commit == commit and not (first.folder / "adapter_model.safetensors").exists()
    assert Expert.from_pretrained("user/math", revision=commit).offsets


def test_only_what_an_expert_or_bank_needs_is_downloaded(hub):
    junk = {"training_args.bin": b"1", "modeling.py": b"1", "levers.png": b"1", "checkpoint-1/optimizer.pt": b"1"}
    hub.put("user/bank", BANK | junk | {"model.safetensors": b"1", "math/evil.bin": b"1", "base/evil.bin": b"1"})
    ExpertBank.from_pretrained("user/bank")
    fetched = {
        request.path.split("/resolve/")[1].split("/", 1)[1] for request in hub.requests if "/resolve/" in request.path
    }
    assert fetched == set(BANK)
    hub.requests.clear()
    hub.put("user/math", MATH | junk)
    Expert.from_pretrained("user/math")
    assert not any(file in path for file in junk for path in hub.asked())


def test_without_the_hub_the_cache_answers_at_once(hub, stopped, never_waits):
    commit = hub.put("user/math", MATH)
    true = Expert.from_pretrained("user/math").offsets
    stopped()
    for revision in (None, "main", commit):
        assert all(
            torch.equal(a, true[name])
            for name, a in Expert.from_pretrained("user/math", revision=revision).offsets.items()
        )
    for wanted in (("user/math", "v1"), ("user/other", None), ("user/other", "0" * 40)):
        with pytest.raises(HubError, match=rf"cannot be reached .* does not have {wanted[0]}"):
            Expert.from_pretrained(wanted[0], revision=wanted[1])
    with pytest.raises(HubError, match="cannot be reached"):
        Transformer2Pipeline("user/other")


def test_a_fault_of_the_hub_is_no_reason_not_to_use_the_cache(hub):
    hub.put("user/math", MATH)
    Expert.from_pretrained("user/math")
    hub.fail("GET", status=503, times=2)
    assert Expert.from_pretrained("user/math").offsets
    with pytest.raises(HubError, match="503"):
        Expert.from_pretrained("user/other")


def test_offline_says_so(hub, offline):
    hub.put("user/math", MATH)
    Expert.from_pretrained("user/math")
    offline()
    assert Expert.from_pretrained("user/math").offsets
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set, and the cache .* does not have user/other at 'main'"):
        Expert.from_pretrained("user/other")


def test_offline_a_branch_is_the_last_commit_that_was_complete(hub, offline):
    hub.put("user/math", MATH)
    Expert.from_pretrained("user/math")
    hub.put("user/math", scaled(2.0))
    hub.fail("GET .*adapter_model.safetensors", status=403, times=9)
    with pytest.raises(HubError):
        Expert.from_pretrained("user/math")
    offline()
    true = Expert.from_pretrained(BANK_FOLDER / "math").offsets
    assert all(torch.equal(true[name], a) for name, a in Expert.from_pretrained("user/math").offsets.items())


@pytest.mark.parametrize(
    ("repository", "options", "message"),
    [
        (
            "user/missing",
            {},
            r"an expert from user/missing: there is no such folder .*HF_TOKEN, or log in with `hf auth",
        ),
        ("user/secret", {"token": "stranger"}, "user/secret: there is no such folder here, and the Hub .*private"),
        ("user/gated", {"token": "stranger"}, r"gated\. Accept its terms at http://127.*/user/gated"),
        ("user/math", {"token": "wrong"}, "the Hub does not know the token"),
        ("user/math", {"revision": "v9"}, "it has no branch, tag or commit 'v9'"),
        ("user/math", {"revision": "f" * 40}, "it has no branch, tag or commit 'ffff"),
    ],
)
def test_what_the_hub_refuses_says_why_and_what_to_do(hub, never_waits, repository, options, message):
    hub.put("user/math", MATH)
    hub.put("user/secret", MATH, private=True)
    hub.put("user/gated", MATH, gated=True)
    with pytest.raises(HubError, match=message):
        Expert.from_pretrained(repository, **options)
    if repository != "user/gated":  # its list of files is public, and is no bank's
        with pytest.raises(HubError, match=message.replace("an expert from", "a bank from")):
            ExpertBank.from_pretrained(repository, **options)
    if repository != "user/missing":
        assert Expert.from_pretrained(repository).offsets


@pytest.mark.parametrize(
    "name", ["../math", "user/../math", "/nowhere/math", "user/a--b", "C:\\math", "user/math/x", ""]
)
def test_what_is_no_repository_is_not_asked_for(hub, name):
    for load in (Expert.from_pretrained, ExpertBank.from_pretrained, Transformer2Pipeline):
        if name:
            with pytest.raises(ExpertError, match=r"no Hub id|There is no"):
                load(name)
    assert hub.asked() == []


def test_an_interrupted_download_leaves_nothing_half_written(hub, monkeypatch):
    hub.put("user/math", MATH)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fail("GET .*adapter_model.safetensors", cut=1000, times=30)
    with pytest.raises(HubError, match=r"The download of user/math broke off .*Try again"):
        Expert.from_pretrained("user/math")
    assert not [path for path in cached_files() if path.name == "adapter_model.safetensors"]
    hub.faults.clear()
    true = Expert.from_pretrained(BANK_FOLDER / "math").offsets
    found = Expert.from_pretrained("user/math").offsets
    assert all(torch.equal(found[name], true[name]) for name in true)


def cached_files() -> list[Path]:
    from huggingface_hub import constants

    return [path for path in Path(constants.HF_HUB_CACHE).rglob("*") if "snapshots" in path.parts]


def test_a_bank_remembers_its_commit_and_pins_its_base(hub, tmp_path, never_waits, stopped):
    base = hub.put("org/base", BASE)
    commit = hub.put("user/bank", EXPERTS | {"config.json": config(base_model_name_or_path="org/base")})
    bank = ExpertBank.from_pretrained("user/bank")
    assert (bank.commit, bank.base_revision) == (commit, base)
    bank.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (saved["base_model_name_or_path"], saved["base_revision"]) == ("org/base", base)
    stopped()
    again = ExpertBank.from_pretrained("user/bank")
    assert (again.commit, again.base_revision) == (commit, base)


def test_a_bank_with_its_base_inside(hub):
    commit = hub.put("user/bank", BANK)
    bank = ExpertBank.from_pretrained("user/bank")
    assert (bank.commit, bank.base_revision) == (commit, None)
    assert ExpertBank.from_pretrained(BANK_FOLDER).commit is None
    hub.put("user/math", scaled(2.0) | {"adapter_config.json": MATH["adapter_config.json"]}, branch="v2")
    bank.add("more", "user/math", revision="v2")
    true = bank.expert("math").offsets
    for name, offset in bank.expert("more").offsets.items():
        torch.testing.assert_close(offset, 2 * true[name])
    with pytest.raises(HubError, match="no branch"):
        bank.add("most", "user/math", revision="v3")
    assert "most" not in bank


def test_the_revision_that_transformers_resolved_is_the_banks(hub):
    commit = hub.put("user/bank", BANK)
    HfApi().create_tag("user/bank", tag="v1")
    newer = hub.put("user/bank", {"math/adapter_model.safetensors": scaled(0.0)["adapter_model.safetensors"]})
    pinned = pipeline("transformer2-generation", model="user/bank", revision="v1", dispatcher="math")
    assert pinned.bank.commit == commit
    newest = Transformer2Pipeline("user/bank", dispatcher="math")
    assert newest.bank.commit == newer
    true = Transformer2Pipeline(str(BANK_FOLDER))
    asked = {"expert": "math", "max_new_tokens": 24}
    right = true(QUESTION, **asked)
    assert pinned(QUESTION, **asked) == right
    assert (
        newest(QUESTION, **asked)[0]["generated_text"]
        == true(QUESTION, expert="others", max_new_tokens=24)[0]["generated_text"]
    )


def test_one_expert_answers_on_the_revision_of_the_base_that_it_names(hub):
    base = hub.put("org/base", BASE)
    hub.put("org/base", {"config.json": b"{}"})  # a newest commit that cannot be loaded
    hub.put("user/math", MATH | {"adapter_config.json": adapter(base_model_name_or_path="org/base", revision=base)})
    answer = Transformer2Pipeline("user/math")(QUESTION, max_new_tokens=24)
    right = Transformer2Pipeline(str(BANK_FOLDER))(QUESTION, expert="math", max_new_tokens=24)
    assert answer[0]["generated_text"] == right[0]["generated_text"]


def test_an_expert_in_the_folder_of_a_bank(hub):
    hub.put("user/bank", BANK)
    expert = Expert.from_pretrained("user/bank", subfolder="math")
    assert torch.equal(
        *(
            e.offsets["model.layers.0.mlp.down_proj"]
            for e in (expert, Expert.from_pretrained(BANK_FOLDER, subfolder="math"))
        )
    )
    assert not hub.asked("code|base/") and expert.base_model is None
    with pytest.raises(ExpertError, match="user/bank is no expert.* subfolder='code' or 'math' or 'reasoning'"):
        Expert.from_pretrained("user/bank")
    with pytest.raises(ExpertError, match="user/bank/other is no expert"):
        Expert.from_pretrained("user/bank", subfolder="other")
    for subfolder in ("../math", "/math"):
        with pytest.raises(ExpertError, match="leads out of"):
            Expert.from_pretrained("user/bank", subfolder=subfolder)
    hub.put("user/math", MATH)
    with pytest.raises(ExpertError, match=r"user/math is not a bank.* It is an expert"):
        ExpertBank.from_pretrained("user/math")


def test_a_second_process_works_offline(hub, in_process):
    hub.put("org/base", BASE)
    hub.put("user/bank", EXPERTS | {"config.json": config(base_model_name_or_path="org/base")})
    commit = hub.put("user/math", MATH)
    HfApi().create_tag("user/math", tag="v1")
    expert = Expert.from_pretrained("user/math", revision="v1")
    ExpertBank.from_pretrained("user/bank")
    hub.requests.clear()
    done = in_process(
        f"""
import peft_svf
from peft_svf.experts import Expert, ExpertBank, HubError
from transformers import pipeline
for revision in ("v1", "{commit}"):
    total = sum(o.sum().item() for o in Expert.from_pretrained("user/math", revision=revision).offsets.values())
bank = ExpertBank.from_pretrained("user/bank")
bank.add("more", "user/math", revision="v1")
pipe = pipeline("transformer2-generation", model="user/bank")
answer = pipe({QUESTION!r}, expert="math", max_new_tokens=16)[0]["generated_text"]
try:
    Expert.from_pretrained("user/other")
except HubError as error:
    print(repr((total, bank.base_revision, list(bank.experts), answer, str(error))))
""",
        offline=True,
    )
    assert done.returncode == 0, done.stderr
    total, revision, experts, answer, error = eval(done.stdout.strip().splitlines()[-1])
    assert total == sum(o.sum().item() for o in expert.offsets.values())
    assert revision == hub.commits("org/base")[0].sha and experts == ["math", "code", "reasoning", "more"]
    assert (
        answer
        == Transformer2Pipeline(str(BANK_FOLDER))(QUESTION, expert="math", max_new_tokens=16)[0]["generated_text"]
    )
    assert "HF_HUB_OFFLINE is set" in error and hub.asked() == []


# ---------------------------------------------------------------- what strangers may push


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
