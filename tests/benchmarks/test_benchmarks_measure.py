"""What the benchmark measures of a process, the disk's own speed, and what it says of the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import direct, machine, plan_time
from benchmarks.making import Made
from benchmarks.measure import Usage, cool, measure, warm
from benchmarks.runs import Run
from tests.support.bench_runs import usage
from tests.support.builders import ROOT

MIB = 1 << 20


def run(code: str, tmp_path: Path) -> Usage:
    return measure([sys.executable, "-c", code], tmp_path / "log")


def test_exit_code_and_log(tmp_path: Path) -> None:
    assert run("import sys; print('hello'); sys.exit(3)", tmp_path).exit_code == 3
    assert (tmp_path / "log").read_text() == "hello\n"


def test_python_may_keep_its_bytecode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert run("import sys; sys.exit(sys.dont_write_bytecode)", tmp_path).exit_code == 0


def test_killed_process(tmp_path: Path) -> None:
    assert run("import os; os.kill(os.getpid(), 9)", tmp_path).exit_code == -9


def test_peak_is_that_of_the_largest_child(tmp_path: Path) -> None:
    # Measured by a small process, as no peak is found below that of the one that measures. It is a shell's child: ours
    # would begin with our maximum.
    large = 200 * MIB
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'bytearray({large})'])"
    command = [sys.executable, "-c", child]
    code = (
        "from pathlib import Path; from benchmarks.measure import measure, own_peak\n"
        f"print(own_peak(), measure({command!r}, Path({str(tmp_path / 'log')!r})).peak_bytes)"
    )
    shell = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", code]
    done = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, check=True)
    own, found = map(int, done.stdout.split())
    assert own < large <= found <= large + 64 * MIB


def test_cpu_time_is_that_of_children_too(tmp_path: Path) -> None:
    code = "sum(range(3_000_000))"
    child = run(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])", tmp_path)
    assert child.cpu_seconds > run("pass", tmp_path).cpu_seconds


def test_written_bytes_are_counted(tmp_path: Path) -> None:
    found = run(f"open({str(tmp_path / 'data')!r}, 'wb').write(bytes({8 * MIB}))", tmp_path)
    if found.written_bytes == 0:
        pytest.skip("this file system has no storage to count")
    assert found.written_bytes is not None and found.written_bytes >= 8 * MIB


def test_warm_and_cool_leave_files_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "data"
    data = os.urandom(3 * MIB + 17)
    path.write_bytes(data)
    for prepare in (warm, cool):
        prepare([path])
        assert path.read_bytes() == data


# --- the disk's own speed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("huge", [False, True])
@pytest.mark.parametrize("size", [1, direct.PAGE, 3 * direct.BLOCK, 5 * direct.BLOCK + 12345])
def test_direct_write_writes_all_bytes_and_read_finds_them(tmp_path: Path, size: int, huge: bool) -> None:
    path = tmp_path / "data"
    direct.write(path, size, huge)
    data = path.read_bytes()
    assert size <= len(data) < size + direct.PAGE
    assert data.count(0) < len(data) / 100 + 10, "a part was never written"
    direct.read(path, huge=huge)
    direct.read(path, 0, direct.PAGE)


def test_direct_read_tells_of_a_file_that_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data"
    direct.write(path, 2 * direct.BLOCK)
    monkeypatch.setattr(os, "preadv", lambda descriptor, views, offset: 512)
    with pytest.raises(OSError, match="512 bytes came"):
        direct.read(path)


def test_without_direct_io_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "O_DIRECT", os.O_DIRECTORY)  # refused for a file
    direct.main(["write", str(tmp_path / "folder" / "data"), str(MIB)])
    direct.main(["read", str(tmp_path / "folder" / "data")])
    assert capsys.readouterr().out.count("no direct I/O here") == 2


@pytest.mark.parametrize("options", [[], ["--huge"]])
@pytest.mark.parametrize("size", [1, direct.PAGE, 2 * direct.BLOCK + 12345])
def test_direct_copy_copies_all_bytes(tmp_path: Path, size: int, options: list[str]) -> None:
    source = tmp_path / "data"
    source.write_bytes(os.urandom(size))
    direct.main([*options, "copy", str(source), str(tmp_path / "copy")])
    assert (tmp_path / "copy" / "data").read_bytes()[:size] == source.read_bytes()


def test_direct_knows_three_actions() -> None:
    with pytest.raises(SystemExit, match="neither read, write nor copy"):
        direct.main(["move"])


# --- the machine ------------------------------------------------------------------------------------------------------


def test_machine_says_what_figures_depend_on(tmp_path: Path) -> None:
    found = machine.describe(tmp_path)
    assert found["memory"].endswith("GiB") and "cores" in found["cpu"]
    assert "torch" in found["versions"] and "shardmerge" in found["versions"]
    assert "niceness" in found["load"] and found["command"].startswith("python")


def test_interpreter_without_mergekit() -> None:
    assert "mergekit" in machine.mergekit_version(sys.executable)


# --- plan_time --------------------------------------------------------------------------------------------------------


def test_plan_time_has_a_config_and_a_row_for_each(tmp_path: Path) -> None:
    commands = plan_time.commands({"tiny": Made(tmp_path / "base", tmp_path / "adapter")}, tmp_path)
    config = Path(commands["shardmerge plan, tiny"][-1])
    assert str(tmp_path / "adapter") in config.read_text()
    runs = [Run("a", 1, usage(1, 100)), Run("a", 2, usage(3, 100)), Run("b", 1, usage(1, exit_code=1))]
    table = plan_time.table(runs, floor=0)
    assert "| a | 2.00 (1.00–3.00) | 2.00 | 100 |" in table
    assert "| b | failed |" in table


def test_plan_time_knows_how_large_an_index_is() -> None:
    assert plan_time.size("index-1000") == "1000 shards, 9003 tensors, 7000 targets"
