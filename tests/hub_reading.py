"""What the Hub of the tests answers about repositories: their facts, names, trees, files and histories."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from hub_protocol import Connection, route
from hub_store import DATE, Account, Commit, Refusal, Repository, card_metadata, results_of


KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


class Repositories(Connection):
    """Creating, finding and reading repositories."""

    def repository(self, kinds: str, repository_id: str) -> Repository:
        """A repository that the account may see; what it may not see does not exist for it."""
        found = self.hub.repositories.get((KINDS.get(kinds, ""), repository_id))
        hidden = found is not None and found.private and not (self.account and self.account.owns(repository_id))
        if found is None or hidden:
            message = "Repository not found" if self.account else "Invalid username or password."
            raise Refusal(404 if self.account else 401, "RepoNotFound", message)
        return found

    def writable(self, kinds: str, repository_id: str) -> Repository:
        repository = self.repository(kinds, repository_id)
        self.check_writer(repository_id)
        return repository

    def check_writer(self, repository_id: str) -> Account:
        if self.account is None:
            raise Refusal(401, "", "Invalid username or password.")
        if self.account.role != "write" or not self.account.owns(repository_id):
            raise Refusal(403, "", "Forbidden: you don't have the required permissions to perform this action")
        return self.account

    def commit_of(self, repository: Repository, revision: str) -> Commit:
        commit = repository.find(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    @route("GET", "/api/whoami-v2")
    def whoami(self) -> None:
        if self.account is None:
            raise Refusal(401, "", "Invalid username or password.")
        organizations = [{"name": name, "type": "org"} for name in self.account.organizations]
        token = {"displayName": "test", "role": self.account.role}
        self.send_json(
            {
                "name": self.account.name,
                "type": "user",
                "orgs": organizations,
                "auth": {"type": "access_token", "accessToken": token},
            }
        )

    @route("POST", "/api/repos/create")
    def create_repository(self) -> None:
        wanted = self.json()
        owner = wanted.get("organization") or (self.account.name if self.account else "anonymous")
        repository_id, kind = f"{owner}/{wanted['name']}", wanted.get("type") or "model"
        self.check_writer(repository_id)
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{repository_id}"
        if (kind, repository_id) in self.hub.repositories:
            raise Refusal(409, "", "You already created this repo", url=url)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.create(repository_id, kind, private)
        self.send_json({"url": url, "name": repository_id, "id": repository_id})

    @route("DELETE", "/api/repos/delete")
    def delete_repository(self) -> None:
        wanted = self.json()
        owner = wanted.get("organization") or (self.account.name if self.account else "anonymous")
        kind = wanted.get("type") or "model"
        repository = self.writable(kind + "s", f"{owner}/{wanted['name']}")
        del self.hub.repositories[kind, repository.id]
        self.send_json({})

    @route("PUT", "/api/{}/{}/{}/settings")
    def change_settings(self, kinds: str, owner: str, name: str) -> None:
        repository, wanted = self.writable(kinds, f"{owner}/{name}"), self.json()
        if "private" in wanted or "visibility" in wanted:
            repository.private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        if "gated" in wanted:
            repository.gated = bool(wanted["gated"])
        self.send_json({})

    @route("GET", "/api/{}/{}/{}")
    def main_information(self, kinds: str, owner: str, name: str) -> None:
        self.information(kinds, owner, name, "main")

    @route("GET", "/api/{}/{}/{}/revision/{}")
    def information(self, kinds: str, owner: str, name: str, revision: str) -> None:
        repository = self.repository(kinds, f"{owner}/{name}")
        commit = self.commit_of(repository, revision)
        card = card_metadata(commit.files["README.md"].content) if "README.md" in commit.files else {}
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in self.query:
            for entry in siblings:
                file = commit.files[entry["rfilename"]]
                entry |= {"size": len(file.content), "blobId": file.blob_id}
        facts: dict[str, Any] = {"_id": "0", "id": repository.id, "modelId": repository.id, "author": owner}
        facts |= {"sha": commit.sha, "private": repository.private, "gated": "auto" if repository.gated else False}
        facts |= {"tags": card.get("tags") or [], "pipeline_tag": card.get("pipeline_tag"), "cardData": card}
        facts |= {"library_name": card.get("library_name"), "downloads": 0, "likes": 0, "disabled": False}
        facts |= {"lastModified": DATE, "createdAt": DATE, "siblings": siblings, "evalResults": results_of(commit)}
        if "expand" in self.query:
            facts = {name: facts.get(name) for name in ("_id", "id", "modelId", *self.query["expand"])}
        self.send_json(facts)

    @route("GET", "/api/{}/{}/{}/refs")
    def references(self, kinds: str, owner: str, name: str) -> None:
        repository = self.repository(kinds, f"{owner}/{name}")

        def listed(names: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
            return [
                {"name": known, "ref": f"{prefix}{known}", "targetCommit": sha} for known, sha in sorted(names.items())
            ]

        content: dict[str, Any] = {"branches": listed(repository.branches, "refs/heads/"), "converts": []}
        content["tags"] = listed(repository.tags, "refs/tags/")
        if "include_prs" in self.query:
            content["pullRequests"] = listed(repository.pull_requests, "")
        self.send_json(content)

    @route("POST", "/api/{}/{}/{}/branch/{}")
    def create_branch(self, kinds: str, owner: str, name: str, branch: str) -> None:
        repository = self.writable(kinds, f"{owner}/{name}")
        self._create_name(repository, repository.branches, branch, self.json().get("startingPoint") or "main")

    @route("POST", "/api/{}/{}/{}/tag/{}")
    def create_tag(self, kinds: str, owner: str, name: str, revision: str) -> None:
        repository = self.writable(kinds, f"{owner}/{name}")
        self._create_name(repository, repository.tags, self.json()["tag"], revision)

    def _create_name(self, repository: Repository, names: dict[str, str], name: str, revision: str) -> None:
        if name in names:
            raise Refusal(409, "", f"Reference already exists: {name}")
        names[name] = self.commit_of(repository, revision).sha
        self.send_json({})

    @route("DELETE", "/api/{}/{}/{}/{}/{}")
    def delete_name(self, kinds: str, owner: str, name: str, what: str, reference: str) -> None:
        repository = self.writable(kinds, f"{owner}/{name}")
        names = repository.branches if what == "branch" else repository.tags
        if what not in ("branch", "tag") or reference not in names:
            raise Refusal(404, "RevisionNotFound", f"Reference not found: {reference}")
        del names[reference]
        self.send_json({})


class Reading(Repositories):
    """Trees, files and histories."""

    @route("GET", "/api/{}/{}/{}/tree/{}")
    def root_tree(self, kinds: str, owner: str, name: str, revision: str) -> None:
        self.tree(kinds, owner, name, revision, "")

    @route("GET", "/api/{}/{}/{}/tree/{}/{*}")
    def tree(self, kinds: str, owner: str, name: str, revision: str, folder: str) -> None:
        repository = self.repository(kinds, f"{owner}/{name}")
        commit = self.commit_of(repository, revision)
        prefix = folder + "/" if folder else ""
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = _tree(commit, prefix, recursive)
        if folder and not entries:
            raise Refusal(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        start = int(self.query.get("cursor", ["0"])[0])
        size = min(self.hub.page_size, int(self.query.get("limit", ["1000"])[0]))
        headers = {}
        if start + size < len(entries):
            kept = "".join(f"&{key}={values[0]}" for key, values in self.query.items() if key != "cursor")
            path = urlsplit(self.path).path
            headers["Link"] = f'<{self.hub.url}{path}?cursor={start + size}{kept}>; rel="next"'
        self.send_json(entries[start : start + size], headers=headers)

    @route("POST", "/api/{}/{}/{}/paths-info/{}")
    def paths_information(self, kinds: str, owner: str, name: str, revision: str) -> None:
        commit = self.commit_of(self.repository(kinds, f"{owner}/{name}"), revision)
        is_json = "json" in (self.headers.get("Content-Type") or "")
        paths = self.json()["paths"] if is_json else parse_qs(self.body.decode()).get("paths", [])
        found = _tree(commit, "", True) + [e for e in _tree(commit, "", False) if e["type"] == "directory"]
        self.send_json([entry for entry in found if entry["path"] in paths])

    @route("GET", "/api/{}/{}/{}/commits/{}")
    def history(self, kinds: str, owner: str, name: str, revision: str) -> None:
        repository = self.repository(kinds, f"{owner}/{name}")
        commits = repository.history(self.commit_of(repository, revision))
        self.send_json(
            [
                {
                    "id": commit.sha,
                    "title": commit.title,
                    "message": "",
                    "date": DATE,
                    "authors": [{"user": commit.author}],
                }
                for commit in commits
            ]
        )

    @route("GET", "/{}/{}/resolve/{}/{*}")
    def model_file(self, owner: str, name: str, revision: str, path: str) -> None:
        self.file("models", owner, name, revision, path)

    @route("GET", "/{}/{}/{}/resolve/{}/{*}")
    def file(self, kinds: str, owner: str, name: str, revision: str, path: str) -> None:
        repository = self.repository(kinds, f"{owner}/{name}")
        commit = self.commit_of(repository, revision)
        self._check_admitted(repository, path)
        found = commit.files.get(path)
        if found is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.send_json({"error": "Entry not found"}, 404, {**headers, "X-Repo-Commit": commit.sha})
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{found.etag}"', "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        if found.is_lfs:
            headers |= {"X-Linked-Etag": f'"{found.etag}"', "X-Linked-Size": str(len(found.content))}
        self._send_range(found.content, headers)

    def _send_range(self, content: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            return self.send(content, headers)
        start, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        if start >= len(content):
            return self.send(b"", {**headers, "Content-Range": f"bytes */{len(content)}"}, 416)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self.send(content[start : end + 1], headers, 206)

    def _check_admitted(self, repository: Repository, path: str) -> None:
        if not repository.gated or path == "README.md":
            return
        if self.account is None:
            raise Refusal(
                401,
                "GatedRepo",
                f"Access to model {repository.id} is restricted. You must have access to it and be authenticated to "
                "access it. Please log in.",
            )
        if self.account.name not in repository.admitted and not self.account.owns(repository.id):
            raise Refusal(
                403,
                "GatedRepo",
                f"Access to model {repository.id} is restricted and you are not in the authorized list. Visit "
                f"{self.hub.url}/{repository.id} to ask for access.",
            )


def _tree(commit: Commit, prefix: str, recursive: bool) -> list[dict[str, Any]]:
    """The entries of a folder; recursively, all files below it."""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in sorted(commit.files.items()):
        if not path.startswith(prefix):
            continue
        below, separator, _ = path[len(prefix) :].partition("/")
        if separator and not recursive:
            entries[prefix + below] = {"type": "directory", "path": prefix + below, "size": 0, "oid": "0" * 40}
            continue
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.content), "oid": file.blob_id}
        if file.is_lfs:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
        entries[path] = entry
    return list(entries.values())
