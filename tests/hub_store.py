"""What a Hub keeps: accounts, repositories, their commits, and collections. Everything lives in memory."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


TASKS = {  # of the Hub's own list, those that experts can have
    "text-generation",
    "text-classification",
    "image-text-to-text",
    "question-answering",
    "summarization",
    "translation",
    "any-to-any",
}
DATE = "2026-01-01T00:00:00.000Z"
REPOSITORY_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class Refusal(Exception):
    """An answer that is an error; clients choose the class of their exception by `code`."""

    def __init__(self, status: int, code: str, message: str = "", **content: Any) -> None:
        super().__init__(message or code)
        self.status, self.code, self.content = status, code, content


@dataclass(frozen=True)
class Account:
    """Whose a token is, and what it may do: "write" or "read"."""

    name: str
    role: str = "write"
    organizations: tuple[str, ...] = ()

    def owns(self, repository_id: str) -> bool:
        return repository_id.split("/")[0] in (self.name, *self.organizations)


@dataclass(frozen=True)
class File:
    """A file in a commit; `is_lfs` says that it was uploaded by LFS and is named by its SHA-256."""

    content: bytes
    is_lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def blob_id(self) -> str:
        """Git's name for the content."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    files: Mapping[str, File]
    author: str = "user"
    description: str = ""


@dataclass
class Repository:
    """Commits, and the branches, tags and pull requests that name them."""

    id: str
    kind: str = "model"  # model, dataset or space
    private: bool = False
    gated: bool = False
    admitted: set[str] = field(default_factory=set)  # accounts that were granted access to a gated repository
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)  # "refs/pr/1" to commit
    commits: dict[str, Commit] = field(default_factory=dict)

    def find(self, revision: str) -> Commit | None:
        """The commit that a branch, tag, pull request or (short) sha names."""
        for names in (self.branches, self.tags, self.pull_requests):
            if revision in names:
                return self.commits[names[revision]]
        if len(revision) >= 7:
            return next((commit for sha, commit in self.commits.items() if sha.startswith(revision)), None)
        return None

    def commit(self, revision: str, files: Mapping[str, File], title: str, author: str = "user") -> Commit:
        """Add a commit on a branch or pull request; its sha depends on nothing but the repository's history."""
        names = self.pull_requests if revision.startswith("refs/pr/") else self.branches
        parent = names.get(revision)
        tree = {path: file.etag for path, file in sorted(files.items())}
        said = json.dumps([self.kind, self.id, len(self.commits), parent, title, tree])
        made = Commit(hashlib.sha1(said.encode()).hexdigest(), parent, title, dict(files), author)
        self.commits[made.sha] = made
        names[revision] = made.sha
        return made

    def history(self, commit: Commit) -> list[Commit]:
        """A commit and those before it."""
        found = [commit]
        while found[-1].parent is not None:
            found.append(self.commits[found[-1].parent])
        return found


def card_metadata(readme: bytes) -> dict[str, Any]:
    """The YAML at the head of a card; raises a `Refusal` if it is not valid."""
    head = re.match(rb"^---\s*\n(.*?)\n---", readme, re.DOTALL)
    if head is None:
        return {}
    import yaml  # comes with huggingface_hub

    try:
        content = yaml.safe_load(head[1])
    except yaml.YAMLError as error:
        raise Refusal(400, "BadYaml", f"Invalid YAML metadata: {error}") from error
    return content if isinstance(content, dict) else {}


def faults_of_card(metadata: Mapping[str, Any]) -> list[str]:
    """What the Hub refuses in a model card's metadata."""
    faults = []
    bases = metadata.get("base_model") or []
    for base in bases if isinstance(bases, list) else [bases]:
        if not isinstance(base, str) or not REPOSITORY_ID.fullmatch(base):
            faults.append(f'"base_model" with value "{base}" is not valid. Use a model id from https://hf.co/models.')
    task = metadata.get("pipeline_tag")
    if task is not None and task not in TASKS:
        faults.append(f'"pipeline_tag" with value "{task}" is not valid. It must be one of {sorted(TASKS)}.')
    for name in ("tags", "datasets", "language"):
        values = metadata.get(name) or []
        if not isinstance(values, str | list) or any(not isinstance(value, str) for value in values):
            faults.append(f'"{name}" must be a string or a list of strings.')
    license_name = metadata.get("license")
    if license_name is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", str(license_name)):
        faults.append(f'"license" with value "{license_name}" is not valid.')
    index = metadata.get("model-index")
    if index is not None and not (
        isinstance(index, list) and all(isinstance(one, dict) and one.keys() >= {"name", "results"} for one in index)
    ):
        faults.append('"model-index" must be a list of objects with "name" and "results".')
    return faults


def faults_of_results(path: str, content: bytes) -> list[str]:
    """What the Hub refuses in a file of `.eval_results`."""
    import yaml

    try:
        entries = yaml.safe_load(content)
    except yaml.YAMLError as error:
        return [f"{path}: invalid YAML: {error}"]
    if not isinstance(entries, list):
        return [f"{path} must hold a list of results."]
    faults = []
    for entry in entries:
        dataset = entry.get("dataset") if isinstance(entry, dict) else None
        if not isinstance(dataset, dict) or not REPOSITORY_ID.fullmatch(str(dataset.get("id"))):
            faults.append(f'{path}: "dataset.id" of a result must be a dataset on the Hub.')
        elif not dataset.get("task_id") or "value" not in entry:
            faults.append(f'{path}: a result needs "dataset.task_id" and "value".')
    return faults


def results_of(commit: Commit) -> list[dict[str, Any]]:
    """The entries of `.eval_results`, as the Hub shows them."""
    import yaml

    files = [file for path, file in sorted(commit.files.items()) if path.startswith(".eval_results/")]
    return [entry for file in files for entry in yaml.safe_load(file.content)]


def read_folder(folder: Path) -> dict[str, bytes]:
    """The files below a folder, by their path in a repository."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
