"""A Hub of one's own: the routes huggingface_hub speaks, over HTTP, with faults to order.

Serves repositories from dictionaries: the model's information, its tree, its files by HEAD and
GET with ranges, large files through a redirect to another path, as the Hub's storage does.
"""

import hashlib
import json
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".model", ".gguf")  # what goes to the large file storage
PIECE = 8192


@dataclass
class Repo:
    """Files by commit, branches by name, and what is wrong with it."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    gated: bool = False
    private: bool = False


@dataclass
class Fault:
    """What happens to the bodies of a file whose name ends so; each only `times` times."""

    name: str
    times: int = 1
    cut_after: int | None = None  # bytes, then the connection ends
    status: int | None = None
    retry_after: str | None = None
    flip: bool = False  # one byte is another
    short: int = 0  # bytes that are missing without a word
    hold: threading.Event | None = None  # after the first piece, wait for it
    ignore_range: bool = False
    head: dict[str, str] = field(default_factory=dict)  # other headers


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed in the middle are what this server is for."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class Hub:
    """A running server; what was asked is kept in `asked`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.tokens: dict[str, set[str]] = {}  # token -> gated repositories it may read
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.sent: Counter[str] = Counter()  # bytes of bodies, by file name
        self.started = threading.Event()  # a body that is held has begun
        self._lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            def __init__(self, *args: Any) -> None:
                self.hub = hub
                super().__init__(*args)

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # Another name of this machine is another host, to which no token may go.
        self.storage = f"http://localhost:{self._server.server_port}"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def add(self, name: str, files: dict[str, bytes], **more: Any) -> str:
        """A repository with one commit on main; the commit."""
        commit = commit_of(files)
        repo = self.repos.setdefault(name, Repo({}, {}, **more))
        repo.commits[commit] = files
        repo.branches["main"] = commit
        return commit

    def gets(self, name: str) -> list[dict[str, str]]:
        """The headers of every GET of a file's body, redirects not counted."""
        return [h for method, path, h in self.asked if method == "GET"
                and path.startswith("/body/") and path.endswith(f"/{name}")]  # fmt: skip

    def fault(self, name: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and name.endswith(fault.name):
                    fault.times -= 1
                    return fault
        return None


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_large(name: str) -> bool:
    return name.endswith(LARGE)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing is printed."""

    def do_HEAD(self) -> None:
        self._route("HEAD")

    def do_GET(self) -> None:
        self._route("GET")

    def _route(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        headers = {key.lower(): value for key, value in self.headers.items()}
        self.hub.asked.append((method, path, headers))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/(.+))?", path):
            self._api(*found.groups())
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(method, *found.groups())
        elif found := re.fullmatch(r"/body/([^/]+/[^/]+)/([0-9a-f]+)/(.+)", path):
            repo, commit, name = found.groups()
            self._body(method, self.hub.repos[repo].commits[commit][name], name, {})
        else:
            self._refuse(404, "RepoNotFound")

    def _api(self, name: str, kind: str | None, revision: str | None) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        commit = self._commit(repo, revision or "main")
        if commit is None:
            self._refuse(404, "RevisionNotFound")
            return
        files = repo.commits[commit]
        if kind == "tree":
            self._json([_entry(path, data) for path, data in files.items()])
            return
        siblings = [{"rfilename": path} for path in files]
        self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings,
                    "private": repo.private, "gated": "manual" if repo.gated else False,
                    "tags": [], "downloads": 0, "likes": 0})  # fmt: skip

    def _resolve(self, method: str, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        if repo.gated and name not in self.hub.tokens.get(self._token(), set()):
            self._refuse(403 if self._token() else 401, "GatedRepo")
            return
        commit = self._commit(repo, revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound")
            return
        data = repo.commits[commit].get(path)
        if data is None:
            self._refuse(404, "EntryNotFound", {"X-Repo-Commit": commit})
            return
        about = {"X-Repo-Commit": commit, "ETag": f'"{git_oid(data)}"'}
        if is_large(path):
            about |= {"X-Linked-Etag": f'"{sha256(data)}"', "X-Linked-Size": str(len(data))}
            self._send(302, about | {"Location": f"{self.hub.storage}/body/{name}/{commit}/{path}",
                                     "ETag": '"of-a-pointer"'} | self._head_of(path))  # fmt: skip
        elif method == "HEAD":
            self._send(200, about | self._head_of(path), length=len(data))
        else:
            self.hub.asked.append(("GET", f"/body/{name}/{commit}/{path}", {}))
            self._body(method, data, path, about)

    def _head_of(self, path: str) -> dict[str, str]:
        return next((f.head for f in self.hub.faults if f.head and path.endswith(f.name)), {})

    def _body(self, method: str, data: bytes, name: str, about: dict[str, str]) -> None:
        fault = self.hub.fault(name) or Fault(name)
        if fault.status is not None:
            more = {"Retry-After": fault.retry_after} if fault.retry_after else {}
            self._send(fault.status, more)
            return
        if fault.flip:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and not fault.ignore_range:
            start = int(asked[1])
            if start >= len(data):
                self._send(416, {"Content-Range": f"bytes */{len(data)}"})
                return
            about = about | {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        body = data[start : len(data) - fault.short]
        if fault.short:
            about.pop("Content-Range", None)
        self._send(206 if "Content-Range" in about else 200, about, length=len(body))
        self._pour(body, name, fault)

    def _pour(self, body: bytes, name: str, fault: Fault) -> None:
        end = len(body) if fault.cut_after is None else min(fault.cut_after, len(body))
        for at in range(0, end, PIECE):
            piece = body[at : min(at + PIECE, end)]
            try:
                self.wfile.write(piece)
                self.wfile.flush()
            except OSError:
                self.close_connection = True
                return
            self.hub.sent[name] += len(piece)
            if fault.hold is not None and at + PIECE >= end // 2:
                self.hub.started.set()
                fault.hold.wait(20)
        if end < len(body):
            self.close_connection = True

    def _repo(self, name: str) -> Repo | None:
        repo = self.hub.repos.get(name)
        if self._token() and self._token() not in self.hub.tokens:
            self._refuse(
                401, "", {"X-Error-Message": "Invalid credentials in Authorization header"}
            )
            return None
        if repo is None or (repo.private and not self._token()):
            self._refuse(401 if not self._token() else 404, "RepoNotFound")
            return None
        return repo

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _commit(self, repo: Repo, revision: str) -> str | None:
        commit = repo.branches.get(revision, revision)
        return commit if commit in repo.commits else None

    def _json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self._send(200, {"Content-Type": "application/json"}, length=len(data))
        self.wfile.write(data)

    def _refuse(self, status: int, code: str, more: dict[str, str] | None = None) -> None:
        self._send(status, ({"X-Error-Code": code} if code else {}) | (more or {}))

    def _send(self, status: int, headers: dict[str, str], length: int = 0) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()


def _entry(path: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file", "path": path, "size": len(data), "oid": git_oid(data),
    }  # fmt: skip
    if is_large(path):
        entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
    return entry


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub that runs while the block does."""
    hub = Hub()
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()
