"""A Hugging Face Hub on the loopback interface: repositories, commits, LFS, tokens, and faults on demand.

For tests of pushing and pulling with the real `huggingface_hub` client, and for trying them by hand:

    python tests/hub_server.py            # prints what to set: HF_ENDPOINT, HF_TOKEN, HF_HUB_DISABLE_XET

Not here: the xet protocol (clients need HF_HUB_DISABLE_XET=1), the CDN of large files, discussions.
"""

from __future__ import annotations

import argparse
import re
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hub_protocol import Fault, Request, close
from hub_store import Account, Commit, File, Repository, read_folder
from hub_writing import Handler


TOKENS = {"writer": "user", "reader": "user:read", "stranger": "stranger"}
LFS = (".safetensors", ".bin", ".pt", ".pth", ".model", ".png")


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
        handler = type("HandlerOfThisHub", (Handler,), {"hub": self})
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
            close(connection)

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

    def create(
        self, repository_id: str, kind: str = "model", private: bool = False, gated: bool = False
    ) -> Repository:
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


def main() -> None:
    """Serve an empty Hub until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0, help="default: a free one")
    hub = HubServer()
    hub.start(parser.parse_args().port)
    print(f"export HF_ENDPOINT={hub.url} HF_TOKEN=writer HF_HUB_DISABLE_XET=1 HF_HOME=$(mktemp -d)", flush=True)  # noqa: T201
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        hub.stop()


if __name__ == "__main__":
    main()
