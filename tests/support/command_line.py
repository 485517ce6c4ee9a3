"""The command line in the process of the test."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from shardmerge.cli.main import cli


def invoke(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path, code: int = 0) -> Result:
    """The command in this process; any exception but an exit fails the test."""
    monkeypatch.setattr(sys, "argv", ["shardmerge", *map(str, arguments)])
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def invoke_json(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path, code: int = 0) -> Any:
    return json.loads(invoke(monkeypatch, *arguments, "--json", code=code).stdout)
