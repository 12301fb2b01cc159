"""What the Hub of the tests does for writers: uploads, commits, pull requests and collections."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from typing import Any

from hub_protocol import ROUTES, route
from hub_reading import Reading
from hub_store import DATE, File, Refusal, Repository, card_metadata, faults_of_card, faults_of_results


class Writing(Reading):
    """Uploads and commits."""

    @route("POST", "/api/validate-yaml")
    def validate_card(self) -> None:
        wanted = self.json()
        try:
            faults = faults_of_card(card_metadata(wanted.get("content", "").encode()))
        except Refusal as refusal:
            faults = [str(refusal)]
        if self.hub.strict_cards and faults and wanted.get("repoType", "model") == "model":
            return self.send_json({"errors": [{"message": fault} for fault in faults], "warnings": []}, 400)
        self.send_json({"errors": [], "warnings": []})

    @route("POST", "/api/{}/{}/{}/preupload/{}")
    def preupload(self, kinds: str, owner: str, name: str, revision: str) -> None:
        repository = self._committable(kinds, f"{owner}/{name}")
        current = self.commit_of(repository, revision).files
        answer = []
        for path in (wanted["path"] for wanted in self.json()["files"]):
            mode = "lfs" if path.endswith(self.hub.lfs) else "regular"
            oid = current[path].etag if path in current else None
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send_json({"files": answer})

    def _committable(self, kinds: str, repository_id: str) -> Repository:
        """With create_pr=1 everybody who can read a repository, and may write at all, may propose a commit."""
        if "create_pr" not in self.query:
            return self.writable(kinds, repository_id)
        repository = self.repository(kinds, repository_id)
        if self.account is None or self.account.role != "write":
            raise Refusal(403 if self.account else 401, "", "Forbidden: this token cannot create pull requests")
        return repository

    @route("POST", "/{}/{}.git/info/lfs/objects/batch")
    def lfs_batch(self, owner: str, name: str) -> None:
        self._batch(self.repository("models", f"{owner}/{name}"))

    @route("POST", "/{}/{}/{}.git/info/lfs/objects/batch")
    def lfs_batch_of_kind(self, kinds: str, owner: str, name: str) -> None:
        self._batch(self.repository(kinds, f"{owner}/{name}"))

    def _batch(self, repository: Repository) -> None:
        if self.account is None or self.account.role != "write":
            raise Refusal(403, "", "Forbidden: you don't have the required permissions to perform this action")
        objects = []
        for wanted in self.json()["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/_lfs/{wanted['oid']}", "header": {}}}
            objects.append(entry)
        self.send_json({"transfer": "basic", "objects": objects})

    @route("PUT", "/_lfs/{}")
    def lfs_upload(self, oid: str) -> None:
        if File(self.body).sha256 != oid:
            raise Refusal(400, "BadOid", "The content does not have this SHA-256.")
        self.hub.blobs[oid] = self.body
        self.send_json({})

    @route("POST", "/api/{}/{}/{}/commit/{}")
    def commit(self, kinds: str, owner: str, name: str, revision: str) -> None:
        repository = self._committable(kinds, f"{owner}/{name}")
        parent = self.commit_of(repository, revision)
        operations = [json.loads(line) for line in self.body.split(b"\n") if line.strip()]
        header = next(operation["value"] for operation in operations if operation["key"] == "header")
        if header.get("parentCommit") not in (None, parent.sha):
            raise Refusal(412, "", "The branch has other commits by now: parentCommit is not its newest.")
        if "create_pr" not in self.query and revision not in {**repository.branches, **repository.pull_requests}:
            raise Refusal(400, "", f"{revision} is no branch: commits can only be added to a branch.")
        files = dict(parent.files)
        for operation in operations:
            self._apply(files, operation["key"], operation["value"])
        self._check_content(repository, files)
        answer: dict[str, Any] = {"success": True, "hookOutput": ""}
        if "create_pr" in self.query:
            revision = f"refs/pr/{len(repository.pull_requests) + 1}"
            repository.pull_requests[revision] = parent.sha
            number = revision.rsplit("/", 1)[1]
            answer["pullRequestUrl"] = f"{self.hub.url}/{repository.id}/discussions/{number}"
        author = self.account.name if self.account else "anonymous"
        made = repository.commit(revision, files, header["summary"], author)
        self.send_json(
            answer | {"commitOid": made.sha, "commitUrl": f"{self.hub.url}/{repository.id}/commit/{made.sha}"}
        )

    def _apply(self, files: dict[str, File], key: str, value: Mapping[str, Any]) -> None:
        """Do one line of a commit to a tree."""
        path = value.get("path", "")
        if path.startswith("/") or ".." in path.split("/"):
            raise Refusal(400, "", f"Invalid path: {path}")
        if key == "file":
            files[path] = File(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in self.hub.blobs:
                raise Refusal(400, "", f"{path}: this LFS object was not uploaded")
            files[path] = File(self.hub.blobs[value["oid"]], is_lfs=True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise Refusal(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
        elif key == "deletedFolder":
            folder = path.rstrip("/") + "/"
            for known in [known for known in files if known.startswith(folder)]:
                del files[known]
        elif key != "header":
            raise Refusal(400, "", f"This Hub cannot do {key}.")

    def _check_content(self, repository: Repository, files: Mapping[str, File]) -> None:
        if not self.hub.strict_cards or repository.kind != "model":
            return
        faults = faults_of_card(card_metadata(files["README.md"].content)) if "README.md" in files else []
        for path, file in files.items():
            if path.startswith(".eval_results/") and path.endswith((".yaml", ".yml")):
                faults += faults_of_results(path, file.content)
        if faults:
            raise Refusal(400, "", " ".join(faults))


class Handler(Writing):
    """Everything, with collections."""

    @route("GET", "/api/collections")
    def list_collections(self) -> None:
        owners = self.query.get("owner", [])
        found = [c for c in self.hub.collections.values() if not owners or c["owner"]["name"] in owners]
        self.send_json([{key: value for key, value in one.items() if key != "position"} for one in found])

    @route("POST", "/api/collections")
    def create_collection(self) -> None:
        wanted = self.json()
        owner, title = wanted["namespace"], wanted["title"]
        self.check_writer(f"{owner}/any")
        same = [c for c in self.hub.collections.values() if (c["owner"]["name"], c["title"]) == (owner, title)]
        if same:
            raise Refusal(409, "", "This collection exists already", slug=same[0]["slug"])
        words = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        slug = f"{owner}/{words}-{len(self.hub.collections):024x}"
        entry = {"slug": slug, "title": title, "owner": {"name": owner, "type": "user"}, "items": [], "position": 0}
        entry |= {"description": wanted.get("description"), "private": bool(wanted.get("private"))}
        self.hub.collections[slug] = entry | {"theme": "green", "lastUpdated": DATE, "upvotes": 0}
        self.send_json(self.hub.collections[slug])

    def _collection(self, owner: str, name: str) -> dict[str, Any]:
        found = self.hub.collections.get(f"{owner}/{name}")
        mine = self.account is not None and self.account.owns(f"{owner}/{name}")
        if found is None or (found["private"] and not mine):
            raise Refusal(404, "RepoNotFound", "Collection not found")
        return found

    @route("GET", "/api/collections/{}/{}")
    def collection(self, owner: str, name: str) -> None:
        self.send_json(self._collection(owner, name))

    @route("POST", "/api/collections/{}/{}/items")
    def add_to_collection(self, owner: str, name: str) -> None:
        found = self._collection(owner, name)
        self.check_writer(f"{owner}/{name}")
        wanted = self.json()
        item = wanted["item"]
        self.repository(item["type"] + "s", item["id"])
        if any((known["id"], known["type"]) == (item["id"], item["type"]) for known in found["items"]):
            raise Refusal(409, "", "This item is in the collection already")
        entry = {"_id": f"{len(found['items']):024x}", "position": len(found["items"]), **item}
        if wanted.get("note"):
            entry["note"] = {"text": wanted["note"]}
        found["items"].append(entry)
        self.send_json(found)

    @route("DELETE", "/api/collections/{}/{}")
    def delete_collection(self, owner: str, name: str) -> None:
        self.check_writer(f"{owner}/{name}")
        del self.hub.collections[self._collection(owner, name)["slug"]]
        self.send_json({})


ROUTES.sort(key=lambda route: sum("{" in piece for piece in route[1]))  # words before placeholders
