"""Limits of the system that are too small (``ulimit``): one line that names the limit, its exit code, no traceback.

The limits are set in the process itself, which is the command line of a person.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from shardmerge.errors import LimitError
from shardmerge.execution import pipeline
from shardmerge.system import limits
from tests.support.builders import ROOT, Place, contents, make_place, peft_config, peft_tensors, run_cli, write_peft

MB = 1 << 20


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = make_place(tmp_path_factory.mktemp("limits"))
    assert run_cli("run", place.config_file()).returncode == 0
    return place


def limited(kind: int, value: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shardmerge", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(kind, (value, value)),
    )


def check(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 5, done.stderr
    assert done.stderr.count("shardmerge: ") == 1, done.stderr
    for part in parts:
        assert part in done.stderr


def arguments_of(command: str, place: Place) -> list[str | Path]:
    other = place.folder / "other"
    shutil.rmtree(other, ignore_errors=True)
    config = place.config_file(output={"path": str(other)})
    arguments: dict[str, list[str | Path]] = {
        "plan": ["plan", config],
        "run": ["run", config],
        "verify": ["verify", place.output],
        "export": ["export", place.output, "-o", other],
    }
    return arguments[command]


@pytest.mark.parametrize(
    ("command", "size"),
    [("plan", 24), ("plan", 40), ("run", 28), ("run", 300), ("verify", 300), ("export", 700)],
)
def test_too_little_address_space(merged: Place, command: str, size: int) -> None:
    done = limited(resource.RLIMIT_AS, size * MB, *arguments_of(command, merged))
    check(done, f"this process may have {size * MB / 1e6:,.0f} MB of address space (ulimit -v {size * 1024})")
    assert not (merged.folder / "other").exists() or not list((merged.folder / "other").glob("*.safetensors"))


@pytest.mark.parametrize(("command", "size"), [("run", 100), ("verify", 150)])
def test_too_little_data(merged: Place, command: str, size: int) -> None:
    """torch and OpenBLAS would end the process themselves."""
    done = limited(resource.RLIMIT_DATA, size * MB, *arguments_of(command, merged))
    check(done, f"MB of data (ulimit -d {size * 1024}), and with torch it needs about")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["plan", "run", "verify", "export"])
def test_any_address_space(merged: Place, command: str) -> None:
    """From too little for Python's own modules up to enough; below that, the interpreter itself says so."""
    size, code = 16, 5
    while code == 5:
        done = limited(resource.RLIMIT_AS, size * MB, *arguments_of(command, merged))
        code = done.returncode
        if code:
            check(done)
        size = size * 9 // 8
    assert code == 0
    assert size < 2000


@pytest.mark.slow
def test_state_of_the_disk_and_what_is_taken_up(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    config = place.config_file()
    done = limited(resource.RLIMIT_AS, 400 * MB, "run", config)
    check(done, "An unfinished merge is not a model", "run the same merge again to resume it")
    assert run_cli("run", config).returncode == 0


def test_as_json(merged: Place) -> None:
    done = limited(resource.RLIMIT_AS, 300 * MB, *arguments_of("verify", merged), "--json")
    check(done)
    found = json.loads(done.stdout)
    assert (found["error"], found["exit_code"]) == ("LimitError", 5)
    assert "ulimit -v 307200" in found["problems"][0]


def test_too_few_open_files(merged: Place) -> None:
    check(limited(resource.RLIMIT_NOFILE, 8, *arguments_of("run", merged)), "Too many open files", "ulimit -n")


@pytest.mark.slow
def test_files_may_not_be_as_large(merged: Place) -> None:
    """SIGXFSZ does not end the process, and the finished files are kept."""
    done = limited(resource.RLIMIT_FSIZE, 20_000, *arguments_of("run", merged))
    check(done, "File too large", "a file of this process may have 20,000 bytes (ulimit -f 19)")
    assert run_cli("run", merged.folder / "config.yaml").returncode == 0
    assert contents(merged.folder / "other") == contents(merged.output)


# --- what an error is put down to -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (MemoryError(), "memory ran out"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "memory ran out"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), "memory ran"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory ran out"),
        (RuntimeError("can't start new thread"), "no further thread or process could be started"),
        (BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"), "no further thread or process"),
        (OSError(errno.EMFILE, "Too many open files"), "too many files are open"),
        (OSError(errno.EFBIG, "File too large"), "file"),
        (LimitError("as it was"), "as it was"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_errors_of_limits(error: Exception, part: str) -> None:
    assert part in (limits.explained(error) or "")


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("memory"), OSError(errno.ENOENT, "No such file")])
def test_other_errors(error: Exception) -> None:
    assert limits.explained(error) is None


def test_a_stage_that_gets_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the pipeline's two threads the system allows one: nobody waits for the other."""
    start, started = threading.Thread.start, []

    def second_fails(thread: threading.Thread) -> None:
        if thread.name == "shardmerge-write":
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", second_fails)
    nothing: Any = lambda *_: None  # noqa: E731
    with pytest.raises(RuntimeError, match="can't start new thread"):
        pipeline.run(iter([]), [], nothing, nothing, nothing, nothing)
    assert not any(thread.is_alive() for thread in started)


#: What the interpreter does where the system allows no further thread, or no further process.
_NONE_MORE = """
import _posixsubprocess, _thread, errno, os, subprocess, sys, threading
from shardmerge.cli.main import main

def no_thread(*_, **__):
    raise RuntimeError("can't start new thread")

def no_process(*_):
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

threading._start_new_thread = no_thread
subprocess._fork_exec = _posixsubprocess.fork_exec = no_process
subprocess._USE_POSIX_SPAWN = False
main()
"""


@pytest.mark.parametrize("what", ["thread", "process"])
def test_no_further_thread_or_process(tmp_path: Path, what: str) -> None:
    """root has no such limit, so it is the interpreter that is made to say so."""
    slow = {} if what == "thread" else {"target_modules": r".*((a+)+)+q_proj|.*v_proj|.*down_proj"}
    place = make_place(tmp_path)
    write_peft(place.adapter, peft_tensors(), config=peft_config(**slow))
    config = place.config_file()
    command = [sys.executable, "-c", _NONE_MORE, "run" if what == "thread" else "plan", str(config)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    check(done, "no further thread or process could be started")


def test_signal_of_file_size_is_not_the_end() -> None:
    """Python ignores it; we must not undo that."""
    code = "import signal, shardmerge.cli.main; print(int(signal.getsignal(signal.SIGXFSZ)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str(int(signal.SIG_IGN))
