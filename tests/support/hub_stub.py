"""A small Hub on 127.0.0.1, for the reading half of huggingface_hub: commits, files, ranges, and failures on demand.

A repo is fed from a local directory; every `HubStub.commit` freezes what lies in it and moves a branch. Files named
``*.safetensors`` are "LFS": with ``cdn`` on, they are redirected to another host (``localhost`` instead of
``127.0.0.1``) under a signed URL. A `Fault` changes the next answers that it matches. Every request is logged.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

SIGNATURE = "X-Amz-Signature=s3cr3tsignature"


@dataclass(frozen=True)
class Request:
    """One request that was answered; ``sent`` counts the bytes of the body."""

    method: str
    path: str
    host: str
    range: str | None
    authorization: str | None
    status: int
    sent: int


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests of this method whose path contains ``path``.

    A ``status`` answers with an error, ``drop`` closes the connection instead of answering, ``cut`` closes it after so
    many bytes of the body, and ``ignore_range`` answers a range request with the whole file.
    """

    path: str
    method: str = "GET"
    times: int = 1
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    drop: bool = False
    cut: int | None = None
    ignore_range: bool = False


@dataclass
class Repo:
    """Commits by sha, and the sha that each branch or tag stands for. ``extra`` are names that only the listing has."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False
    extra: tuple[str, ...] = ()


class HubStub:
    """The stub's state, which a test changes, and its log, which a test reads."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.cdn = False
        #: Called with the method and path of each request before it is answered.
        self.on_request: Callable[[str, str], None] = lambda method, path: None
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self.server.daemon_threads = True
        setattr(self.server, "hub", self)  # noqa: B010 - the handler's only way to its state

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def commit(self, repo: str, folder: Path, branch: str = "main") -> str:
        """Freeze the files of ``folder`` as a commit of ``repo``, move ``branch`` to it and return its sha."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        digest = hashlib.sha1(repo.encode())
        for name in sorted(files):
            digest.update(name.encode() + b"\0" + files[name] + b"\0")
        sha = digest.hexdigest()
        state = self.repos.setdefault(repo, Repo())
        state.commits[sha] = files
        state.refs[branch] = sha
        return sha

    def sent(self, name: str) -> int:
        """Bytes sent so far of bodies of the file ``name``."""
        return sum(request.sent for request in self.requests if request.path.endswith("/" + name))

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and fault.path in path:
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def running_hub() -> Iterator[HubStub]:
    """A `HubStub` that serves until the block is left."""
    hub = HubStub()
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()


class _RefusedError(Exception):
    """An answer other than the file, as the Hub gives it: a status, a code and a message."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {"X-Error-Message": message}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr; `HubStub.requests` is the log."""

    @property
    def hub(self) -> HubStub:
        hub: HubStub = self.server.hub  # type: ignore[attr-defined]
        return hub

    def _serve(self) -> None:
        self.hub.on_request(self.command, self.path)
        self.fault = self.hub.take_fault(self.command, self.path)
        try:
            if self.fault and self.fault.drop:
                self.close_connection = True
            elif self.fault and self.fault.status:
                self._answer(self.fault.status, dict(self.fault.headers), b"out of order")
            else:
                self._route(unquote(urlsplit(self.path).path))
        except _RefusedError as refusal:
            self._answer(refusal.status, refusal.headers, b"")

    def _route(self, path: str) -> None:
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._describe(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._list(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            self._file(self.hub.repos[match[1]].commits[match[2]][match[3]], {})
        else:
            raise _RefusedError(404, "", "no such route")

    def _repo(self, name: str, reads_file: bool) -> Repo:
        repo = self.hub.repos.get(name)
        known = repo is not None and repo.token in (None, (self.headers["Authorization"] or "")[len("Bearer ") :])
        if repo is None or (not known and not repo.gated):
            # The Hub does not let on whether a private repo exists.
            raise _RefusedError(404, "RepoNotFound", "Repository not found")
        if not known and reads_file:
            raise _RefusedError(401, "GatedRepo", f"Access to model {name} is restricted. Please log in.")
        return repo

    def _commit(self, repo: Repo, revision: str) -> str:
        sha = repo.refs.get(revision, revision)
        if sha not in repo.commits:
            raise _RefusedError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def _describe(self, name: str, revision: str) -> None:
        repo = self._repo(name, reads_file=False)
        sha = self._commit(repo, revision)
        sized = "blobs=" in self.path
        siblings = [
            {"rfilename": file, "size": len(data), "blobId": _etag(data)} if sized else {"rfilename": file}
            for file, data in [*repo.commits[sha].items(), *((file, b"") for file in repo.extra)]
        ]
        self._json({"_id": sha, "id": name, "modelId": name, "sha": sha, "private": False, "siblings": siblings})

    def _list(self, name: str, revision: str) -> None:
        repo = self._repo(name, reads_file=False)
        files = repo.commits[self._commit(repo, revision)]
        self._json(
            [{"type": "file", "path": file, "size": len(files[file]), "oid": _etag(files[file])} for file in files]
        )

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repo = self._repo(name, reads_file=True)
        sha = self._commit(repo, revision)
        data = repo.commits[sha].get(file)
        if data is None:
            raise _RefusedError(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_etag(data)}"'}
        if self.hub.cdn and file.endswith(".safetensors"):
            headers["X-Linked-Etag"] = headers["ETag"]
            headers["X-Linked-Size"] = str(len(data))
            away = f"http://localhost:{self.hub.server.server_port}"
            headers["Location"] = f"{away}/cdn/{name}/{sha}/{quote(file)}?{SIGNATURE}"
            self._answer(302, headers, b"")
        else:
            self._file(data, headers)

    def _json(self, value: object) -> None:
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _file(self, data: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if asked is None or (self.fault and self.fault.ignore_range):
            self._answer(200, headers, data)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if first >= len(data):
            raise _RefusedError(416, "", "Range not satisfiable")
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self._answer(206, headers, data[first : last + 1])

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        cut = self.fault.cut if self.fault else None
        sent = 0 if self.command == "HEAD" else len(body if cut is None else body[:cut])
        # Logged before it is sent: a client that has its answer may look at the log at once.
        with self.hub.lock:
            self.hub.requests.append(
                Request(
                    method=self.command,
                    path=urlsplit(self.path).path,
                    host=self.headers["Host"].partition(":")[0],
                    range=self.headers["Range"],
                    authorization=self.headers["Authorization"],
                    status=status,
                    sent=sent,
                )
            )
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        try:
            self.end_headers()
            self.wfile.write(body[:sent])
        except OSError:  # the client had enough
            self.close_connection = True
        self.close_connection = self.close_connection or cut is not None


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
