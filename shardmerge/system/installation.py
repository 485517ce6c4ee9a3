"""Finds out whether the installed torch fits the machine, without importing it, which takes a second.

On Linux ``pip install torch`` installs the CUDA build, several times as large as the CPU build. A note recommends the
latter once on a machine without a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from shardmerge.system.regular_files import read_small

CPU_BUILD = "pip install torch --index-url https://download.pytorch.org/whl/cpu"
#: NVIDIA's driver, and the host's GPU under WSL.
_DEVICES = ("/dev/nvidiactl", "/dev/dxg")
_CUDA = re.compile(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", re.MULTILINE)
_LARGEST = 100_000


def installed_version(package: str) -> str | None:
    """The version of a package, without importing it; None if it is not installed."""
    import importlib.metadata  # takes 18 ms, which most commands can do without

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cuda_of_torch() -> str | None:
    """The version of CUDA that the installed torch was built for; None for another build, or without torch."""
    found = importlib.util.find_spec("torch")
    for folder in (found and found.submodule_search_locations) or ():
        with suppress(OSError):
            match = _CUDA.search(read_small(Path(folder) / "version.py", _LARGEST).decode(errors="replace"))
            return match and match[1]
    return None


def needless_cuda(devices: Sequence[str] = _DEVICES) -> str | None:
    """A note for a Linux machine with torch's CUDA build and without a GPU."""
    if sys.platform != "linux" or any(os.path.exists(device) for device in devices):
        return None
    version = cuda_of_torch()
    if version is None:
        return None
    return (
        f"the installed torch is built for CUDA {version}, and this machine has no NVIDIA GPU. It works all the "
        f"same; the CPU build takes about 4 GB less disk: {CPU_BUILD}"
    )


def first_time(note: str) -> bool:
    """Whether ``note`` is new to this user. It is then remembered, if the home is writable."""
    marker = state_folder() / "notes"
    with suppress(OSError):
        if note in read_small(marker, _LARGEST).decode(errors="replace").splitlines():
            return False
    with suppress(OSError):
        marker.parent.mkdir(parents=True, exist_ok=True)
        with open(os.open(marker, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600), "w") as file:
            file.write(f"{note}\n")
    return True


def state_folder() -> Path:
    """The folder of the user's state between runs, by the XDG base directories."""
    state = os.environ.get("XDG_STATE_HOME", "")
    # The specification ignores relative paths.
    folder = Path(state) if os.path.isabs(state) else Path(os.path.expanduser("~")) / ".local" / "state"
    return folder / "shardmerge"
