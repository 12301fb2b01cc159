"""push_expert: one commit that a stranger can load, nothing of this machine in it, and no half of it ever."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from peft_svf import Expert
from peft_svf.experts import ExpertError, HubError
from peft_svf.hub import push_expert
from peft_svf.hub.base_reference import on_hub
from peft_svf.hub.destination import Destination
from peft_svf.hub.facts import without_local_paths


IDS = torch.arange(3, 23).reshape(2, 10)
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "expert.json", "levers.png"]
PROTOTYPE: list[Expert] = []


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take half a second each; what they show is tested elsewhere."""
    monkeypatch.setattr("peft_svf.plots.plot_levers", lambda expert, path, title=None: path.write_bytes(b"levers"))


@pytest.fixture
def expert(tiny_llama: Callable[..., LlamaForCausalLM], add_experts: Callable[..., PeftModel]) -> Expert:
    """Of a base model that came from no checkpoint."""
    if not PROTOTYPE:
        model = add_experts(tiny_llama(), names=("default",))
        facts = {"name": "adder", "task": "sums", "seeds": [7]}
        PROTOTYPE.append(Expert.from_model(model, metadata=facts))
    return copy.deepcopy(PROTOTYPE[0])


@pytest.fixture
def folder(expert: Expert, tmp_path: Path) -> Path:
    return expert.save_pretrained(tmp_path / "machine" / "expert")


@pytest.fixture
def base(hub: Any, tiny_llama: Callable[..., LlamaForCausalLM], tmp_path: Path) -> str:
    """The commit of "user/base"."""
    tiny_llama().save_pretrained(tmp_path / "machine" / "base")
    return hub.put("user/base", tmp_path / "machine" / "base")


def load_base() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained("user/base")


def written(hub: Any, name: str = "user/expert", file: str = "adapter_config.json") -> dict[str, Any]:
    return json.loads(hub.files(name)[file])


def test_a_stranger_loads_what_was_pushed(hub: Any, expert: Expert, base: str) -> None:
    pushed = push_expert(expert, "user/expert", base_model="user/base")
    assert (pushed.url, pushed.commit) == (f"{hub.url}/user/expert", hub.commits("user/expert")[0].sha)
    assert [commit.title for commit in hub.commits("user/expert")] == [
        "Push an expert with peft-svf",
        "initial commit",
    ]
    found = Expert.from_pretrained("user/expert")
    assert all(torch.equal(found.offsets[name], offset) for name, offset in expert.offsets.items())
    assert (found.base_model, found.base_revision, found.fingerprint) == ("user/base", base, expert.fingerprint)
    assert found.metadata.items() >= {"name": "adder", "task": "sums", "seeds": [7], "repo_id": "user/expert"}.items()
    loaded = PeftModel.from_pretrained(load_base(), "user/expert")
    trained = expert.put_into(load_base(), "default")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, trained(IDS).logits)


def test_config_and_card_say_what_the_hub_needs(hub: Any, expert: Expert, base: str) -> None:
    expert.config.task_type, expert.config.inference_mode = None, False
    push_expert(expert, "user/expert", base_model="user/base", tags=["sums"], facts={"license": "mit"})
    config = written(hub)
    said = ("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping")
    assert [config[name] for name in said] == ["user/base", base, "CAUSAL_LM", True, None]
    assert sorted(hub.files("user/expert")) == FILES
    card = ModelCard(hub.files("user/expert")["README.md"].decode())
    assert card.data.base_model == "user/base"
    assert {"peft", "svf", "transformer2", "sums"} <= set(card.data.tags)
    assert (card.data.license, card.data.library_name) == ("mit", "peft")
    assert "user/expert" in card.text and base[:7] in card.text


def test_expert_folder_and_model_give_the_same_repository_without_a_trace_of_this_machine(
    hub: Any, expert: Expert, folder: Path, base: str, tmp_path: Path
) -> None:
    facts = {**expert.metadata, "task": f"{tmp_path}/machine/data.csv", "hardware": "2 CPU cores"}
    (folder / "checkpoint-1").mkdir()
    (folder / "notes.txt").write_text("mine")
    model = expert.put_into(AutoModelForCausalLM.from_pretrained(tmp_path / "machine" / "base"), "adder")
    pushed = [
        push_expert(source, "user/expert", base_model="user/base", adapter_name="adder", facts=facts)
        for source in (folder, expert, model, str(folder))
    ]
    assert [one.unchanged for one in pushed] == [False, True, True, True]
    assert len({one.commit for one in pushed}) == 1
    assert len(hub.commits("user/expert")) == 2
    assert sorted(hub.files("user/expert")) == FILES
    for path, content in hub.files("user/expert").items():
        assert not [place for place in (tmp_path, Path.home(), "/tmp/") if str(place).encode() in content], path
    assert written(hub, file="expert.json")["task"] == "data.csv"


def test_a_change_is_one_commit_more_and_files_of_the_owner_stay(hub: Any, expert: Expert, base: str) -> None:
    old = {"adapter_model.bin": b"a pickle", "confusion_matrix.png": b"old", ".eval_results/sums.yaml": b"old"}
    mine = {"notes.md": b"mine", "run/adapter_config.json": b"{}", "training_args.bin": b"mine"}
    hub.put("user/expert", {**old, **mine, "adapter_config.json": b"{}"})
    push_expert(expert, "user/expert", base_model="user/base")
    assert sorted(hub.files("user/expert")) == sorted([*FILES, *mine])
    stronger = expert.with_offsets({name: 2 * offset for name, offset in expert.offsets.items()})
    pushed = push_expert(stronger, "user/expert", base_model="user/base", commit_message="twice")
    assert [commit.title for commit in hub.commits("user/expert")[:2]] == ["twice", "Push an expert with peft-svf"]
    found = Expert.from_pretrained("user/expert", revision=pushed.commit)
    assert all(torch.equal(found.offsets[name], 2 * offset) for name, offset in expert.offsets.items())


@pytest.mark.parametrize("kind", ["hub", "cache", "branch"])
def test_the_base_is_found_from_how_it_was_loaded(hub: Any, expert: Expert, base: str, kind: str) -> None:
    hub.put("user/base", {"later.txt": b"the main branch goes on"})
    if kind == "branch":
        hub.repositories["model", "user/base"].branches["v1"] = base
        push_expert(expert, "user/expert", base_model="user/base", base_revision="v1")
    else:
        model = AutoModelForCausalLM.from_pretrained("user/base", revision=base)
        if kind == "cache":
            model = AutoModelForCausalLM.from_pretrained(HfApi().snapshot_download("user/base", revision=base))
        push_expert(expert.put_into(model, "math"), "user/expert", adapter_name="math")
    assert (written(hub)["base_model_name_or_path"], written(hub)["revision"]) == ("user/base", base)


@pytest.mark.parametrize(
    ("recorded", "given", "message"),
    [
        ("{tmp}", None, "the local folder '{tmp}'.*push the base model first"),
        ("base", None, "the local folder 'base'.*push the base model first"),
        (None, None, "is not known.*push the base model first"),
        ("user/gone", None, "'user/gone', and the Hub has none of that name.*push the base model first"),
        ("user/base", "{tmp}", "no Hub id such as 'user/base'"),
    ],
)
def test_a_base_that_is_not_on_the_hub_is_refused_before_anything_is_created(
    hub: Any, expert: Expert, base: str, tmp_path: Path, recorded: str | None, given: str | None, message: str
) -> None:
    expert.config.base_model_name_or_path = recorded and recorded.format(tmp=tmp_path)
    with pytest.raises(HubError, match=message.format(tmp=tmp_path)):
        push_expert(expert, "user/expert", base_model=given and given.format(tmp=tmp_path))
    assert set(hub.repositories) == {("model", "user/base")}
    assert not hub.asked("POST|PUT")


def test_an_unquantized_source_of_bases_is_named_by_its_id_or_refused(
    hub: Any, expert: Expert, base: str, tmp_path: Path
) -> None:
    expert.config.basis_source = str(tmp_path)
    with pytest.raises(HubError, match=f"local folder '{tmp_path}' .basis_source"):
        push_expert(expert, "user/expert", base_model="user/base")
    assert ("model", "user/expert") not in hub.repositories
    expert.config.base_model_name_or_path = str(tmp_path)
    push_expert(expert, "user/expert", base_model="user/base")
    assert written(hub)["basis_source"] == "user/base"


def test_branch_tag_pull_request_and_collection(hub: Any, expert: Expert, base: str) -> None:
    options: dict[str, Any] = {"base_model": "user/base", "branch": "wide", "tag": "v1", "collection": "Sums"}
    first = push_expert(expert, "user/expert", **options)
    repository = hub.repositories["model", "user/expert"]
    assert repository.branches["wide"] == repository.tags["v1"] == first.commit
    assert hub.files("user/expert") == {}  # the main branch
    again = push_expert(expert, "user/expert", **options)
    push_expert(expert, "user/other", base_model="user/base", collection=next(iter(hub.collections)))
    assert again.unchanged and again.commit == first.commit
    (collection,) = hub.collections.values()
    assert [item["id"] for item in collection["items"]] == ["user/expert", "user/other"]
    proposed = push_expert(expert, "user/expert", base_model="user/base", create_pr=True)
    assert proposed.pull_request is not None and proposed.pull_request.endswith("/user/expert/discussions/1")
    assert repository.branches["main"] != proposed.commit and sorted(hub.files("user/expert", "refs/pr/1")) == FILES
    commits = len(repository.commits)
    with pytest.raises(HubError, match="has a tag 'v1' already"):
        push_expert(expert, "user/expert", base_model="user/base", tag="v1")
    with pytest.raises(HubError, match="cannot be tagged before it is merged"):
        push_expert(expert, "user/expert", base_model="user/base", tag="v2", create_pr=True)
    assert len(repository.commits) == commits


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        ("wrong", "user/expert", "does not accept the token.*hf auth login"),
        ("reader", "user/expert", "the token may not do this.*write access"),
        ("stranger", "user/expert", "the token may not do this.*repository of your own"),
        (False, "user/expert", "there is no token.*HF_TOKEN"),
        (None, "user/two/three", "is no Hub id; it is USER/NAME"),
    ],
)
def test_a_refusal_names_the_remedy(
    hub: Any, expert: Expert, base: str, token: Any, repo_id: str, message: str
) -> None:
    with pytest.raises(HubError, match=message):
        push_expert(expert, repo_id, base_model="user/base", base_revision=base, token=token)
    assert set(hub.repositories) == {("model", "user/base")}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"config.json": b"{}", "base/config.json": b"{}"}, "is a bank.*a repository of its own"),
        ({"config.json": b"{}", "modeling_transformer2.py": b""}, "holds experts, and is no base model"),
        ({"adapter_config.json": b"{}"}, "holds experts, and is no base model"),
    ],
    ids=["bank with its base", "bank", "expert"],
)
def test_a_base_model_is_no_bank_and_no_expert(
    hub: Any, expert: Expert, files: dict[str, bytes], message: str
) -> None:
    hub.put("user/experts", files)
    with pytest.raises(HubError, match=f"user/experts {message}"):
        push_expert(expert, "user/expert", base_model="user/experts")
    assert set(hub.repositories) == {("model", "user/experts")}


@pytest.mark.parametrize("name", ["a b", "a..b", "a/", ".a", "a.lock", "-a", ""])
def test_a_name_that_git_does_not_take_is_refused_before_anything_is_sent(
    hub: Any, expert: Expert, base: str, name: str
) -> None:
    for kind in ("branch", "tag"):
        with pytest.raises(HubError, match=f"cannot name a {kind}: use letters"):
            push_expert(expert, "user/expert", base_model="user/base", **{kind: name})  # type: ignore[arg-type]
    assert set(hub.repositories) == {("model", "user/base")}


@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        ("POST .*/commit/", {"drop": "before"}),
        ("POST .*/commit/", {"drop": "after"}),
        ("POST .*/commit/", {"status": 503}),
        ("GET .*/tree/", {"drop": "before"}),
        ("POST .*/preupload/", {"status": 500}),
        ("PUT /_lfs/", {"drop": "before"}),
    ],
)
def test_after_a_fault_the_hub_has_all_or_nothing_and_trying_again_works(
    hub: Any, expert: Expert, base: str, asked: str, fault: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.put("user/expert", {"notes.md": b"mine"})
    hub.fail(asked, times=50, **fault)  # more often than huggingface_hub tries
    if asked == "POST .*/commit/":
        hub.faults[0].times = 1
    if asked == "POST .*/commit/" and fault == {"drop": "after"}:  # the commit is there, its answer is not
        pushed = push_expert(expert, "user/expert", base_model="user/base", base_revision=base)
        assert pushed.commit == hub.commits("user/expert")[0].sha and not pushed.unchanged
    else:
        with pytest.raises(
            HubError, match=r"Cannot push to user/expert: the (Hub|connection) .*nothing is sent twice"
        ):
            push_expert(expert, "user/expert", base_model="user/base", base_revision=base)
        assert hub.files("user/expert") == {"notes.md": b"mine"}
        hub.faults.clear()
        assert not push_expert(expert, "user/expert", base_model="user/base", base_revision=base).unchanged
    assert sorted(hub.files("user/expert")) == sorted([*FILES, "notes.md"])
    assert len(hub.commits("user/expert")) == 3


def test_a_repository_that_was_created_in_vain_is_mentioned(hub: Any, expert: Expert, base: str) -> None:
    hub.fail("POST .*/commit/", status=500)
    with pytest.raises(HubError, match="The repository user/expert was created for this and is empty"):
        push_expert(expert, "user/expert", base_model="user/base")
    assert hub.files("user/expert") == {}
    push_expert(expert, "user/expert", base_model="user/base")
    assert sorted(hub.files("user/expert")) == FILES


def test_a_failure_after_the_commit_says_that_it_is_there(hub: Any, expert: Expert, base: str) -> None:
    hub.fail("POST /api/collections", status=500)
    with pytest.raises(HubError, match=r"collection 'Sums'.*The commit \w{7} is in user/expert; push again"):
        push_expert(expert, "user/expert", base_model="user/base", collection="Sums")
    assert push_expert(expert, "user/expert", base_model="user/base", collection="Sums").unchanged
    assert len(hub.collections) == 1


def test_without_a_network_it_says_so(hub: Any, expert: Expert, base: str, offline: Callable[[], None]) -> None:
    hub.stop()
    try:
        with pytest.raises(HubError, match="the Hub cannot be reached"):
            push_expert(expert, "user/expert", base_model="user/base", base_revision=base)
        offline()
        with pytest.raises(HubError, match="HF_HUB_OFFLINE is set; unset it"):
            push_expert(expert, "user/expert", base_model="user/base", base_revision=base)
    finally:
        hub.start()


def test_private_stays_private_and_nothing_private_becomes_public(hub: Any, expert: Expert, base: str) -> None:
    push_expert(expert, "user/secret", base_model="user/base", private=True)
    push_expert(expert, "user/secret", base_model="user/base", private=False, facts={"label": "sums"})
    assert hub.repositories["model", "user/secret"].private
    push_expert(expert, "user/expert", base_model="user/base")
    with pytest.raises(HubError, match="user/expert is public, and what you push is to be private"):
        push_expert(expert, "user/expert", base_model="user/base", private=True, facts={"label": "secret"})
    assert b"secret" not in b"".join(hub.files("user/expert").values())


@pytest.mark.parametrize(
    ("config", "kind"),
    [({"model_type": "transformer2", "experts": {}}, "a bank"), ({"model_type": "llama"}, "another")],
)
def test_an_expert_does_not_take_the_place_of_something_else(
    hub: Any, expert: Expert, base: str, config: dict[str, Any], kind: str
) -> None:
    hub.put("user/taken", {"config.json": json.dumps(config).encode()})
    with pytest.raises(HubError, match=f"user/taken holds {kind}.*choose another repository"):
        push_expert(expert, "user/taken", base_model="user/base")
    assert list(hub.files("user/taken")) == ["config.json"]


@pytest.mark.parametrize("damage", ["no fingerprint", "not finite", "no config"])
def test_a_damaged_expert_is_not_pushed(hub: Any, expert: Expert, folder: Path, base: str, damage: str) -> None:
    message = {"no fingerprint": "has no fingerprint", "not finite": "not finite", "no config": "There is no expert"}
    if damage == "no config":
        (folder / "adapter_config.json").unlink()
    elif damage == "no fingerprint":
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_fingerprint": None}))
    else:
        offsets = {name: offset * torch.nan for name, offset in expert.offsets.items()}
        dataclasses.replace(expert, offsets=offsets).save_pretrained(folder)
    with pytest.raises(ExpertError, match=message[damage]):
        push_expert(folder, "user/expert", base_model="user/base")
    assert set(hub.repositories) == {("model", "user/base")}


def test_a_repository_without_a_user_is_ones_own(hub: Any, expert: Expert, base: str) -> None:
    assert expert.push_to_hub("expert", base_model="user/base").repo_id == "user/expert"
    assert written(hub, file="expert.json")["repo_id"] == "user/expert"


@pytest.mark.parametrize(
    ("text", "published"),
    [
        ("{home}/data/questions.csv", "questions.csv"),
        ("trained on {tmp}/a/b.jsonl, then more", "trained on b.jsonl, then more"),
        ("~/runs/x", "x"),
        ("https://huggingface.co/user/base and 3/4 of and/or /no/such/place", None),
        ("A/B, 1/2 m/s", None),
    ],
)
def test_paths_of_this_machine_are_cut_down_in_facts(text: str, published: str | None, tmp_path: Path) -> None:
    said = text.format(home=Path.home(), tmp=tmp_path)
    expected = said if published is None else published
    assert without_local_paths({"task": said, "more": [{"x": said}], "n": 1}) == {
        "task": expected,
        "more": [{"x": expected}],
        "n": 1,
    }


@pytest.mark.parametrize("inside", ["", "/base", "/x/y"])
def test_only_a_commit_of_the_hubs_cache_stands_for_its_repository(tmp_path: Path, inside: str) -> None:
    commit = "0123456789" * 4
    place = tmp_path / "models--user--base" / "snapshots" / f"{commit}{inside}"
    place.mkdir(parents=True)
    found = on_hub(str(place))
    assert (found and (found.model, found.revision)) == (("user/base", commit) if not inside else None)


def test_no_message_shows_a_token() -> None:
    assert "hf_secret" not in repr(Destination("user/expert", token="hf_secret"))


def test_what_is_no_path_or_may_not_be_looked_at_is_no_error() -> None:
    long = f"see /{'x' * 300}/y"
    assert without_local_paths(long) == long
