"""A Hugging Face Hub on the loopback interface: repositories, commits, LFS, tokens, and faults on demand.

For tests of pushing and pulling with the real `huggingface_hub` client, and for trying them by hand:

    python tests/hub_server.py            # prints what to set: HF_ENDPOINT, HF_TOKEN, HF_HUB_DISABLE_XET

Not here: the xet protocol (clients need HF_HUB_DISABLE_XET=1), the CDN that large files are redirected to, discussions.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_store import (
    Account,
    Commit,
    File,
    Refusal,
    Repository,
    card_metadata,
    faults_of_card,
    faults_of_results,
    read_folder,
)


TOKENS = {"writer": "user", "reader": "user:read", "stranger": "stranger"}
LFS = (".safetensors", ".bin", ".pt", ".pth", ".model", ".png")
DATE = "2026-01-01T00:00:00.000Z"
KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}


@dataclass
class Fault:
    """
    What goes wrong with the next requests whose "METHOD /path" a pattern is found in.

    Args:
        pattern (`str`): Regular expression.
        times (`int`): How many requests it hits.
        status (`int`, *optional*): Answer with this error, and do nothing.
        drop (`str`, *optional*): Close the connection "before" or "after" doing what was asked, without an answer.
        cut (`int`, *optional*): Close the connection after so many bytes of the answer's content.
        delay (`float`): Seconds to wait first.
    """

    pattern: str
    times: int = 1
    status: int | None = None
    drop: str | None = None
    cut: int | None = None
    delay: float = 0.0


@dataclass(frozen=True)
class Request:
    """One line of the log; `status` is 0 if the connection was closed without an answer."""

    method: str
    path: str
    status: int
    account: str | None

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.status}"


class HubServer:
    """
    The Hub: `with HubServer() as hub:` serves at `hub.url` until the block ends.

    Args:
        tokens (`Mapping[str, str]`, *optional*):
            Token to account, "name" or "name:read". By default "writer" and "reader" are tokens of "user", and
            "stranger" one of "stranger".
        organizations (`Mapping[str, Sequence[str]]`, *optional*): Members by organization; "lab" has "user".
        lfs (`Sequence[str]`, *optional*): Endings of files that clients must upload by LFS.
        strict_cards (`bool`, *optional*, defaults to `True`): Refuse cards and results as the real Hub does.
        page_size (`int`, *optional*, defaults to 1000): Entries in one page of a tree.
    """

    def __init__(
        self,
        tokens: Mapping[str, str] | None = None,
        organizations: Mapping[str, Sequence[str]] | None = None,
        lfs: Sequence[str] = LFS,
        strict_cards: bool = True,
        page_size: int = 1000,
    ) -> None:
        self.organizations = {"lab": ["user"]} if organizations is None else dict(organizations)
        self.accounts = {token: self._account(said) for token, said in (tokens or TOKENS).items()}
        self.lfs, self.strict_cards, self.page_size = tuple(lfs), strict_cards, page_size
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.lock = threading.RLock()
        self.connections: set[socket.socket] = set()
        self.url = ""
        self._server: ThreadingHTTPServer | None = None

    def _account(self, said: str) -> Account:
        name, _, role = said.partition(":")
        member = tuple(group for group, people in self.organizations.items() if name in people)
        return Account(name, role or "write", member)

    def start(self, port: int = 0) -> str:
        """Serve on the loopback interface and return the URL; the port is the same after a stop."""
        if self._server is not None:
            return self.url
        handler = type("Handler", (_Handler,), {"hub": self})
        port = port or int(urlsplit(self.url).port or 0)
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self.url

    def stop(self) -> None:
        """Close all connections; the repositories stay, and `start` serves them again."""
        if self._server is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._server = None
        for connection in list(self.connections):
            _close(connection)

    def __enter__(self) -> HubServer:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def reset(self) -> None:
        """Forget everything that was pushed, asked or was to go wrong."""
        with self.lock:
            for kept in (self.repositories, self.collections, self.blobs, self.faults, self.requests):
                kept.clear()

    def create(self, repository_id: str, kind: str = "model", private: bool = False, gated: bool = False) -> Repository:
        """A new repository with the Hub's first commit."""
        repository = Repository(repository_id, kind, private, gated)
        repository.commit("main", {".gitattributes": File(b"*.safetensors filter=lfs\n")}, "initial commit")
        self.repositories[kind, repository_id] = repository
        return repository

    def put(
        self, repository_id: str, files: Path | Mapping[str, bytes | None], branch: str = "main", **options: bool
    ) -> str:
        """
        Commit files to a repository behind the client's back; it is created if there is none.

        Args:
            repository_id (`str`): Like "user/bank".
            files (`Path` or `Mapping[str, bytes | None]`): A folder, or contents by path; `None` deletes.
            branch (`str`, *optional*, defaults to `"main"`): Created from "main" if there is none.
            options: Of [`HubServer.create`].

        Returns:
            `str`: The commit.
        """
        contents = read_folder(files) if isinstance(files, Path) else files
        with self.lock:
            repository = self.repositories.get(("model", repository_id)) or self.create(repository_id, **options)
            repository.branches.setdefault(branch, repository.branches["main"])
            tree = dict(repository.commits[repository.branches[branch]].files)
            for path, content in contents.items():
                if content is None:
                    tree.pop(path, None)
                else:
                    tree[path] = File(content, path.endswith(self.lfs))
            return repository.commit(branch, tree, "put").sha

    def files(self, repository_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """The files of a repository, as somebody who clones it gets them."""
        commit = self.repositories[kind, repository_id].find(revision)
        assert commit is not None, f"{repository_id} has no {revision}"
        return {path: file.content for path, file in commit.files.items() if path != ".gitattributes"}

    def commits(self, repository_id: str, revision: str = "main") -> list[Commit]:
        """The history of a repository, the newest commit first."""
        repository = self.repositories["model", repository_id]
        commit = repository.find(revision)
        assert commit is not None, f"{repository_id} has no {revision}"
        return repository.history(commit)

    def fail(self, pattern: str, **fault: Any) -> Fault:
        """Let the next requests go wrong whose "METHOD /path" `pattern` is found in; see [`Fault`]."""
        self.faults.append(Fault(pattern, **fault))
        return self.faults[-1]

    def take_fault(self, request: str) -> Fault | None:
        """The fault of a request, which then is used up."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return replace(fault)
        return None

    def asked(self, pattern: str = "") -> list[str]:
        """The requests so far whose "METHOD /path status" `pattern` is found in."""
        return [str(request) for request in list(self.requests) if re.search(pattern, str(request))]


Route = Callable[..., None]
_ROUTES: list[tuple[str, list[str], str]] = []  # method, parts of the path, name of the handler's method


def _route(method: str, path: str) -> Callable[[Route], Route]:
    """Let a method of the handler answer a path; `{}` is one part of it, `{*}` all that remain."""

    def register(function: Route) -> Route:
        _ROUTES.append((method, path.strip("/").split("/"), function.__name__))
        return function

    return register


def _match(wanted: Sequence[str], parts: Sequence[str]) -> list[str] | None:
    values = []
    for position, piece in enumerate(wanted):
        if piece == "{*}":
            return [*values, "/".join(parts[position:])]
        if position >= len(parts):
            return None
        if "{}" in piece:
            before, after = piece.split("{}")
            if not (parts[position].startswith(before) and parts[position].endswith(after)):
                return None
            values.append(parts[position][len(before) : len(parts[position]) - len(after)])
        elif piece != parts[position]:
            return None
    return values if len(parts) == len(wanted) else None


class _Connection(BaseHTTPRequestHandler):
    """Reads requests, finds who asks and what answers, and sends the answer."""

    protocol_version = "HTTP/1.1"
    hub: HubServer
    body: bytes
    query: dict[str, list[str]]
    account: Account | None
    fault: Fault | None
    status: int

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            pass  # the client, or `stop`, closed the connection

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the terminal; the log is `HubServer.requests`."""

    def answer(self) -> None:
        split = urlsplit(self.path)
        self.body, self.query, self.status, self.account = self._read_body(), parse_qs(split.query), 0, None
        self.fault = self.hub.take_fault(f"{self.command} {self.path}")
        try:
            self._answer([unquote(part) for part in split.path.strip("/").split("/")])
        finally:
            name = self.account.name if self.account else None
            self.hub.requests.append(Request(self.command, self.path, self.status, name))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = answer

    def _answer(self, parts: list[str]) -> None:
        fault = self.fault or Fault("")
        if fault.delay:
            time.sleep(fault.delay)
        if fault.drop == "before":
            return self._hang_up()
        if fault.status is not None:
            return self.send_json({"error": "fault on demand"}, fault.status)
        try:
            with self.hub.lock:
                self.account = self._who()
                self._dispatch(parts)
        except Refusal as refusal:
            self._refuse(refusal)

    def _dispatch(self, parts: list[str]) -> None:
        method = "GET" if self.command == "HEAD" else self.command
        for wanted_method, wanted, name in _ROUTES:
            values = _match(wanted, parts) if wanted_method == method else None
            if values is not None:
                return getattr(self, name)(*values)
        if "resolve" in parts or parts[:2] == ["api", "models"]:  # of a repository without an owner, like "gpt2"
            raise Refusal(404 if self.account else 401, "RepoNotFound", "Repository not found")
        raise Refusal(404, "NotFound", f"This Hub has no {method} {self.path}.")

    def _who(self) -> Account | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in self.hub.accounts:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return self.hub.accounts.get(token)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _refuse(self, refusal: Refusal) -> None:
        headers = {"X-Error-Message": str(refusal)}
        if refusal.code:
            headers["X-Error-Code"] = refusal.code
        self.send_json({"error": str(refusal), **refusal.content}, refusal.status, headers)

    def _hang_up(self) -> None:
        self.close_connection = True
        _close(self.connection)

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def send_json(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send(json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}, status)

    def send(self, content: bytes, headers: Mapping[str, str], status: int = 200) -> None:
        fault = self.fault or Fault("")
        if fault.drop == "after":
            return self._hang_up()
        self.status = status
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: fault.cut])
        if fault.cut is not None:
            self._hang_up()


class _Repositories(_Connection):
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
        self._check_writer(repository_id)
        return repository

    def _check_writer(self, repository_id: str) -> Account:
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

    @_route("GET", "/api/whoami-v2")
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

    @_route("POST", "/api/repos/create")
    def create_repository(self) -> None:
        wanted = self.json()
        owner = wanted.get("organization") or (self.account.name if self.account else "anonymous")
        repository_id, kind = f"{owner}/{wanted['name']}", wanted.get("type") or "model"
        self._check_writer(repository_id)
        url = f"{self.hub.url}/{'' if kind == 'model' else kind + 's/'}{repository_id}"
        if (kind, repository_id) in self.hub.repositories:
            raise Refusal(409, "", "You already created this repo", url=url)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.create(repository_id, kind, private)
        self.send_json({"url": url, "name": repository_id, "id": repository_id})

    @_route("DELETE", "/api/repos/delete")
    def delete_repository(self) -> None:
        wanted = self.json()
        owner = wanted.get("organization") or (self.account.name if self.account else "anonymous")
        kind = wanted.get("type") or "model"
        repository = self.writable(kind + "s", f"{owner}/{wanted['name']}")
        del self.hub.repositories[kind, repository.id]
        self.send_json({})

    @_route("PUT", "/api/{}/{}/{}/settings")
    def change_settings(self, kinds: str, owner: str, name: str) -> None:
        repository, wanted = self.writable(kinds, f"{owner}/{name}"), self.json()
        if "private" in wanted or "visibility" in wanted:
            repository.private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        if "gated" in wanted:
            repository.gated = bool(wanted["gated"])
        self.send_json({})

    @_route("GET", "/api/{}/{}/{}")
    def main_information(self, kinds: str, owner: str, name: str) -> None:
        self.information(kinds, owner, name, "main")

    @_route("GET", "/api/{}/{}/{}/revision/{}")
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
        facts |= {"lastModified": DATE, "createdAt": DATE, "siblings": siblings, "evalResults": _results(commit)}
        if "expand" in self.query:
            facts = {name: facts.get(name) for name in ("_id", "id", "modelId", *self.query["expand"])}
        self.send_json(facts)

    @_route("GET", "/api/{}/{}/{}/refs")
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

    @_route("POST", "/api/{}/{}/{}/branch/{}")
    def create_branch(self, kinds: str, owner: str, name: str, branch: str) -> None:
        repository = self.writable(kinds, f"{owner}/{name}")
        self._create_name(repository, repository.branches, branch, self.json().get("startingPoint") or "main")

    @_route("POST", "/api/{}/{}/{}/tag/{}")
    def create_tag(self, kinds: str, owner: str, name: str, revision: str) -> None:
        repository = self.writable(kinds, f"{owner}/{name}")
        self._create_name(repository, repository.tags, self.json()["tag"], revision)

    def _create_name(self, repository: Repository, names: dict[str, str], name: str, revision: str) -> None:
        if name in names:
            raise Refusal(409, "", f"Reference already exists: {name}")
        names[name] = self.commit_of(repository, revision).sha
        self.send_json({})

    @_route("DELETE", "/api/{}/{}/{}/{}/{}")
    def delete_name(self, kinds: str, owner: str, name: str, what: str, reference: str) -> None:
        repository = self.writable(kinds, f"{owner}/{name}")
        names = repository.branches if what == "branch" else repository.tags
        if what not in ("branch", "tag") or reference not in names:
            raise Refusal(404, "RevisionNotFound", f"Reference not found: {reference}")
        del names[reference]
        self.send_json({})


class _Reading(_Repositories):
    """Trees, files and histories."""

    @_route("GET", "/api/{}/{}/{}/tree/{}")
    def root_tree(self, kinds: str, owner: str, name: str, revision: str) -> None:
        self.tree(kinds, owner, name, revision, "")

    @_route("GET", "/api/{}/{}/{}/tree/{}/{*}")
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

    @_route("POST", "/api/{}/{}/{}/paths-info/{}")
    def paths_information(self, kinds: str, owner: str, name: str, revision: str) -> None:
        commit = self.commit_of(self.repository(kinds, f"{owner}/{name}"), revision)
        is_json = "json" in (self.headers.get("Content-Type") or "")
        paths = self.json()["paths"] if is_json else parse_qs(self.body.decode()).get("paths", [])
        found = _tree(commit, "", True) + [e for e in _tree(commit, "", False) if e["type"] == "directory"]
        self.send_json([entry for entry in found if entry["path"] in paths])

    @_route("GET", "/api/{}/{}/{}/commits/{}")
    def history(self, kinds: str, owner: str, name: str, revision: str) -> None:
        repository = self.repository(kinds, f"{owner}/{name}")
        commits = repository.history(self.commit_of(repository, revision))
        self.send_json(
            [
                {"id": c.sha, "title": c.title, "message": c.description, "date": DATE, "authors": [{"user": c.author}]}
                for c in commits
            ]
        )

    @_route("GET", "/{}/{}/resolve/{}/{*}")
    def model_file(self, owner: str, name: str, revision: str, path: str) -> None:
        self.file("models", owner, name, revision, path)

    @_route("GET", "/{}/{}/{}/resolve/{}/{*}")
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


class _Writing(_Reading):
    """Uploads and commits."""

    @_route("POST", "/api/validate-yaml")
    def validate_card(self) -> None:
        wanted = self.json()
        try:
            faults = faults_of_card(card_metadata(wanted.get("content", "").encode()))
        except Refusal as refusal:
            faults = [str(refusal)]
        if self.hub.strict_cards and faults and wanted.get("repoType", "model") == "model":
            return self.send_json({"errors": [{"message": fault} for fault in faults], "warnings": []}, 400)
        self.send_json({"errors": [], "warnings": []})

    @_route("POST", "/api/{}/{}/{}/preupload/{}")
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

    @_route("POST", "/{}/{}.git/info/lfs/objects/batch")
    def lfs_batch(self, owner: str, name: str) -> None:
        self._batch(self.repository("models", f"{owner}/{name}"))

    @_route("POST", "/{}/{}/{}.git/info/lfs/objects/batch")
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

    @_route("PUT", "/_lfs/{}")
    def lfs_upload(self, oid: str) -> None:
        if File(self.body).sha256 != oid:
            raise Refusal(400, "BadOid", "The content does not have this SHA-256.")
        self.hub.blobs[oid] = self.body
        self.send_json({})

    @_route("POST", "/api/{}/{}/{}/commit/{}")
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


class _Handler(_Writing):
    """Everything, with collections."""

    @_route("GET", "/api/collections")
    def list_collections(self) -> None:
        owners = self.query.get("owner", [])
        found = [c for c in self.hub.collections.values() if not owners or c["owner"]["name"] in owners]
        self.send_json([{key: value for key, value in one.items() if key != "position"} for one in found])

    @_route("POST", "/api/collections")
    def create_collection(self) -> None:
        wanted = self.json()
        owner, title = wanted["namespace"], wanted["title"]
        self._check_writer(f"{owner}/any")
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

    @_route("GET", "/api/collections/{}/{}")
    def collection(self, owner: str, name: str) -> None:
        self.send_json(self._collection(owner, name))

    @_route("POST", "/api/collections/{}/{}/items")
    def add_to_collection(self, owner: str, name: str) -> None:
        found = self._collection(owner, name)
        self._check_writer(f"{owner}/{name}")
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

    @_route("DELETE", "/api/collections/{}/{}")
    def delete_collection(self, owner: str, name: str) -> None:
        self._check_writer(f"{owner}/{name}")
        del self.hub.collections[self._collection(owner, name)["slug"]]
        self.send_json({})


_ROUTES.sort(key=lambda route: sum("{" in piece for piece in route[1]))  # words before placeholders


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


def _results(commit: Commit) -> list[dict[str, Any]]:
    import yaml

    files = [file for path, file in sorted(commit.files.items()) if path.startswith(".eval_results/")]
    return [entry for file in files for entry in yaml.safe_load(file.content)]


def _close(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # the other side was first


def main() -> None:
    """Serve an empty Hub until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    hub = HubServer()
    hub.start(parser.parse_args().port)
    print(f"export HF_ENDPOINT={hub.url} HF_TOKEN=writer HF_HUB_DISABLE_XET=1 HF_HOME=$(mktemp -d)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        hub.stop()


if __name__ == "__main__":
    main()
