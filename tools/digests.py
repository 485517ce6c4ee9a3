"""Merge many configurations with a checkout of this project, and print a digest of the bytes of each output.

    diff <(python -m tools.digests --checkout OLD) <(python -m tools.digests --checkout NEW)

shows what a change of the code does to the bytes. A line is: name of the configuration, exit code, digest of the
output's files, digest of its records (``shardmerge.json``) without what differs from run to run. A configuration that
is not merged has ``-`` for both. The exit code is 1 where a configuration ended otherwise than it should.

Inputs are made once, into the work folder, and used by all later runs there. A run waits for another one in the same
folder. The checkout is run as a process of its own, by this interpreter; of the checkout, this program knows the
commands and keys of its configs alone, so that it works with older and newer ones. Digests of two machines, or of two
numbers of threads, may differ in the last bits of sums.
"""

from __future__ import annotations

import argparse
import fcntl
import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from tools import digest_inputs, digest_tables
from tools.digest_cases import CASES, Case
from tools.digest_tables import ADAPTERS, BASES

ROOT = Path(__file__).resolve().parent.parent
RECORD = "shardmerge.json"
#: Keys of a record, at any depth, that say when, by what version, from which inodes, and in how much memory: they
#: differ between two runs of the same code. ``digest`` and ``record_checksum`` are made of such keys.
CHANGING = frozenset(
    {
        *("shardmerge", "torch", "python", "platform"),
        *("seconds", "memory", "digest", "record_checksum"),
        *("mtime_ns", "ctime_ns", "inode", "device"),
    }
)
_DIGITS = 32


@cache
def _way_of_making() -> str:
    """A name for how inputs are made: where that changes, other ones are made."""
    found = hashlib.sha256()
    for module in (digest_inputs, digest_tables):
        found.update(Path(str(module.__file__)).read_bytes())
    return found.hexdigest()[:12]


@dataclass(frozen=True)
class Work:
    """The folder of inputs, configs and outputs."""

    folder: Path

    @property
    def inputs(self) -> Path:
        return self.folder / f"inputs-{_way_of_making()}"

    def base(self, name: str) -> Path:
        return self.inputs / "bases" / name

    def adapter(self, name: str) -> Path:
        return self.inputs / "adapters" / name

    def output(self, case: Case) -> Path:
        return self.folder / "outputs" / case.name

    def config(self, case: Case) -> Path:
        return self.folder / "configs" / f"{case.name}.yaml"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process uses the folder meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


# --- inputs -----------------------------------------------------------------------------------------------------------


def make_inputs(work: Work, cases: Iterable[Case]) -> None:
    """Make what the cases need and the folder lacks, in one thread: on more, decompositions have other last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for case in cases:
            _make_inputs_of(work, case)
    finally:
        torch.set_num_threads(threads)


def _make_inputs_of(work: Work, case: Case) -> None:
    for name in case.adapter_names():
        adapter = ADAPTERS[name]
        base = _made(work.base(adapter.base), BASES[adapter.base])
        _made(work.adapter(name), partial(adapter.make, base))
    _made(work.base(case.base), BASES[case.base])
    write_config(work, case)


def _made(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, which is there only when it is complete."""
    if not folder.is_dir():
        begun = folder.with_name(f".{folder.name}")
        shutil.rmtree(begun, ignore_errors=True)
        begun.mkdir(parents=True)
        make(begun)
        begun.rename(folder)
    return folder


def write_config(work: Work, case: Case) -> None:
    """The config of a merge, as JSON, which is YAML."""
    entries = [(entry, {}) if isinstance(entry, str) else entry for entry in case.adapters]
    config = {
        "base": str(work.base(case.base)),
        "adapters": [{"path": str(_file_or_folder(work.adapter(name))), **keys} for name, keys in entries],
        "output": {"path": str(work.output(case) / "merged"), **case.output},
        **case.options,
    }
    work.config(case).parent.mkdir(exist_ok=True)
    digest_inputs.write_json(work.config(case), config)


def _file_or_folder(adapter: Path) -> Path:
    """An adapter's only file, which has no config beside it, or its folder."""
    files = list(adapter.iterdir())
    return files[0] if len(files) == 1 else adapter


# --- merging ----------------------------------------------------------------------------------------------------------


def environment(checkout: Path, work: Work) -> dict[str, str]:
    """The environment of a run: the checkout's package alone, offline, and nothing of this user's settings or state."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("SHARDMERGE_")}
    return {
        **inherited,
        "PYTHONPATH": str(checkout),
        "PYTHONPYCACHEPREFIX": str(work.folder / "pycache"),  # the checkout may be read-only
        "PYTHONDONTWRITEBYTECODE": "",
        "HF_HUB_OFFLINE": "1",
        "XDG_STATE_HOME": str(work.folder / "state"),
        "XDG_CACHE_HOME": str(work.folder / "cache"),
    }


def check_checkout(checkout: Path, work: Work) -> None:
    """Exit where another package than the checkout's would be run."""
    program = "import shardmerge; print(shardmerge.__file__)"
    done = _python(checkout, work, "-c", program)
    if done.returncode or not Path(done.stdout.strip()).resolve().is_relative_to(checkout):
        sys.exit(f"{checkout} is not a checkout of shardmerge: {done.stdout.strip() or done.stderr.strip()}")


def _python(checkout: Path, work: Work, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=work.folder,
        env=environment(checkout, work),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def commands(work: Work, case: Case) -> Iterator[list[str]]:
    """The commands of a case, in order."""
    merged = work.output(case) / "merged"
    if case.adapters:
        yield ["run", str(work.config(case)), "--quiet"]
    if case.export:
        source = merged if case.adapters else work.base(case.base)
        yield ["export", str(source), "-o", str(work.output(case) / "exported"), *case.export, "--quiet"]


def run_case(checkout: Path, work: Work, case: Case, *, keep: bool = False) -> tuple[str, bool]:
    """The line of a case; and whether it ended as expected. stderr says why it did not."""
    output = work.output(case)
    shutil.rmtree(output, ignore_errors=True)
    code = 0
    for command in commands(work, case):
        done = _python(checkout, work, "-m", "shardmerge", *command)
        code = done.returncode
        if code:
            break
    if code != case.exit:
        print(f"{case.name}: exit code {code}, expected {case.exit}\n{done.stderr}", file=sys.stderr)
    digests = "- -" if code else f"{digest_of_files(output)} {digest_of_records(output, work)}"
    if not keep:
        shutil.rmtree(output, ignore_errors=True)
    return f"{case.name:<40} {code} {digests}", code == case.exit


# --- digests ----------------------------------------------------------------------------------------------------------


def _files(output: Path) -> list[Path]:
    return sorted(path for path in output.rglob("*") if path.is_file())


def digest_of_files(output: Path) -> str:
    """Names and sha256 of all files of an output but its records."""
    found = hashlib.sha256()
    for file in _files(output):
        if file.name != RECORD:
            found.update(f"{file.relative_to(output)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()[:_DIGITS]


def digest_of_records(output: Path, work: Work) -> str:
    """Records without `CHANGING` keys, in the order of their keys, with placeholders for the work folder's paths."""
    found = hashlib.sha256()
    for file in _files(output):
        if file.name == RECORD:
            lasting = json.dumps(without_changing(json.loads(file.read_bytes())), ensure_ascii=False)
            lasting = lasting.replace(str(work.inputs), "INPUTS").replace(str(work.folder), "WORK")
            found.update(f"{file.relative_to(output)} {lasting}\n".encode())
    return found.hexdigest()[:_DIGITS]


def without_changing(value: Any) -> Any:
    """JSON without the keys of `CHANGING`."""
    if isinstance(value, Mapping):
        return {key: without_changing(item) for key, item in value.items() if key not in CHANGING}
    return [without_changing(item) for item in value] if isinstance(value, list) else value


# --- the command ------------------------------------------------------------------------------------------------------


def chosen(patterns: Iterable[str]) -> list[Case]:
    """Cases whose names match one of a shell's patterns."""
    patterns = list(patterns)
    return [case for case in CASES if any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns)]


def main(arguments: list[str] | None = None) -> int:
    """0 where every case ended with the exit code that is expected of it, else 1."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--checkout", type=Path, default=ROOT, help="the code that merges (default: this checkout)")
    default = Path.home() / ".cache" / "shardmerge" / "digests"
    parser.add_argument("--work", type=Path, default=default, help="inputs and outputs (default: %(default)s)")
    only = "names of configurations, such as 'gguf-*'; may be repeated"
    parser.add_argument("--only", action="append", metavar="PATTERN", help=only)
    parser.add_argument("--jobs", type=int, default=1, help="how many are merged at once (default: 1)")
    parser.add_argument("--keep", action="store_true", help="keep the outputs in the work folder")
    parser.add_argument("--list", action="store_true", help="print the names of the configurations alone")
    options = parser.parse_args(arguments)
    cases = chosen(options.only or ["*"])
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    checkout, work = options.checkout.resolve(), Work(options.work.resolve())
    with work.alone(), ThreadPoolExecutor(options.jobs) as pool:
        check_checkout(checkout, work)
        make_inputs(work, cases)
        expected = True
        for line, as_expected in pool.map(lambda case: run_case(checkout, work, case, keep=options.keep), cases):
            print(line, flush=True)
            expected &= as_expected
    return 0 if expected else 1


if __name__ == "__main__":
    sys.exit(main())
