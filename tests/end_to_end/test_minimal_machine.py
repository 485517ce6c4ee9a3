"""The README's commands on a minimal machine: Debian without a compiler, as root and as a user with a read-only home.

A root file system of its own is made with debootstrap, from what the host's package sources offer; everything that pip
installs comes from wheels that the host has made or fetched, so nothing there can be compiled. Needs root, debootstrap
and about 4 GB of disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.builders import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="needs root on Linux, for a chroot"),
    pytest.mark.skipif(not shutil.which("debootstrap"), reason="needs debootstrap, which makes a minimal Debian"),
    pytest.mark.skipif(not Path("/etc/debian_version").exists(), reason="the suite is this machine's Debian"),
]
ADAPTER = ROOT / "configs" / "demo" / "adapter"
INSTALL = "venv/bin/pip install --quiet --no-cache-dir --no-index --find-links /wheels"
#: Who runs it: (uid, home, whether the home may be written to).
USERS = {"root": (0, "/root"), "a user with a read-only home": (1000, "/home/reader")}


def check(*command: str | Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run([*map(str, command)], stdin=subprocess.DEVNULL, capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


def codename() -> str:
    lines = dict(line.strip().split("=", 1) for line in open("/etc/os-release", encoding="utf-8") if "=" in line)
    return lines["VERSION_CODENAME"].strip('"')


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[Path]:
    """Its root: Python and nothing else, wheels, a base, an adapter, and a home for each user."""
    folder = tmp_path_factory.mktemp("machine")
    root, wheels = folder / "root", folder / "wheels"
    check("debootstrap", "--variant=minbase", "--include=python3,python3-venv", codename(), root)
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    check(sys.executable, "-m", "pip", "wheel", "--quiet", *constraints, "--wheel-dir", wheels, f"{ROOT}[hf]")
    shutil.copytree(wheels, root / "wheels")
    shutil.copytree(smollm2, root / "srv" / "base", symlinks=False)
    shutil.copytree(ADAPTER, root / "srv" / "adapter")
    for file in (root / "srv").rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)
    (root / "home" / "reader").mkdir(mode=0o555)
    for uid, _ in USERS.values():
        (root / "srv" / f"work-{uid}").mkdir()
        os.chown(root / "srv" / f"work-{uid}", uid, uid)
    yield root
    shutil.rmtree(folder, ignore_errors=True)


def within(root: Path, user: str, command: str) -> str:
    """A shell's output on the machine, in the user's work folder."""
    uid, home = USERS[user]
    environment = {"PATH": "/usr/bin:/bin", "HOME": home, "LC_ALL": "C.UTF-8"}
    script = f"cd /srv/work-{uid} && set -eu && {command}"
    own_processes = [
        shutil.which("unshare") or "/usr/bin/unshare",
        "--mount",
        "--pid",
        "--fork",
        f"--mount-proc={root / 'proc'}",
    ]
    chroot = shutil.which("chroot") or "/usr/sbin/chroot"
    return check(*own_processes, chroot, f"--userspec={uid}:{uid}", root, "sh", "-c", script, env=environment)


def test_it_is_minimal(machine: Path) -> None:
    for tool in ("cc", "gcc", "make", "git", "curl"):
        with pytest.raises(AssertionError):
            within(machine, "root", f"command -v {tool}")
    with pytest.raises(AssertionError):
        within(machine, "a user with a read-only home", "touch ~/x")


@pytest.mark.parametrize("user", USERS)
def test_the_readmes_commands(user: str, machine: Path) -> None:
    within(machine, user, "python3 -m venv venv")
    within(machine, user, f"{INSTALL} shardmerge")
    assert "numpy" not in within(machine, user, "venv/bin/pip list").lower()
    within(machine, user, "venv/bin/shardmerge init /srv/adapter --base /srv/base --output merged")
    within(machine, user, "venv/bin/shardmerge plan config.yaml")
    assert "60 weights merged" in within(machine, user, "venv/bin/shardmerge run config.yaml 2>&1")
    assert "verified" in within(machine, user, "venv/bin/shardmerge verify merged")
    assert "llama" in within(machine, user, "venv/bin/shardmerge inspect merged")
    within(machine, user, "venv/bin/shardmerge export merged --dtype float16 -o half")
    within(
        machine, user, "venv/bin/pip install --quiet --no-cache-dir --no-index --find-links /wheels transformers peft"
    )
    within(machine, user, "venv/bin/shardmerge export merged --format gguf -o gguf")
    assert "verified" in within(machine, user, "venv/bin/shardmerge verify gguf")
    within(machine, user, "venv/bin/shardmerge compare merged --max-new-tokens 8")
    answer = within(machine, user, "venv/bin/shardmerge chat merged --prompt 'What is the capital of Loraland?'")
    assert answer.strip()
