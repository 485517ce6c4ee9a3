"""The memory limit of the benchmark: found where it can be had, refused where it cannot, and real."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import cgroup
from benchmarks.cgroup import Hierarchy, LimitError, hierarchies, limited, parse_size

LIMIT = 100 << 20


@pytest.mark.parametrize(
    ("text", "size"), [("400MiB", 400 << 20), ("1.5GB", 1_500_000_000), ("2 gib", 2 << 30), ("64kb", 64_000)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "400", "MB", "-1GB", "0MB", "lots"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory"
OTHERS = "31 23 0:28 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n22 1 8:1 / / rw - ext4 /dev/vda rw"


def test_group_of_version_2_and_the_one_above_it() -> None:
    found = hierarchies("0::/user.slice/session.scope\n", f"{OTHERS}\n{V2_MOUNT}\n")
    own = Path("/sys/fs/cgroup/user.slice/session.scope")
    assert found == [Hierarchy(2, (own, own.parent))]


def test_version_1_comes_after_version_2() -> None:
    found = hierarchies("4:memory:/a\n1:cpu:/b\n0::/\n", f"{V1_MOUNT}\n{OTHERS}\n{V2_MOUNT}\n")
    assert found == [
        Hierarchy(2, (Path("/sys/fs/cgroup"),)),
        Hierarchy(1, (Path("/sys/fs/cgroup/memory/a"), Path("/sys/fs/cgroup/memory"))),
    ]


def test_mount_of_a_part_of_the_hierarchy() -> None:
    mount = V1_MOUNT.replace("0:32 / ", "0:32 /docker/x ")
    assert hierarchies("4:memory:/docker/x/job\n", mount)[0].parents[0] == Path("/sys/fs/cgroup/memory/job")


def test_no_memory_controller() -> None:
    assert hierarchies("1:cpu:/b\n", OTHERS) == []


def test_refused_where_no_group_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "_systemd", lambda limit: None)
    monkeypatch.setattr(cgroup, "hierarchies", lambda own, mounts: [Hierarchy(1, (tmp_path / "missing",))])
    with pytest.raises(LimitError, match="missing: No such file"), limited(LIMIT):
        raise AssertionError
    monkeypatch.setattr(cgroup, "hierarchies", lambda own, mounts: [])
    with pytest.raises(LimitError, match="no cgroups with a memory controller"), limited(LIMIT):
        raise AssertionError


@pytest.mark.parametrize(
    ("version", "files"),
    [
        (1, {"memory.limit_in_bytes": str(LIMIT)}),
        (2, {"memory.max": str(LIMIT)}),
    ],
)
def test_group_made_by_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, files: dict[str, str]
) -> None:
    """In a plain folder, which shows what is written where."""
    (tmp_path / "cgroup.subtree_control").write_text("cpu memory\n")
    monkeypatch.setattr(cgroup, "hierarchies", lambda own, mounts: [Hierarchy(version, (tmp_path,))])
    group = cgroup._make(LIMIT)
    assert {path.name: path.read_text() for path in group.iterdir()} == files


def test_version_2_wants_the_controller_below(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cgroup.subtree_control").write_text("cpu\n")
    monkeypatch.setattr(cgroup, "hierarchies", lambda own, mounts: [Hierarchy(2, (tmp_path,))])
    with pytest.raises(LimitError, match="does not give the memory controller"):
        cgroup._make(LIMIT)


def test_scope_of_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(Path, "is_dir", lambda path: str(path) == "/run/systemd/system")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with limited(LIMIT) as wrap:
        command = wrap(["cp", "-r"])
    assert command[:3] == ["systemd-run", "--user", "--scope"]
    assert f"MemoryMax={LIMIT}" in command and command[-3:] == ["--", "cp", "-r"]


def test_no_limit_changes_nothing() -> None:
    with limited(None) as wrap:
        assert wrap(["ls"]) == ["ls"]


# --- with a real group ------------------------------------------------------------------------------------------------


@pytest.fixture
def wrap() -> Iterator[cgroup.Wrap]:
    try:
        with limited(LIMIT) as found:
            yield found
    except LimitError as error:
        pytest.skip(str(error))


def run(wrap: cgroup.Wrap, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(wrap([sys.executable, "-c", code]), capture_output=True, text=True, check=False)


def test_what_fits_runs(wrap: cgroup.Wrap) -> None:
    done = run(wrap, "print(len(bytearray(40 << 20)))")
    assert (done.returncode, done.stdout.strip()) == (0, str(40 << 20)), done.stderr


def test_what_does_not_fit_is_killed(wrap: cgroup.Wrap) -> None:
    assert run(wrap, "bytearray(300 << 20)").returncode in (-9, 137)


def test_exit_code_and_arguments_come_through(wrap: cgroup.Wrap) -> None:
    assert run(wrap, "import sys; sys.exit(7 if sys.argv[0] == '-c' else 1)").returncode == 7


def test_group_is_gone_afterwards() -> None:
    try:
        with limited(LIMIT) as wrap:
            command = wrap(["true"])
            subprocess.run(command, check=True)
    except LimitError as error:
        pytest.skip(str(error))
    if command[0] == "sh":
        assert not Path(command[3]).parent.exists()
