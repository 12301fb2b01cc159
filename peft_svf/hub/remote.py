"""What a repository on the Hub holds now: the commit, its files, and which of them a former push has left."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from peft_svf.experts.bank_config import BASE_FOLDER, MODEL_TYPE
from peft_svf.experts.errors import HubError
from peft_svf.hub.destination import Destination
from peft_svf.hub.layout import ADAPTER, BANK, EXPERT, is_ours_of_bank, is_ours_of_expert


@dataclass(frozen=True)
class Remote:
    """
    A repository as the next commit finds it.

    Args:
        exists (`bool`): Whether there is a repository; the rest is empty without one.
        has_branch (`bool`): Whether the branch is there; a new one starts from the main branch.
        head (`str`, *optional*): The commit that the next one follows.
        files (`dict[str, str]`): Path to git's id of the content, or to the SHA-256 of an LFS file.
        tags (`dict[str, str]`): Tag to commit.
        kind (`str`, *optional*): What the files are: `"an expert"`, `"a bank"` or another model.
        folders (`tuple[str, ...]`): Folders of experts, and of the base model, that a bank's config.json names.
    """

    exists: bool = False
    has_branch: bool = False
    head: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    kind: str | None = None
    folders: tuple[str, ...] = ()

    def changed(self, staged: dict[str, Path]) -> dict[str, Path]:
        """Those of the `staged` files, by path in the repository, that it lacks or has with other content."""
        return {path: file for path, file in staged.items() if self.files.get(path) not in content_ids(file)}

    def left_over(self, staged: dict[str, Path], kind: str) -> list[str]:
        """Files that a former push of this kind has left and this one does not replace; files of others are not."""
        is_ours = is_ours_of_bank(self.folders) if kind == BANK else is_ours_of_expert
        return sorted(path for path in self.files if path not in staged and is_ours(path))


def read_remote(destination: Destination) -> Remote:
    """Ask the Hub; nothing is changed there."""
    api, repo_id, branch = destination.api, destination.repo_id, destination.revision
    try:
        refs = api.list_repo_refs(repo_id, include_pull_requests=branch.startswith("refs/pr/"))
    except RepositoryNotFoundError:
        return Remote()
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    heads |= {ref.ref: ref.target_commit for ref in refs.pull_requests or ()}
    head = heads.get(branch, heads.get("main"))
    if head is None:
        raise HubError(f"{repo_id} has no branch 'main' to start '{branch}' from; create it on the Hub first.")
    files = {}
    for entry in api.list_repo_tree(repo_id, recursive=True, revision=head):
        if isinstance(entry, RepoFile):
            files[entry.path] = entry.lfs.sha256 if entry.lfs else entry.blob_id
    kind, folders = _what_it_is(destination, head, files)
    tags = {ref.name: ref.target_commit for ref in refs.tags}
    return Remote(True, branch in heads, head, files, tags, kind, folders)


def content_ids(path: Path) -> set[str]:
    """Git's id of a file's content, and its SHA-256, which names it in LFS."""
    size = path.stat().st_size
    blob, plain = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            blob.update(block)
            plain.update(block)
    return {blob.hexdigest(), plain.hexdigest()}


def _what_it_is(destination: Destination, head: str, files: dict[str, str]) -> tuple[str | None, tuple[str, ...]]:
    if "config.json" not in files:
        return (EXPERT if ADAPTER in files else None), ()
    path = hf_hub_download(
        destination.repo_id,
        "config.json",
        revision=head,
        token=destination.token,
        endpoint=destination.api.endpoint,
    )
    try:
        config = json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or config.get("model_type") != MODEL_TYPE:
        return "another model", ()
    experts = config.get("experts")
    names = [*(experts if isinstance(experts, dict) else ()), config.get("classifier"), BASE_FOLDER]
    return BANK, tuple(name for name in names if isinstance(name, str))
