"""Experts and banks from the Hub: one commit, only what is needed, and from the cache where there is no Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_playground import BANK, BASE, EXPERTS, MATH, adapter, config
from huggingface_hub import HfApi
from safetensors.torch import load_file, save
from transformers import pipeline

from peft_svf import Transformer2Pipeline
from peft_svf.experts import Expert, ExpertBank, ExpertError, HubError, download
from peft_svf.hub import pull
from peft_svf.playground import BANK_FOLDER


QUESTION = "Tom has 23 apples and buys 18 more. How many apples does Tom have?"


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
    resolved = [request.path.split("/resolve/")[1] for request in hub.requests if "/resolve/" in request.path]
    fetched = {path.split("/", 1)[1] for path in resolved}
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


@pytest.mark.parametrize("name", ["https://huggingface.co/user/math", "./math", "user/a b"])
def test_pulling_what_is_no_id_says_what_an_id_is(hub, name):
    with pytest.raises(HubError, match="that is no id on the Hub, which is USER/NAME"):
        pull(name)
    assert hub.asked() == []


def test_a_model_that_is_no_bank_is_called_by_its_id(hub):
    hub.put("user/base", {"config.json": b'{"model_type": "llama"}'})
    for load in (ExpertBank.from_pretrained, Transformer2Pipeline):
        with pytest.raises(ExpertError, match=r"^user/base is not a bank: config\.json does not say"):
            load("user/base")


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
    with pytest.raises(ExpertError, match=r"user/bank is no expert.* subfolder='code' or 'math' or 'reasoning'"):
        Expert.from_pretrained("user/bank")
    with pytest.raises(ExpertError, match="user/bank/other is no expert"):
        Expert.from_pretrained("user/bank", subfolder="other")
    for subfolder in ("../math", "/math"):
        with pytest.raises(ExpertError, match="leads out of"):
            Expert.from_pretrained("user/bank", subfolder=subfolder)
    hub.put("user/math", MATH)
    with pytest.raises(ExpertError, match=r"user/math is not a bank.* It is an expert"):
        ExpertBank.from_pretrained("user/math")


@pytest.mark.slow
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
bank.add("more", "user/math", "more", revision="v1")
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
