"""Sources and readers: local files in this process, the Hub by its real client in another one, against a stub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from shardmerge.errors import SourceError
from shardmerge.sources.hub import _redacted as redacted
from shardmerge.sources.local import LocalReader, LocalSource
from shardmerge.sources.source import open_reader, open_source
from shardmerge.spec.tensors import SourceFile
from tests.support.hub_stub import SIGNATURE, Fault, HubStub, running_hub

ROOT = Path(__file__).resolve().parents[2]
REPO = "org/model"
SHARD = "model.safetensors"
HEADER = b'{"a": "header"}'
DATA = len(HEADER).to_bytes(8, "little") + HEADER + bytes(range(256)) * 8000  # 2 MB
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz012345"

#: Runs ``argv[1]`` and prints what it leaves in ``result``, or its `SourceError`; the client's waits take no time.
RUNNER = """
import json, sys, time
time.sleep = lambda seconds: None
from shardmerge.errors import SourceError
from shardmerge.sources.source import open_reader, open_source
from shardmerge.spec.tensors import SourceFile

def error_of(function, *arguments):
    try:
        function(*arguments)
    except SourceError as error:
        return str(error)

scope = dict(open_reader=open_reader, open_source=open_source, SourceFile=SourceFile, error_of=error_of, sys=sys)
try:
    exec(sys.argv[1], scope)
    print(json.dumps({"result": scope.get("result")}))
except SourceError as error:
    print(json.dumps({"error": str(error)}))
"""


@dataclass
class Answer:
    """What a client process said: the value or the error, and everything it printed."""

    result: Any
    error: str | None
    printed: str


class Client:
    """Runs code in a process of its own, with an empty cache that lasts for the test."""

    version = tuple(map(int, version("huggingface_hub").split(".")[:2]))

    def __init__(self, hub: HubStub, home: Path) -> None:
        self.hub = hub
        self.home = home

    def run(self, code: str, **env: str) -> Answer:
        settings = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.home),
            "HF_HOME": str(self.home),
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "*",
        }
        command = [sys.executable, "-c", RUNNER, code]
        done = subprocess.run(command, env=settings | env, cwd=self.home, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout.splitlines()[-1])
        return Answer(said.get("result"), said.get("error"), done.stdout + done.stderr)

    def result(self, code: str, **env: str) -> Any:
        answer = self.run(code, **env)
        assert answer.error is None
        return answer.result

    def error(self, code: str, **env: str) -> str:
        answer = self.run(code, **env)
        assert answer.error is not None, answer.result
        return answer.error

    def cached(self) -> list[str]:
        """Names of the files in the cache's snapshots."""
        return sorted(path.name for path in self.home.glob("hub/models--*/snapshots/*/**/*") if path.is_file())


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubStub]:
    folder = tmp_path / "repo"
    write(folder, {"config.json": b'{"v": 1}', SHARD: DATA, "model.safetensors.index.json": b"{}", ".hidden": b""})
    with running_hub() as stub:
        stub.commit(REPO, folder)
        yield stub


@pytest.fixture
def client(hub: HubStub, tmp_path: Path) -> Client:
    home = tmp_path / "home"
    home.mkdir()
    return Client(hub, home)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


class TestLocalSource:
    def test_names_are_sorted_relative_and_without_hidden_ones(self, tmp_path: Path) -> None:
        write(tmp_path, dict.fromkeys(["b.json", "a/z.py", "a/.x", ".git/config", ".env", "c.txt"], b""))
        assert LocalSource(str(tmp_path)).names() == ["a/z.py", "b.json", "c.txt"]

    def test_what_is_no_regular_file_has_a_name_and_is_refused(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "dangling").symlink_to("nowhere")
        source = LocalSource(str(tmp_path))
        assert source.names() == ["dangling", "pipe"]
        for name, why in (("dangling", "leads nowhere"), ("pipe", "is a FIFO")):
            for use in (source.stat, source.fetch, lambda name: source.read(name, 0, 1)):
                with pytest.raises(SourceError, match=f"{name}: .*{why}"):
                    use(name)

    def test_a_file_is_a_directory_of_one(self, tmp_path: Path) -> None:
        write(tmp_path, {"one.safetensors": b"12345", "other.json": b""})
        source = open_source(str(tmp_path / "one.safetensors"))
        assert source.names() == ["one.safetensors"]
        assert source.location == str(tmp_path / "one.safetensors")
        assert source.stat("one.safetensors").size == 5

    @pytest.mark.parametrize(
        ("offset", "size", "expected"), [(0, 3, b"012"), (2, 2, b"23"), (3, 99, b"34"), (9, 1, b""), (0, 0, b"")]
    )
    def test_read(self, tmp_path: Path, offset: int, size: int, expected: bytes) -> None:
        write(tmp_path, {"f": b"01234"})
        assert LocalSource(str(tmp_path)).read("f", offset, size) == expected

    def test_stat_and_fetch(self, tmp_path: Path) -> None:
        write(tmp_path, {"a/f": b"01234"})
        source = LocalSource(str(tmp_path))
        status = (tmp_path / "a/f").stat()
        identity = (status.st_mtime_ns, status.st_ino, status.st_dev, status.st_ctime_ns)
        assert source.stat("a/f") == SourceFile(str(tmp_path / "a/f"), 5, *identity)
        assert source.fetch("a/f") == tmp_path / "a/f"

    @pytest.mark.parametrize("method", ["stat", "read"])
    def test_a_missing_file_is_named(self, tmp_path: Path, method: str) -> None:
        source = LocalSource(str(tmp_path))
        with pytest.raises(SourceError, match="nothere: cannot be read: No such file"):
            source.stat("nothere") if method == "stat" else source.read("nothere", 0, 1)


class TestLocalReader:
    @pytest.fixture
    def file(self, tmp_path: Path) -> SourceFile:
        write(tmp_path, {"f": b"0123456789"})
        return LocalSource(str(tmp_path)).stat("f")

    def test_reads_into_a_view(self, file: SourceFile) -> None:
        reader = open_reader(file)
        buffer = bytearray(4)
        reader.read_into(3, memoryview(buffer))
        assert buffer == b"3456"
        reader.close()
        reader.close()

    def test_a_file_that_ends_too_soon(self, file: SourceFile) -> None:
        reader = LocalReader(file)
        os.truncate(file.uri, 6)
        with pytest.raises(SourceError, match="ends at byte 6, 4 bytes short"):
            reader.read_into(2, memoryview(bytearray(8)))
        reader.close()

    @pytest.mark.parametrize("change", ["size", "time"])
    def test_a_file_that_changed_since_the_plan(self, file: SourceFile, change: str) -> None:
        if change == "size":
            os.truncate(file.uri, 6)
        else:
            os.utime(file.uri, ns=(0, file.mtime_ns + 1))
        with pytest.raises(SourceError, match="changed since the plan was made"):
            open_reader(file)

    def test_a_file_that_is_gone(self, file: SourceFile) -> None:
        Path(file.uri).unlink()
        with pytest.raises(SourceError, match="No such file"):
            open_reader(file)


class TestOpenSource:
    def test_a_local_directory_wins_over_the_hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path, {"org/model/config.json": b"{}"})
        monkeypatch.chdir(tmp_path)
        source = open_source("org/model")
        assert isinstance(source, LocalSource)
        assert source.location == str(tmp_path / "org/model")
        assert source.revision is None

    @pytest.mark.parametrize("location", ["nothere", "/no/such/place", "./org/model", "a/b/c", "org/model@"])
    def test_neither_a_place_nor_a_hub_id(self, location: str) -> None:
        with pytest.raises(SourceError, match="no such file or directory"):
            open_source(location)

    def test_local_work_does_not_import_the_client(self, client: Client) -> None:
        assert client.result("open_source('.').names(); result = 'huggingface_hub' in sys.modules") is False


class TestHubSource:
    def test_is_pinned_to_the_commit_and_lists_its_files(self, client: Client, hub: HubStub) -> None:
        hub.repos[REPO].extra = ("../escaped", "/etc/passwd", "a/../../b", "a\\b", "a\nb")
        source = client.result(
            f"s = open_source('{REPO}'); f = s.stat('{SHARD}');"
            "result = [s.location, s.revision, s.note, s.names(), f.uri, f.size, f.mtime_ns]"
        )
        sha = hub.repos[REPO].refs["main"]
        names = ["config.json", SHARD, "model.safetensors.index.json"]
        assert source == [REPO, sha, None, names, f"hub://{REPO}@{sha}/{SHARD}", len(DATA), 0]

    @pytest.mark.parametrize("cdn", [False, True], ids=["direct", "redirected"])
    def test_a_header_is_read_without_downloading_the_shard(self, client: Client, hub: HubStub, cdn: bool) -> None:
        hub.cdn = cdn
        header = client.result(
            f"s = open_source('{REPO}'); n = int.from_bytes(s.read('{SHARD}', 0, 8), 'little');"
            f"result = s.read('{SHARD}', 8, n).decode()"
        )
        assert header == HEADER.decode()
        assert hub.sent(SHARD) == 8 + len(HEADER)
        assert [r.range for r in hub.requests if r.status == 206] == ["bytes=0-7", f"bytes=8-{7 + len(HEADER)}"]
        assert client.cached() == []

    def test_names_are_quoted(self, client: Client, hub: HubStub, tmp_path: Path) -> None:
        hub.cdn = True
        names = ["a b#c%20?.safetensors", "sub/x@y+z&é.safetensors"]
        hub.commit(REPO, write(tmp_path / "repo", dict.fromkeys(names, DATA)))
        code = f"s = open_source('{REPO}'); result = [s.read(name, 0, 9).hex() for name in {names}];"
        assert client.result(code + f"[open_reader(s.stat(name)).close() for name in {names}]") == [DATA[:9].hex()] * 2

    def test_reads_end_with_the_file(self, client: Client) -> None:
        tail = f"[s.read('{SHARD}', {len(DATA) - 2}, 9).hex(), s.read('{SHARD}', {len(DATA)}, 9).hex()]"
        assert client.result(f"s = open_source('{REPO}'); result = {tail}") == ["feff", ""]

    def test_a_server_without_ranges_is_cut_off(self, client: Client, hub: HubStub) -> None:
        hub.faults.append(Fault(SHARD, ignore_range=True))
        code = f"result = open_source('{REPO}').read('{SHARD}', 8, {len(HEADER)}).decode()"
        assert client.result(code) == HEADER.decode()

    def test_revisions(self, client: Client, hub: HubStub, tmp_path: Path) -> None:
        first = hub.repos[REPO].refs["main"]
        second = hub.commit(REPO, write(tmp_path / "repo", {"config.json": b'{"v": 2}'}), branch="refs/pr/1")
        places = [REPO + revision for revision in ("", "@main", f"@{first}", f"@{second}", "@refs/pr/1")]
        code = f"result = [[s.revision, s.read('config.json', 0, 99).decode()] for s in map(open_source, {places})]"
        one, two = [first, '{"v": 1}'], [second, '{"v": 2}']
        assert client.result(code) == [one, one, one, two, two]

    def test_a_branch_that_moves_changes_nothing(self, client: Client, hub: HubStub, tmp_path: Path) -> None:
        first = hub.repos[REPO].refs["main"]

        def move(method: str, path: str) -> None:
            if "/resolve/" in path:
                (tmp_path / "repo/config.json").unlink(missing_ok=True)
                hub.commit(REPO, write(tmp_path / "repo", {SHARD: b"new", "model.safetensors.index.json": b"[]"}))

        hub.on_request = move
        read = client.result(
            f"s = open_source('{REPO}'); names = ['{SHARD}', 'config.json', 'model.safetensors.index.json'];"
            "result = [s.read(name, 0, 9).hex() for name in names] + [s.fetch(name).parts[-2] for name in names]"
        )
        assert hub.repos[REPO].refs["main"] != first
        assert read == [DATA[:9].hex(), b'{"v": 1}'.hex(), b"{}".hex(), first, first, first]

    def test_reader_downloads_once_and_works_offline_then(self, client: Client, hub: HubStub) -> None:
        plan = client.result(f"f = open_source('{REPO}').stat('{SHARD}'); result = [f.uri, f.size]")
        read = f"r = open_reader(SourceFile(*{plan})); b = bytearray(9); r.read_into(8, memoryview(b)); r.close();"
        assert client.result(read * 2 + "result = b.hex()") == DATA[8:17].hex()
        assert hub.sent(SHARD) == len(DATA)
        seen = len(hub.requests)
        assert client.result(read + "result = b.hex()", HF_HUB_OFFLINE="1") == DATA[8:17].hex()
        assert len(hub.requests) == seen

    def test_reader_checks_the_size_that_the_plan_saw(self, client: Client, hub: HubStub) -> None:
        uri = f"hub://{REPO}@{hub.repos[REPO].refs['main']}/{SHARD}"
        assert "changed since the plan was made" in client.error(f"open_reader(SourceFile('{uri}', 5))")


class TestOffline:
    READ = f"""
s = open_source('{REPO}')
result = dict(
    commit=s.revision, note=s.note, names=s.names(), config=s.read('config.json', 0, 99).decode(),
    uri=s.stat('config.json').uri, miss=error_of(s.read, '{SHARD}', 0, 8),
)
"""

    @pytest.fixture
    def commit(self, client: Client, hub: HubStub) -> str:
        """The commit of which the client has the small files, as a plan leaves them."""
        small = "s.read('config.json', 0, 1 << 20), s.read('model.safetensors.index.json', 0, 1)"
        client.result(f"s = open_source('{REPO}'); {small}, s.read('{SHARD}', 0, 8)")
        assert client.cached() == ["config.json", "model.safetensors.index.json"]
        return hub.repos[REPO].refs["main"]

    @pytest.mark.parametrize("why", ["offline", "refused", "down"])
    def test_the_cache_stands_in_and_says_so(self, client: Client, hub: HubStub, commit: str, why: str) -> None:
        hub.faults.append(Fault("/api/models", times=99, status=503))
        env = {"offline": {"HF_HUB_OFFLINE": "1"}, "refused": {"HF_ENDPOINT": "http://127.0.0.1:1"}, "down": {}}[why]
        said = {"offline": "HF_HUB_OFFLINE is set", "refused": "127.0.0.1:1 cannot be reached", "down": "HTTP 503"}[why]
        got = client.result(self.READ, **env)
        assert (got["commit"], got["config"]) == (commit, '{"v": 1}')
        assert got["names"] == ["config.json", "model.safetensors.index.json"]
        assert got["uri"] == f"hub://{REPO}@{commit}/config.json"
        assert said in got["note"]
        assert f"the cache is used, with commit {commit} and 2 of its files" in got["note"]
        assert f"{SHARD}: it is not in the cache" in got["miss"]
        assert f"`hf download {REPO} {SHARD} --revision {commit}`" in got["miss"]

    @pytest.mark.parametrize("offline", ["1", "0"])
    def test_a_cache_whose_links_lead_out(self, client: Client, commit: str, tmp_path: Path, offline: str) -> None:
        (tmp_path / "secret").write_text('{"v": "secret"}')
        (link,) = client.home.glob("hub/models--*/snapshots/*/config.json")
        link.unlink()
        link.symlink_to(tmp_path / "secret")
        code = f"""
s = open_source('{REPO}')
uses = [lambda: s.read('config.json', 0, 9), lambda: s.fetch('config.json'),
        lambda: open_reader(SourceFile('hub://{REPO}@{commit}/config.json', 15))]
result = [error_of(use) for use in uses]
"""
        answer = client.run(code, HF_HUB_OFFLINE=offline)
        for error in answer.result or [answer.error]:
            assert "config.json: is a link that leads out of its directory" in error

    def test_a_snapshot_known_to_be_incomplete_will_do(self, client: Client, commit: str) -> None:
        client.result(f"import huggingface_hub; huggingface_hub.snapshot_download('{REPO}')")
        for path in client.home.glob(f"hub/models--*/snapshots/*/{SHARD}"):
            path.unlink()
        assert client.result(self.READ, HF_HUB_OFFLINE="1")["commit"] == commit

    def test_a_reader_whose_file_is_not_there(self, client: Client, commit: str) -> None:
        code = f"open_reader(SourceFile('hub://{REPO}@{commit}/{SHARD}', {len(DATA)}))"
        error = client.error(code, HF_HUB_OFFLINE="1")
        assert f"{REPO}@{commit}/{SHARD}: it is not in the cache, and HF_HUB_OFFLINE is set" in error
        assert "cannot be reached" in client.error(code, HF_ENDPOINT="http://127.0.0.1:1")

    @pytest.mark.parametrize(
        "env", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:1"}], ids=["offline", "refused"]
    )
    def test_nothing_of_it_in_the_cache(self, client: Client, env: dict[str, str]) -> None:
        error = client.error(f"open_source('{REPO}@v1')", **env)
        assert error.startswith(f"{REPO}@v1: no local file or directory in ")
        assert f"`hf download {REPO} --revision v1`" in error


class TestHubErrors:
    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            (f"no such token: {TOKEN}", "no such token: hf_…"),
            ("Illegal header value b'Bearer abc'", "Illegal header value b'Bearer …"),
            (
                f"retries exceeded with url: /x/y?A=1&{SIGNATURE} (timed out)",
                "retries exceeded with url: /x/y (timed out)",
            ),
            ("proxy http://me:secret@host:1 said no", "proxy http://host:1 said no"),
            ("two\nlines, `hf_hub_download` and all", "two lines, `hf_hub_download` and all"),
        ],
        ids=["token", "header", "signature", "password", "harmless"],
    )
    def test_secrets_do_not_come_into_a_message(self, text: str, shown: str) -> None:
        assert redacted(text) == shown

    BAD_NAMES = ("../x", "/etc/passwd", "a/../../x", "", "x\0y")

    def test_what_is_not_there(self, client: Client, hub: HubStub) -> None:
        errors = client.result(f"""
s = open_source('{REPO}')
places = ['org/nothere', '{REPO}@nothere', '{REPO}@../x', 'org/..']
uris = ['hub://{REPO}@main/x', f'hub://{REPO}@{{s.revision}}/../x', f'hub://{REPO}@{{s.revision}}/nothere']
result = [error_of(s.stat, name) for name in ('nothere', *{self.BAD_NAMES})]
result += [error_of(s.fetch, '../x'), error_of(s.read, '../x', 0, 1)]
result += [error_of(open_source, place) for place in places]
result += [error_of(open_reader, SourceFile(uri, 1)) for uri in uris]
""")
        sha = hub.repos[REPO].refs["main"]
        nowhere = f"no local file or directory in {client.home}, and on the Hub"
        assert errors == [
            f"{REPO}@{sha}/nothere: there is no such file in the repo",
            *(f"{REPO}: {name!r} is not the name of a file in a repo" for name in self.BAD_NAMES),
            *[f"{REPO}: '../x' is not the name of a file in a repo"] * 2,
            f"org/nothere: {nowhere}: there is no such repo, or it is private. "
            "Log in with `hf auth login`, or set HF_TOKEN, if it is",
            f"{REPO}@nothere: {nowhere}: the repo has no such revision (branch, tag or commit)",
            f"{REPO}@../x: '../x' is not a revision",
            errors[-4],
            f"'hub://{REPO}@main/x' is not of the form hub://org/name@commit/file",
            f"'hub://{REPO}@{sha}/../x' is not of the form hub://org/name@commit/file",
            f"{REPO}@{sha}/nothere: there is no such file in the repo",
        ]
        assert errors[-4].startswith(
            f"org/..: no local file or directory in {client.home}, and on the Hub: HFValidationError"
        )

    def test_a_gated_repo(self, client: Client, hub: HubStub) -> None:
        hub.repos[REPO].token, hub.repos[REPO].gated = TOKEN, True
        code = f"s = open_source('{REPO}'); result = [error_of(s.read, '{SHARD}', 0, 2), error_of(s.fetch, '{SHARD}')]"
        wrong = TOKEN[::-1]
        for refused in (client.run(code), client.run(code, HF_TOKEN=wrong)):
            for error in refused.result:
                assert "access is refused (HTTP 401: Access to model org/model is restricted. Please log in.)" in error
                assert "`hf auth login`, or set HF_TOKEN" in error
            assert wrong not in refused.printed
        granted = client.run(code, HF_TOKEN=TOKEN)
        assert granted.result == [None, None]
        assert TOKEN not in granted.printed

    def test_a_private_repo(self, client: Client, hub: HubStub) -> None:
        hub.repos[REPO].token = TOKEN
        error = client.error(f"open_source('{REPO}')")
        assert "there is no such repo, or it is private. Log in with `hf auth login`" in error

    def test_a_token_that_cannot_be_sent_is_not_shown(self, client: Client) -> None:
        # The vertical tab has httpx complain of "Illegal header value b'Bearer secretpart\\x0botherpart'".
        answer = client.run(f"result = open_source('{REPO}').names()", HF_TOKEN="secretpart\x0botherpart")
        assert answer.error is None or "Bearer …" in answer.error
        assert "secretpart" not in answer.printed
        assert "otherpart" not in answer.printed

    def test_a_redirect_leaves_the_token_behind(self, client: Client, hub: HubStub) -> None:
        hub.cdn, hub.repos[REPO].token = True, TOKEN
        client.result(f"s = open_source('{REPO}'); s.read('{SHARD}', 0, 8); s.fetch('{SHARD}')", HF_TOKEN=TOKEN)
        away = [request for request in hub.requests if request.host == "localhost"]
        assert [request.status for request in away] == [206, 200]
        assert [request.authorization for request in away] == [None, None]
        own = [request for request in hub.requests if REPO in request.path and request not in away]
        assert {request.authorization for request in own} == {f"Bearer {TOKEN}"}

    def test_a_signed_url_is_not_shown(self, client: Client, hub: HubStub) -> None:
        hub.cdn = True
        hub.faults.append(Fault("/cdn/", times=99, status=403))
        answer = client.run(f"s = open_source('{REPO}'); result = [error_of(s.read, '{SHARD}', 0, 8)]")
        assert "HTTP 403" in answer.result[0]
        assert SIGNATURE not in answer.printed

    @pytest.mark.parametrize("status", [429, 503])
    def test_a_busy_hub_is_asked_again(self, client: Client, hub: HubStub, status: int) -> None:
        hub.faults.append(Fault(SHARD, status=status, headers={"Retry-After": "1"}))
        assert client.result(f"result = open_source('{REPO}').read('{SHARD}', 0, 2).hex()") == DATA[:2].hex()
        assert [r.status for r in hub.requests if r.path.endswith(SHARD)] == [status, 206]

    @pytest.mark.parametrize("status", [429, 500])
    def test_a_hub_that_stays_busy(self, client: Client, hub: HubStub, status: int) -> None:
        hub.faults += [Fault("/resolve/", method, 99, status=status) for method in ("GET", "HEAD")]
        hub.faults.append(Fault("/api/models/org/other", times=99, status=status))
        errors = client.result(f"""
s = open_source('{REPO}')
result = [error_of(s.read, '{SHARD}', 0, 8), error_of(s.fetch, '{SHARD}'), error_of(open_source, 'org/other')]
""")
        for error in errors:
            assert f"answers with an error (HTTP {status}" in error

    def test_a_broken_connection_is_mended(self, client: Client, hub: HubStub, tmp_path: Path) -> None:
        hub.commit(REPO, write(tmp_path / "repo", {"other.bin": DATA}))
        hub.faults += [Fault(SHARD, drop=True), Fault(SHARD, cut=3), Fault("other.bin", cut=100_000)]
        if client.version >= (0, 36):  # 0.30 takes a dropped question for "not in the cache"
            hub.faults.append(Fault("other.bin", "HEAD", drop=True))
        code = f"s = open_source('{REPO}'); result = [s.read('{SHARD}', 0, 8).hex(), str(s.fetch('other.bin'))]"
        start, path = client.result(code)
        assert start == DATA[:8].hex()
        assert Path(path).read_bytes() == DATA
        assert not any(fault.times for fault in hub.faults)

    def test_a_connection_that_is_always_cut(self, client: Client, hub: HubStub) -> None:
        hub.faults.append(Fault(SHARD, times=99, cut=3))
        code = f"s = open_source('{REPO}'); result = [error_of(s.read, '{SHARD}', 0, 8), error_of(s.fetch, '{SHARD}')]"
        for error in client.result(code):
            assert error.startswith(f"{REPO}@{hub.repos[REPO].refs['main']}/{SHARD}: ")
        assert client.cached() == []
