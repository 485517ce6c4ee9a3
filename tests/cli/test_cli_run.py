"""`shardmerge run` in a process of its own: its progress, and that it can be stopped at any time and taken up."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardmerge
from shardmerge import Progress
from shardmerge.cli.progress import LINE_SECONDS, show_progress
from tests.support.builders import ROOT, contents, make_place, run_python, snapshot

#: The command line, in a process that sends itself a signal when a part of the merge is done.
STOPPED = """
import contextlib, os, signal, sys
import shardmerge.cli.progress
from shardmerge.cli.main import main

# A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
number, part, config = sys.argv[1:]

@contextlib.contextmanager
def show_progress(*, quiet):
    def callback(progress):
        if progress.done >= float(part) * progress.total:
            os.kill(os.getpid(), int(number))
    yield callback

shardmerge.cli.progress.show_progress = show_progress
sys.argv = ["shardmerge", "run", config]
main()
"""


@pytest.mark.parametrize(
    ("number", "part", "shards", "reused"),
    [
        pytest.param(signal.SIGINT, 0.0, 2, 0, id="before the first byte", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 0.3, 2, 0, id="in the first shard", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 0.7, 2, 1, id="in the second shard"),
        pytest.param(signal.SIGTERM, 1.0, 2, 1, id="before the commit", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 0.5, 1, 0, id="one file"),
    ],
)
def test_stopped_and_taken_up(tmp_path: Path, number: signal.Signals, part: float, shards: int, reused: int) -> None:
    place = make_place(tmp_path, shards=shards)
    config = place.config_file()
    sources = snapshot(place.base) | snapshot(place.adapter)
    done = run_python("-c", STOPPED, str(int(number)), str(part), config)
    assert done.returncode == 130, done.stderr
    assert "interrupted; run the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert os.listdir(place.output) == [".shardmerge"]

    report = shardmerge.merge(config)
    assert report.shards_reused == reused
    undisturbed = tmp_path / "undisturbed"
    shardmerge.merge(place.config(output={"path": str(undisturbed)}))
    assert contents(place.output) == contents(undisturbed)
    assert not (place.output / ".shardmerge").exists()
    assert snapshot(place.base) | snapshot(place.adapter) == sources


def test_stopped_while_replacing_a_finished_merge(tmp_path: Path) -> None:
    """Until the new one is ready, the old one is whole."""
    place = make_place(tmp_path)
    config = place.config_file()
    shardmerge.merge(config)
    before = contents(place.output)
    script = STOPPED.replace('"run", config]', '"run", config, "--overwrite", "-s", "adapters.0.weight=2"]')
    assert run_python("-c", script, str(int(signal.SIGTERM)), "0.7", config).returncode == 130
    now = contents(place.output)
    assert {name: content for name, content in now.items() if not name.startswith(".shardmerge/")} == before


def test_stopped_while_planning(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    script = (
        "import os, signal, shardmerge.api.library\n"
        "from shardmerge.cli.main import main\n"
        "shardmerge.api.library.make_plan = lambda *_: os.kill(os.getpid(), signal.SIGTERM)\n"
        "main()"
    )
    config = place.config_file()
    before = snapshot(tmp_path)
    done = run_python("-c", script, "run", config)
    assert done.returncode == 130, done.stderr
    assert "interrupted" in done.stderr
    assert "Traceback" not in done.stderr
    assert snapshot(tmp_path) == before


# --- progress ---------------------------------------------------------------------------------------------------------


def test_bar_on_a_terminal(tmp_path: Path) -> None:
    config = make_place(tmp_path).config_file()
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "shardmerge", "run", str(config)],
            stdout=subprocess.PIPE,
            stderr=follower,
            cwd=ROOT,
            env={**os.environ, "TERM": "xterm", "HF_HUB_OFFLINE": "1"},
        )
        os.close(follower)
        stdout, _ = process.communicate(timeout=60)
        shown = b"".join(chunks(leader)).decode()
    finally:
        os.close(leader)
    assert process.returncode == 0
    assert b"3 weights merged" in stdout
    assert b"merging" not in stdout
    assert "\r" in shown
    assert "merging:" in shown
    assert "100%" in shown
    assert "shard 2/2" in shown
    assert "% of" not in shown  # the lines of a log


def chunks(descriptor: int) -> Iterator[bytes]:
    """What is left to read from a terminal whose other end is closed."""
    while True:
        try:
            chunk = os.read(descriptor, 4096)
        except OSError:  # how Linux says that it is at its end
            return
        if not chunk:
            return
        yield chunk


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock(monkeypatch)
    with show_progress(quiet=False) as progress:
        for step in range(101):
            progress(Progress(step * 1000, 100_000, "x", 1 + step // 51, 2))
            clock.now += LINE_SECONDS / 10
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 11
    assert lines[0] == "merging:   0%, 0 B of 100.0 kB, shard 1/2"
    assert lines[5] == "merging:  50%, 50.0 kB of 100.0 kB, shard 1/2, 2.0 kB/s, 25 s left"
    assert lines[10] == "merging: 100%, 100.0 kB of 100.0 kB, shard 2/2, 2.0 kB/s, 0 s left"


def test_rate_counts_only_what_this_run_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with show_progress(quiet=False) as progress:
        progress(Progress(90_000, 100_000, "x", 2, 2))
        clock.now += 5
        progress(Progress(95_000, 100_000, "x", 2, 2))
    assert capsys.readouterr().err.splitlines()[-1].endswith("1.0 kB/s, 5 s left")


def test_checking_what_is_taken_up_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with show_progress(quiet=False) as progress:
        progress(Progress(50_000, 50_000, "x", 1, 1, "checking"))
        clock.now += 5
        progress(Progress(50_000, 100_000, "x", 2, 2))
        clock.now += 5
        progress(Progress(60_000, 100_000, "x", 2, 2))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "checking: 100%, 50.0 kB of 50.0 kB, shard 1/1"
    assert lines[1] == "merging:  50%, 50.0 kB of 100.0 kB, shard 2/2"
    assert lines[2].endswith("2.0 kB/s, 20 s left")


def test_no_lines_when_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(quiet=True) as progress:
        progress(Progress(0, 1, "x", 1, 1))
    assert capsys.readouterr() == ("", "")


def test_empty_model_divides_by_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(quiet=False) as progress:
        progress(Progress(0, 0, "x", 1, 1))
    assert "0 B of 0 B" in capsys.readouterr().err
