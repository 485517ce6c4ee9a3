"""Repos of the Hugging Face Hub, read with huggingface_hub: its cache, token, endpoint and offline mode apply.

A revision is resolved to a commit once; every later request is for the commit, so a branch may move. A plan reads
headers as byte ranges. Opening a reader downloads the shard into the cache. Small files are cached when they are read,
so that a later run works offline. File names are untrusted.

Only this module imports huggingface_hub. It works with every version from 0.30 on: they use requests, then httpx, then
httpx2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub.utils
from huggingface_hub import HfApi, constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from shardmerge.errors import MissingError, SourceError
from shardmerge.sources.local import LocalReader, LocalSource
from shardmerge.sources.source import looked_in
from shardmerge.spec.tensors import SourceFile
from shardmerge.version import __version__

T = TypeVar("T")

IS_PINNED = True
_SCHEME = "hub://"
#: Bytes; smaller files are cached for an offline run.
_SMALL = 1_000_000
_CHUNK = 1 << 16
_ATTEMPTS = 3
_BUSY = (408, 429, 500, 502, 503, 504)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_URI = re.compile(_SCHEME + r"([^/@]+/[^/@]+)@([0-9a-f]{40})/(.+)")
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN"
_SECRETS = (
    (re.compile(r"bearer\s.*", re.IGNORECASE), "Bearer …"),
    (re.compile(r"\bhf_[A-Za-z0-9]{16,}"), "hf_…"),
    (re.compile(r"\?[^\s'\"]*=[^\s'\"]*"), ""),  # a signed URL is a token
    (re.compile(r"://[^/\s@]+@"), "://"),
)

_CLIENT: dict[str, Any] = {"library_name": "shardmerge", "library_version": __version__}
_API = HfApi(**_CLIENT)
_UTILS: Any = huggingface_hub.utils  # mypy does not see its lazy exports


class HubSource:
    """A model repo at one commit. ``note`` says why the local cache is used instead of the Hub, if it is."""

    local_path: Path | None = None

    def __init__(
        self, repo: str, commit: str, sizes: Mapping[str, int | None], asked: str, unreachable: str | None = None
    ) -> None:
        self.location = repo
        self.revision: str = commit
        self.note: str | None = None
        if unreachable:
            self.note = f"{repo}: {unreachable}; the cache is used, with commit {commit} and {len(sizes)} of its files"
        self._sizes = dict(sizes)
        self._asked = asked
        self._unreachable = unreachable

    @classmethod
    def open(cls, location: str) -> HubSource:
        """The repo ``org/name`` or ``org/name@revision``; a revision is a branch, a tag or a commit.

        If the Hub cannot be reached, or may not be (``HF_HUB_OFFLINE``), the cached commit with the files that are
        there. Raises `SourceError`.
        """
        repo, _, asked = location.partition("@")
        asked = asked or constants.DEFAULT_REVISION
        if not _is_safe(asked):
            raise SourceError(f"{location}: {asked!r} is not a revision")
        timeout = float(constants.HF_HUB_ETAG_TIMEOUT)
        try:
            info = _API.model_info(repo, revision=asked, files_metadata=True, timeout=timeout)
        except Exception as error:
            if _is_unreachable(error):
                return cls._from_cache(location, repo, asked, _reason(error))
            kind = MissingError if isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError)) else SourceError
            where = f"no local file or directory{looked_in(location)}"
            raise kind(f"{location}: {where}, and on the Hub: {_reason(error)}") from None
        commit = info.sha or ""
        if not _COMMIT.fullmatch(commit):
            raise SourceError(f"{location}: the Hub answers with {commit!r}; expected a commit")
        siblings = info.siblings or []
        return cls(repo, commit, {file.rfilename: file.size for file in siblings if _is_visible(file.rfilename)}, asked)

    @classmethod
    def _from_cache(cls, location: str, repo: str, asked: str, why: str) -> HubSource:
        try:
            folder = _cached_snapshot(repo, asked)
        except Exception:
            where = f"no local file or directory{looked_in(location)}, not in the cache ({constants.HF_HUB_CACHE})"
            raise MissingError(f"{location}: {where}, and {why}. {_to_cache(repo, asked)}") from None
        files = LocalSource(str(folder))
        # The blob that a link points to may be missing.
        sizes = {name: files.stat(name).size for name in files.names() if (folder / name).exists()}
        return cls(repo, folder.name, sizes, asked=folder.name, unreachable=why)

    def directory(self) -> HubSource:
        return self

    def names(self) -> list[str]:
        return sorted(self._sizes)

    def leads_out(self, name: str) -> bool:
        path = _cached(self.location, name, self.revision)
        return path is not None and LocalSource(str(path.parent)).leads_out(path.name)

    def stat(self, name: str) -> SourceFile:
        what = f"{self.location}@{self.revision}/{name}"
        if not _is_safe(name):
            raise SourceError(f"{self.location}: {name!r} is not the name of a file in a repo")
        if name not in self._sizes:
            problem = "there is no such file in the repo"
            if self._unreachable:
                hint = _to_cache(self.location, self.revision, name)
                problem = f"it is not in the cache, and {self._unreachable}. {hint}"
            raise SourceError(f"{what}: {problem}")
        size = self._sizes[name]
        if size is None:
            raise SourceError(f"{what}: the Hub does not report its size")
        return SourceFile(uri=_SCHEME + what, size=size)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """See `Source.read`. An index, and a small file that is read whole, is cached; any other read is a range."""
        total = self.stat(name).size
        size = max(0, min(size, total - offset))
        if name.endswith(".index.json") or (offset == 0 and size == total < _SMALL):
            path: Path | None = self.fetch(name)
            self._name_commit(name)
        else:
            path = _cached(self.location, name, self.revision)
        if path is not None:
            return LocalSource(str(path.parent)).read(path.name, offset, size)
        if not size:
            return b""
        url = hf_hub_url(self.location, name, revision=self.revision, endpoint=_API.endpoint)
        try:
            return _persistently(partial(_get_range, url, offset, size))
        except Exception as error:
            raise SourceError(f"{self.location}@{self.revision}/{name}: {_reason(error)}") from None

    def fetch(self, name: str) -> Path:
        self.stat(name)
        return _download(self.location, name, self.revision, self.revision)

    def _name_commit(self, name: str) -> None:
        """Have the cache note the commit of the revision that the person named, for offline runs.

        The client notes it only when a file is requested by that revision. A failure, or a branch that has moved since,
        does no harm.
        """
        if self._asked == self.revision:
            return
        known = _cached(self.location, name, self._asked)
        if known is None or self.revision not in known.parts:
            with suppress(SourceError):
                _download(self.location, name, self._asked, self.revision)
        self._asked = self.revision


def open_source(location: str) -> HubSource:
    return HubSource.open(location.removeprefix(_SCHEME))


def open_reader(file: SourceFile) -> LocalReader:
    """A reader of the cached copy of a file, which the first reader downloads. Raises `SourceError`."""
    match = _URI.fullmatch(file.uri)
    if match is None or not _is_safe(match[3]):
        raise SourceError(f"{file.uri!r} is not of the form {_SCHEME}org/name@commit/file")
    repo, commit, name = match.groups()
    return LocalReader(file, path=str(_download(repo, name, commit, commit)))


def _is_safe(name: str) -> bool:
    """Whether a name stays inside the folder that it is appended to."""
    return name.isprintable() and "\\" not in name and not {"", ".", ".."}.intersection(name.split("/"))


def _is_visible(name: str) -> bool:
    return _is_safe(name) and not any(part.startswith(".") for part in name.split("/"))


def _cached(repo: str, name: str, revision: str) -> Path | None:
    path = try_to_load_from_cache(repo, name, revision=revision)
    return Path(path) if isinstance(path, str) else None


def _cached_snapshot(repo: str, asked: str) -> Path:
    """The cached folder of the last known commit of a revision. Files may be missing in it."""
    try:
        folder = Path(_API.snapshot_download(repo, revision=asked, local_files_only=True))
    except LocalEntryNotFoundError as error:
        # Newer versions refuse an incomplete snapshot, but report its path.
        folder = Path(getattr(error, "snapshot_path", ""))
    if not _COMMIT.fullmatch(folder.name):
        raise SourceError(f"{repo}@{asked}: not in the cache")
    return folder


def _download(repo: str, name: str, revision: str, commit: str) -> Path:
    """The cached copy of a file, downloaded if necessary. A `SourceError` names ``commit``."""
    try:
        path = Path(_persistently(partial(_API.hf_hub_download, repo, name, revision=revision)))
    except Exception as error:
        problem = _reason(error)
        if isinstance(error, LocalEntryNotFoundError):
            problem = f"it is not in the cache, and {problem}. {_to_cache(repo, commit, name)}"
        raise SourceError(f"{repo}@{commit}/{name}: {problem}") from None
    return LocalSource(str(path.parent)).fetch(path.name)  # the cache is untrusted


def _persistently(ask: Callable[[], T]) -> T:
    """The result of ``ask``, repeated if the connection breaks: the client does that only in some places."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return ask()
        except Exception as error:
            if not _is_broken_connection(error):
                raise
    return ask()


def _get_range(url: str, offset: int, size: int) -> bytes:
    """A byte range of ``url``. Busy servers are asked again; a server that ignores ranges is cut off after it."""
    # A compressed answer would not be a range of the file.
    wanted = {"Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
    options = {
        "headers": _UTILS.build_hf_headers(**_CLIENT) | wanted,
        "timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT,
        "retry_on_status_codes": _BUSY,
        # The client would retry while the body is being read, which cannot work.
        "retry_on_exceptions": (),
    }
    if hasattr(_UTILS, "http_stream_backoff"):
        request = _UTILS.http_stream_backoff("GET", url, **options)
    else:
        request = _UTILS.http_backoff("GET", url, stream=True, **options)
    data = bytearray()
    with request as response:
        _UTILS.hf_raise_for_status(response)
        end = size if response.status_code == 206 else offset + size
        chunks = response.iter_bytes if hasattr(response, "iter_bytes") else response.iter_content
        for chunk in chunks(_CHUNK):
            data += chunk
            if len(data) > end:
                break
    if len(data) < end:
        raise OSError(f"{len(data)} bytes arrived, {end} were requested")
    return bytes(data[end - size : end])


def _to_cache(repo: str, revision: str, name: str = "") -> str:
    command = " ".join(filter(None, ["hf download", repo, name, "--revision", revision]))
    return f"With a connection, `{command}` puts it there"


# --- errors of the client ---------------------------------------------------------------------------------------------


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error, if there was an answer."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_broken_connection(error: BaseException) -> bool:
    return _status(error) is None and type(error).__module__.startswith(("httpx", "requests"))


def _is_unreachable(error: BaseException) -> bool:
    """Whether the Hub did not answer, or answered that it is down."""
    if (status := _status(error)) is not None:
        return status >= 500
    return _is_broken_connection(error) or isinstance(error, (ConnectionError, TimeoutError))


def _reason(error: BaseException) -> str:
    """Why the client failed, for a person; without secrets."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    status, text = _status(error), _redacted(": ".join(filter(None, (type(error).__name__, str(error)))))
    said = getattr(error, "server_message", None)
    answer = f"HTTP {status}" + (f": {_redacted(said)}" if said else "")
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if isinstance(error, GatedRepoError) or (status in (401, 403) and not isinstance(error, RepositoryNotFoundError)):
        return f"access is refused ({answer}). {_LOG_IN}, as someone who was granted access"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no such repo, or it is private. {_LOG_IN}, if it is"
    if isinstance(error, RevisionNotFoundError):
        return "the repo has no such revision (branch, tag or commit)"
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return "there is no such file in the repo"
    if status is not None:
        return f"{_redacted(_API.endpoint)} answers with an error ({answer})"
    return f"{_redacted(_API.endpoint)} cannot be reached ({text})" if _is_unreachable(error) else text


def _redacted(text: str) -> str:
    """``text`` in one line of 300 characters at most, without tokens, passwords and signatures."""
    line = " ".join(text.split())
    for pattern, instead in _SECRETS:
        line = pattern.sub(instead, line)
    return line if len(line) <= 300 else line[:299] + "…"
