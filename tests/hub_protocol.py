"""Requests to the Hub of the tests: who asks, what answers, and what goes wrong on demand."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_store import Account, Refusal


if TYPE_CHECKING:
    from hub_server import HubServer


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


Route = Callable[..., None]
ROUTES: list[tuple[str, list[str], str]] = []  # method, parts of the path, name of the handler's method


def route(method: str, path: str) -> Callable[[Route], Route]:
    """Let a method of the handler answer a path; `{}` is one part of it, `{*}` all that remain."""

    def register(function: Route) -> Route:
        ROUTES.append((method, path.strip("/").split("/"), function.__name__))
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


class Connection(BaseHTTPRequestHandler):
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
        with contextlib.suppress(OSError):  # the client, or `stop`, closed the connection
            super().handle()

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
            return self.hang_up()
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
        for wanted_method, wanted, name in ROUTES:
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

    def hang_up(self) -> None:
        self.close_connection = True
        close(self.connection)

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def send_json(self, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send(json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}, status)

    def send(self, content: bytes, headers: Mapping[str, str], status: int = 200) -> None:
        fault = self.fault or Fault("")
        if fault.drop == "after":
            return self.hang_up()
        self.status = status
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: fault.cut])
        if fault.cut is not None:
            self.hang_up()


def close(connection: socket.socket) -> None:
    """Break a connection off, whatever is under way."""
    with contextlib.suppress(OSError):  # the other side was first
        connection.shutdown(socket.SHUT_RDWR)
