"""Remember when this user last verified a merge, in the user's state: `verify` writes nothing into an output.

Each time is a line of JSON with the checksum of the merge's record, the path of the output, and the time. Only `verify`
can find that the output has changed since then.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from shardmerge.system.installation import state_folder
from shardmerge.system.regular_files import read_small

#: The most bytes, for some thousand entries. The older half is removed when there are more.
_LARGEST = 1_000_000


def remember(output: Path, seal: str | None) -> None:
    """Remember that all of an output was verified now; do nothing where the user's state cannot be written.

    ``seal`` is the checksum of the record; nothing is remembered for a record of an older version, which has none.
    """
    if seal is None:
        return
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    lines = [*_lines(), json.dumps({"record": seal, "output": os.path.realpath(output), "at": now})]
    if sum(map(len, lines)) > _LARGEST // 2:
        lines = lines[len(lines) // 2 :]
    temporary = _file().with_name(f"verified.{os.getpid()}.tmp")
    with suppress(OSError):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(temporary, _file())


def last_time(output: Path, seal: object) -> str | None:
    """When the output with this record was last verified, in ISO 8601 (UTC); None where that is not known."""
    found = None
    for line in _lines():
        with suppress(ValueError, TypeError, KeyError):
            entry = json.loads(line)
            if (entry["record"], entry["output"]) == (seal, os.path.realpath(output)):
                found = str(entry["at"])
    return found


def _file() -> Path:
    return state_folder() / "verified"


def _lines() -> list[str]:
    with suppress(OSError, ValueError):
        return read_small(_file(), _LARGEST).decode().splitlines()
    return []
