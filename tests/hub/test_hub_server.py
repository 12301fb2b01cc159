"""The Hub of the tests behaves towards the real huggingface_hub client as the real Hub does."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    hf_hub_download,
    snapshot_download,
    upload_folder,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


FILES = {"config.json": b"{}", "math/adapter_model.safetensors": bytes(range(256)) * 40, "math/ä b.txt": b""}
CARD = "---\nbase_model: org/base\nlicense: mit\n---\n# Card\n"


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi(endpoint=hub.url, token="writer")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path, content in FILES.items():
        target = tmp_path / "given" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return tmp_path / "given"


def test_a_folder_comes_back_as_it_was_pushed(hub, api, folder):
    api.create_repo("user/bank")
    pushed = upload_folder(repo_id="user/bank", folder_path=folder)  # the module's function, not the object's
    assert hub.files("user/bank") == FILES
    pulled = Path(snapshot_download("user/bank"))
    assert pulled.name == pushed.oid
    assert {path: (pulled / path).read_bytes() for path in FILES} == FILES
    assert hub.asked("PUT /_lfs/") and [c.title for c in hub.commits("user/bank")][1:] == ["initial commit"]


def test_a_second_push_of_the_same_files_makes_no_commit(hub, api, folder):
    api.create_repo("user/bank")
    first = api.upload_folder(repo_id="user/bank", folder_path=folder)
    assert api.upload_folder(repo_id="user/bank", folder_path=folder).oid == first.oid
    assert len(hub.asked("POST .*/commit/")) == 1


def test_the_same_history_has_the_same_commits(hub):
    first = [hub.put("user/bank", FILES), hub.put("user/bank", {"config.json": None})]
    hub.reset()
    assert [hub.put("user/bank", FILES), hub.put("user/bank", {"config.json": None})] == first


def test_branches_tags_and_pull_requests(hub, api):
    sha = hub.put("user/bank", FILES)
    api.create_branch("user/bank", branch="try/this")
    api.create_tag("user/bank", tag="v1")
    added = api.create_commit(
        "user/bank", [CommitOperationAdd("new.json", b"1")], commit_message="new", revision="try/this"
    )
    proposed = api.create_commit(
        "user/bank", [CommitOperationDelete("config.json")], commit_message="less", create_pr=True
    )
    assert (proposed.pr_revision, proposed.pr_num) == ("refs/pr/1", 1)
    refs = api.list_repo_refs("user/bank", include_pull_requests=True)
    assert {branch.name: branch.target_commit for branch in refs.branches} == {"main": sha, "try/this": added.oid}
    assert [tag.target_commit for tag in refs.tags] == [sha]
    assert api.list_repo_files("user/bank", revision="try/this") == [".gitattributes", *sorted(FILES), "new.json"]
    assert "config.json" not in api.list_repo_files("user/bank", revision="refs/pr/1")
    assert Path(hf_hub_download("user/bank", "new.json", revision="try/this")).read_bytes() == b"1"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("user/bank", tag="v1")
    api.delete_tag("user/bank", tag="v1")
    assert not api.list_repo_refs("user/bank").tags


def test_a_commit_on_an_old_parent_is_refused(hub, api):
    old = hub.put("user/bank", FILES)
    hub.put("user/bank", {"a.json": b"1"})
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_commit("user/bank", [CommitOperationAdd("b.json", b"1")], commit_message="late", parent_commit=old)
    assert caught.value.response.status_code == 412 and "b.json" not in hub.files("user/bank")


def test_trees_come_in_pages(hub, api, monkeypatch):
    hub.put("user/bank", {f"{i:02}.json": b"1" for i in range(11)} | {"math/x.json": b"12"})
    monkeypatch.setattr(hub, "page_size", 3)
    found = list(api.list_repo_tree("user/bank", recursive=True))
    assert len(found) == 13 and found[-1].path == "math/x.json" and found[-1].size == 2
    assert len(hub.asked("GET .*tree")) == 5
    assert [entry.path for entry in api.list_repo_tree("user/bank", "math")] == ["math/x.json"]
    assert "math" in [entry.path for entry in api.list_repo_tree("user/bank")]


def test_what_is_missing_has_its_own_error(hub, api):
    hub.put("user/bank", FILES)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("user/other")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("user/bank", revision="other")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("user/bank", "other.json")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("gpt2", "config.json")


def test_private_gated_and_foreign_repositories(hub, api):
    hub.put("user/secret", FILES, private=True)
    hub.put("user/gated", FILES | {"README.md": CARD.encode()}, gated=True)
    for token in (False, "stranger"):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("user/secret", token=token)
        with pytest.raises(GatedRepoError):
            hf_hub_download("user/gated", "config.json", token=token)
    assert Path(hf_hub_download("user/gated", "README.md", token=False)).is_file()
    hub.repositories["model", "user/gated"].admitted.add("stranger")
    for token, repository in (("stranger", "user/gated"), ("reader", "user/secret")):
        assert Path(hf_hub_download(repository, "config.json", token=token)).is_file()
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        api.model_info("user/gated", token="wrong")


def test_only_writers_of_a_namespace_write(hub, api):
    hub.put("user/bank", FILES)
    for token in ("reader", "stranger"):
        with pytest.raises(HfHubHTTPError, match="403"):
            api.create_repo("user/new", token=token)
        with pytest.raises(HfHubHTTPError, match="403"):
            api.upload_file(path_or_fileobj=b"1", path_in_repo="x", repo_id="user/bank", token=token)
    api.upload_file(path_or_fileobj=b"1", path_in_repo="x", repo_id="user/bank", token="stranger", create_pr=True)
    assert "x" in hub.files("user/bank", "refs/pr/1") and "x" not in hub.files("user/bank")
    api.create_repo("lab/bank", private=True)
    assert hub.repositories["model", "lab/bank"].private
    assert api.whoami()["orgs"][0]["name"] == "lab"
    assert api.whoami("reader")["auth"]["accessToken"]["role"] == "read"


@pytest.mark.parametrize(
    ("path", "content"),
    [
        ("README.md", "---\nbase_model: /home/me/base\n---\n"),
        ("README.md", "---\npipeline_tag: transformer2-generation\n---\n"),
        ("README.md", "---\nlicense: [\n---\n"),
        (".eval_results/x.yaml", "- dataset: {id: local}\n  value: 1\n"),
    ],
)
def test_bad_metadata_is_refused(hub, api, path, content):
    hub.create("user/bank")
    with pytest.raises((HfHubHTTPError, ValueError)):
        api.upload_file(path_or_fileobj=content.encode(), path_in_repo=path, repo_id="user/bank")
    assert hub.files("user/bank") == {}
    api.upload_file(path_or_fileobj=CARD.encode(), path_in_repo="README.md", repo_id="user/bank")
    assert api.model_info("user/bank").card_data.base_model == "org/base"


def test_collections(hub, api):
    hub.put("user/bank", FILES)
    made = api.create_collection("My experts", namespace="user")
    assert api.create_collection("My experts", namespace="user", exists_ok=True).slug == made.slug
    api.add_collection_item(made.slug, "user/bank", "model", note="three experts")
    with pytest.raises(HfHubHTTPError, match="409"):
        api.add_collection_item(made.slug, "user/bank", "model")
    with pytest.raises(RepositoryNotFoundError):
        api.add_collection_item(made.slug, "user/other", "model")
    (item,) = api.get_collection(made.slug).items
    assert (item.item_id, item.note) == ("user/bank", "three experts")


def test_faults_happen_once(hub, api):
    sha = hub.put("user/bank", FILES)
    hub.fail("GET /api/models", status=500)
    with pytest.raises(HfHubHTTPError, match="500"):
        api.model_info("user/bank")
    assert api.model_info("user/bank").sha == sha
    for moment, commits in (("before", 2), ("after", 3)):
        hub.fail("POST .*/commit/", drop=moment)
        with pytest.raises(httpx_errors()):
            api.upload_file(path_or_fileobj=moment.encode(), path_in_repo="x", repo_id="user/bank")
        assert len(hub.commits("user/bank")) == commits
    url = f"{hub.url}/user/bank/resolve/main/math/adapter_model.safetensors"
    assert httpx.get(url, headers={"Range": "bytes=10-13"}).content == bytes([10, 11, 12, 13])
    hub.fail("GET .*safetensors", cut=100)
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.get(url)


def test_a_stopped_server_cannot_be_reached_and_starts_where_it_was(hub, api):
    sha = hub.put("user/bank", FILES)
    assert api.model_info("user/bank").sha == sha
    hub.stop()
    try:
        with pytest.raises(httpx_errors()):
            api.model_info("user/bank")
    finally:
        hub.start()
    assert api.model_info("user/bank").sha == sha


def httpx_errors() -> type[Exception]:
    """The network errors of the HTTP library that this version of huggingface_hub has."""
    from huggingface_hub.utils import _http

    library = getattr(_http, "httpx2", httpx)
    return library.TransportError
