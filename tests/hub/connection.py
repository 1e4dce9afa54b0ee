"""One connection to the Hub of the tests: who asks, what goes wrong, what goes out."""

import json
import re
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.store import Commit, Hub, Repository, Request

PIECE = 1 << 14
JSON = "application/json"


class RefusedError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message}
        if code:
            self.headers["X-Error-Code"] = code


class Handler(BaseHTTPRequestHandler):
    """One connection; the server that makes it sets `hub` and what answers which path."""

    protocol_version = "HTTP/1.1"
    hub: Hub
    routes: list[tuple[str, Callable[..., None]]]

    def log_message(self, *anything: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer any method: the table below tells what."""
        self.hub.begun += 1
        length = int(self.headers.get("Content-Length") or 0)
        self.content = self._chunked() if "chunked" in self._header("Transfer-Encoding") else b""
        self.content = self.content or self.rfile.read(length)
        self.sent = 0
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.broken = self.hub.fault(self.command, self.path)
        if self.broken:
            time.sleep(self.broken.silence)
        try:
            if self.broken and self.broken.status:
                self.start(self.broken.status, 0, self.broken.headers)
            else:
                self._route(url.path)
        except RefusedError as refused:
            self.start(refused.status, 0, refused.headers)
        except OSError:
            self.close_connection = True  # the client hung up
        finally:
            self._log()

    def do_HEAD(self) -> None:
        """As GET, without a body."""
        self.do_GET()

    def do_POST(self) -> None:
        """As GET, with a body that came in."""
        self.do_GET()

    def do_PUT(self) -> None:
        """As GET, with a body that came in."""
        self.do_GET()

    def _route(self, path: str) -> None:
        for pattern, answer in self.routes:
            if found := re.fullmatch(pattern, path):
                answer(
                    self, **{key: unquote(text or "") for key, text in found.groupdict().items()}
                )
                return
        raise RefusedError(404, f"no route {path}")

    def _header(self, name: str) -> str:
        return self.headers.get(name) or ""

    def _chunked(self) -> bytes:
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _log(self) -> None:
        token = self._header("Authorization").removeprefix("Bearer ") or None
        self.hub.requests.append(
            Request(
                self.command,
                self.path,
                self.headers.get("Range"),
                self._header("User-Agent"),
                token,
                self.sent,
            )
        )

    @property
    def base(self) -> str:
        """The address of the server as the client knows it."""
        return f"http://{self._header('Host')}"

    @property
    def user(self) -> str | None:
        """Who asks. Raises RefusedError for a token nobody has."""
        token = self._header("Authorization").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def member(self) -> str:
        """Who asks, where one must be known."""
        user = self.user
        if user is None:
            raise RefusedError(401, "Invalid username or password.")
        return user

    def visible(self, name: str, files: bool = False) -> Repository:
        """The repository, if this user may see it, or read its `files`."""
        repository = self.hub.repositories.get(name)
        user = self.user
        if repository is None or (repository.private and user not in repository.readers):
            raise RefusedError(404 if user else 401, "Repository not found", "RepoNotFound")
        if files and repository.gated and user not in repository.readers:
            message = f"Access to model {name} is restricted."
            raise RefusedError(403 if user else 401, message, "GatedRepo")
        return repository

    def commit_of(self, name: str, revision: str, files: bool = False) -> Commit:
        """The commit of a revision."""
        found = self.visible(name, files).at(revision)
        if found is None:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def answer(self, facts: Any, status: int = 200, kind: str = JSON, **more: str) -> None:
        """Send JSON, with `more` headers."""
        data = json.dumps(facts).encode()
        more = {name.replace("_", "-"): text for name, text in more.items()}
        self.start(status, len(data), {"Content-Type": kind, **more})
        self._send(data)

    def start(self, status: int, length: int, headers: dict[str, str]) -> None:
        """Send status and headers."""
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, data: bytes) -> None:
        if self.command == "HEAD":
            return
        cut = self.broken.cut if self.broken else None
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE][: None if cut is None else max(cut - start, 0)]
            self.wfile.write(piece)
            self.wfile.flush()
            self.sent += len(piece)
            if cut is not None and self.sent >= cut:
                self.close_connection = True
                return
            if self.broken and self.broken.pause:
                time.sleep(self.broken.pause)

    def send_file(self, data: bytes, headers: dict[str, str]) -> None:
        """A whole file, or the range that was asked for."""
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self._header("Range"))
        status, part = 200, data
        if found:
            start, stop = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
            if start >= len(data):
                raise RefusedError(416, "Range not satisfiable")
            status, part = 206, data[start : stop + 1]
            headers = {**headers, "Content-Range": f"bytes {start}-{stop}/{len(data)}"}
        self.start(status, len(part), {"Accept-Ranges": "bytes", **headers})
        self._send(part)
