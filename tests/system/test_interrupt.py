"""A process that is told to stop stops in time, and what it leaves is taken up."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.builders import ROOT, Place, contents, llama_tensors, make_place, random_tensor, run_cli, write_json

#: One that does not listen: the main thread is in a function of C that does not come back.
_DEAF = """
import ctypes, signal, threading
from shardmerge.system.interrupt import stopping_in_time
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, signal.default_int_handler)
lock = ctypes.CDLL(None).pthread_mutex_lock
mutex = ctypes.create_string_buffer(64)
lock(mutex)
with stopping_in_time():
    threading.Timer(0.5, print, ["ready"], {"flush": True}).start()
    lock(mutex)
"""
#: One that hears and then takes its time.
_SLOW = _DEAF.replace("    lock(", "    try:\n        signal.pause()\n    finally:\n        lock(")
#: One that stops by itself.
_PROMPT = _DEAF.replace("    lock(", "    signal.pause()  # (")


@pytest.mark.parametrize(
    ("script", "number"),
    [
        pytest.param(_DEAF, signal.SIGINT, id="deaf-SIGINT"),
        pytest.param(_DEAF, signal.SIGTERM, id="deaf-SIGTERM", marks=pytest.mark.slow),
        pytest.param(_SLOW, signal.SIGINT, id="slow-SIGINT", marks=pytest.mark.slow),
        pytest.param(_SLOW, signal.SIGTERM, id="slow-SIGTERM"),
    ],
)
def test_one_that_does_not_come_to_an_end_leaves(script: str, number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told == "\nshardmerge: interrupted; run the same command again to resume it\n"


def test_a_second_signal_is_obeyed_at_once_and_a_prompt_end_is_left_alone() -> None:
    with subprocess.Popen([sys.executable, "-c", _DEAF], cwd=ROOT, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    with subprocess.Popen([sys.executable, "-c", _PROMPT], cwd=ROOT, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert "KeyboardInterrupt" in told and "shardmerge: interrupted" not in told


# --- at any moment ----------------------------------------------------------------------------------------------------

#: Sends the process a signal at the n-th import from the moment at which the console script loads the program.
_AT_IMPORT = """
import os, sys
at, number, seen = int(os.environ["STOP_AT"]), int(os.environ["STOP_BY"]), -1

def watch(event, arguments):
    global seen
    if event == "import" and (seen >= 0 or arguments[0] == "shardmerge.cli.main"):
        seen += 1
        if seen == at:
            os.kill(os.getpid(), number)

sys.addaudithook(watch)
"""


def _stopped(folder: Path, at: int, number: signal.Signals, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(_AT_IMPORT)
    path = f"{ROOT}{os.pathsep}{folder / 'site'}"
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "STOP_AT": str(at), "STOP_BY": str(number)}
    return subprocess.run(
        [sys.executable, "-m", "shardmerge", *map(str, arguments)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )


def _check_stopped(done: subprocess.CompletedProcess[str]) -> None:
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in (0, 130), done.stderr
    assert done.returncode == 0 or done.stderr.count("shardmerge: interrupted") == 1, done.stderr


@pytest.mark.parametrize(
    ("at", "number"), [(0, signal.SIGINT), (20, signal.SIGTERM), (80, signal.SIGINT), (250, signal.SIGTERM)]
)
def test_a_command_is_stopped_while_it_loads(tmp_path: Path, at: int, number: signal.Signals) -> None:
    place = make_place(tmp_path)
    done = _stopped(tmp_path, at, number, "plan", place.config_file())
    _check_stopped(done)
    assert done.returncode == 130


def test_a_merge_is_stopped_while_torch_loads(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    done = _stopped(tmp_path, 700, signal.SIGINT, "run", place.config_file())
    _check_stopped(done)
    assert done.returncode == 130
    assert not list(place.output.glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [("plan", "--overwrite"), ("run", "--overwrite"), ("verify",)], ids=lambda of: of[0]
)
def test_every_command_is_stopped_at_many_imports(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Up to the one that the command does not come to."""
    place = make_place(tmp_path)
    config = place.config_file()
    assert run_cli("run", config).returncode == 0
    command, *options = arguments
    at, code = 0, 130
    while code == 130:
        done = _stopped(tmp_path, at, signal.SIGINT, command, place.output if command == "verify" else config, *options)
        _check_stopped(done)
        at, code = at + 61, done.returncode


@pytest.mark.slow
def test_a_command_is_stopped_after_any_time(tmp_path: Path) -> None:
    """Before the interpreter has come to the console script, a signal does what Python does with it."""
    config = make_place(tmp_path).config_file()
    for number in range(60):
        with _start(config, "plan") as process:
            time.sleep(0.02 * number)
            process.send_signal(signal.SIGINT)
            _, told = process.communicate(timeout=60)
        assert "shardmerge/cli" not in told, told
        assert process.returncode in (0, 130) or "shardmerge: " not in told, told


def test_an_ignored_signal_stays_ignored(tmp_path: Path) -> None:
    """As SIGINT is for a job in the background."""
    script = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "import shardmerge.cli.entry, shardmerge.cli.main\n"
        "shardmerge.cli.main.cli.main = lambda **_: os.kill(os.getpid(), signal.SIGINT)\n"
        "shardmerge.cli.entry.main()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


#: Interrupts that come to nothing, or to something else.
_SWALLOWED = """
import os, signal, time, shardmerge.cli.main, shardmerge.cli.entry
signal.signal(signal.SIGINT, signal.default_int_handler)

class Deaf:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)

def swallow(**_):
    Deaf()
    while True:
        time.sleep(0.1)

def become(**_):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    except KeyboardInterrupt:
        raise ImportError("numpy's C extensions failed") from None

shardmerge.cli.main.cli.main = {}
shardmerge.cli.entry.main()
"""


@pytest.mark.parametrize("what", ["swallow", "become"])
def test_an_interrupt_that_other_code_loses(what: str) -> None:
    done = subprocess.run([sys.executable, "-c", _SWALLOWED.format(what)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip() == "shardmerge: interrupted"


# --- a larger model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The small Llama, and beside it 400 MB that no adapter touches: some hundred blocks."""
    ballast = {f"model.ballast.{number}": random_tensor((4096, 2048), number) for number in range(12)}
    return make_place(tmp_path_factory.mktemp("large"), tensors={**llama_tensors(), **ballast}, shards=3)


@pytest.fixture(scope="module")
def expected(large: Place) -> dict[str, str]:
    output = large.folder / "undisturbed"
    assert run_cli("run", _config(large, output)).returncode == 0
    return _hashes(output)


def _config(large: Place, output: Path) -> Path:
    return write_json(large.folder / f"{output.name}.yaml", large.config(output={"path": str(output)}))


def _hashes(output: Path) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents(output).items()}


def _start(config: Path, command: str = "run") -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "shardmerge", command, str(config)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    # A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )


def _wait_for_bytes(output: Path, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not list(output.glob(".shardmerge/stage/*")):
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_merge_of_a_larger_model_stops_within_two_seconds(
    number: signal.Signals, large: Place, expected: dict[str, str]
) -> None:
    output = large.folder / f"stopped-{number}"
    with _start(_config(large, output)) as process:
        _wait_for_bytes(output, process)
        process.send_signal(number)
        asked = time.monotonic()
        _, told = process.communicate(timeout=60)
        assert time.monotonic() - asked < 2
    assert process.returncode == 130, told
    assert os.listdir(output) == [".shardmerge"]
    assert run_cli("run", _config(large, output)).returncode == 0
    assert _hashes(output) == expected


@pytest.mark.slow
def test_a_merge_that_is_killed_at_fifty_moments(large: Place, expected: dict[str, str]) -> None:
    """Each run takes up what the one before has left; where one gets through, the next begins anew."""
    chance, killed, number = random.Random(50), 0, 0
    output = large.folder / "killed-0"
    while killed < 50:
        with _start(_config(large, output)) as process:
            _wait_for_bytes(output, process)
            time.sleep(chance.uniform(0, 0.6))
            process.kill()
            process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if (output / "model.safetensors.index.json").exists():
            assert {name: value for name, value in _hashes(output).items() if not name.startswith(".")} == expected
            number += 1
            output = large.folder / f"killed-{number}"
    if output.exists():
        assert run_cli("run", _config(large, output)).returncode == 0
        assert _hashes(output) == expected
