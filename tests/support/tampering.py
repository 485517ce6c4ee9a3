"""Outputs that were changed after the merge, and what `verify` must find in them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import shardmerge
from shardmerge import VerifyError, VerifyReport
from shardmerge.destinations.record import SEAL, seal
from shardmerge.sources.local import LocalSource
from shardmerge.sources.source import open_reader
from shardmerge.system import checksums
from tests.support.builders import (
    write_json,
)


def wrong(output: Path, **options: Any) -> VerifyReport:
    """The report of an output with which something is wrong."""
    with pytest.raises(VerifyError) as caught:
        shardmerge.verify(output, **options).raise_for_status()
    report = caught.value.report
    assert isinstance(report, VerifyReport) and not report.ok
    assert report.problems[0].text in str(caught.value)
    return report


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """A record with its own checksum, as if it had been written so."""
    return {**record, SEAL: seal(record)}


def record_of(output: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((output / "shardmerge.json").read_text())
    return value


def change_record(output: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A record that says something else, as if it had been written so."""
    value = record_of(output)
    change(value)
    write_json(output / "shardmerge.json", sealed(value) if "record_checksum" in value else value)


def forge_checksums(output: Path) -> None:
    """Let the record say what the shards are now, so that only what is in them can tell."""

    def change(record: dict[str, Any]) -> None:
        for name in record["shards"]:
            file = LocalSource(str(output)).stat(name)
            reader = open_reader(file)
            record["shards"][name] = {"bytes": file.size, **checksums.of_file(reader, file.size)}
            reader.close()

    change_record(output, change)
