"""What strangers wrote reaches the terminal as text, never as a command or a line: by itself, and through commands."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import shardmerge
from shardmerge import FormatError, PlanError, VerifyReport
from shardmerge.cli.main import cli
from shardmerge.reporting import inspection
from shardmerge.reporting.text import table
from shardmerge.system.terminal_text import one_line, shown, shown_answer, shown_json
from shardmerge.verification.findings import Findings, describe, summary
from tests.support.builders import ROOT, make_place, peft_config, run_cli, run_python, write_json

#: Clears a terminal in two ways, turns what follows, and begins a line that looks like ours.
EVIL = "a\x1b[2J\x9b2J\u202e\r\nnote: all is well"
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]")


def test_texts() -> None:
    assert shown(EVIL) == "a\\x1b[2J\\x9b2J\\u202e\\r\nnote: all is well"
    assert one_line(EVIL) == "a\\x1b[2J\\x9b2J\\u202e\\r\\nnote: all is well"
    controls = (
        "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # all of Unicode's Bidi_Control
    )
    assert shown(controls) == controls.encode("unicode_escape").decode()
    assert shown_answer("a\tb\r\n" + EVIL) == "a\tb\\r\n" + shown(EVIL)
    for harmless in ("ключ ΔW × 日本 é", "👩\u200d💻", ""):
        assert one_line(harmless) == shown_json(harmless) == harmless


def test_json_means_the_same() -> None:
    value = {EVIL: [EVIL, "\ud800", "\x7f\u2028"]}
    text = shown_json(json.dumps(value, indent=2, ensure_ascii=False))
    assert json.loads(text) == value and not CONTROL.search(text)
    text.encode()


def test_a_cell_of_a_table_is_in_one_line() -> None:
    assert table([("a", EVIL), ("b", "c")]).splitlines()[1] == "b  c"


def report() -> VerifyReport:
    findings = Findings(EVIL, 0)
    findings.problem("structure", EVIL)
    findings.notes.append(EVIL)
    findings.unverified.append(EVIL)
    return findings.report()


def test_a_verdict() -> None:
    lines = [line for text in (describe(report()), summary(report())) for line in text.splitlines()[2:]]
    # The verdict's last line, which names the output as it was given, is all that is not in one.
    assert sum(line == "note: all is well" for line in lines) <= 1
    assert sum("note: all is well" in line for line in lines) >= 5


@pytest.mark.parametrize("error", [PlanError([EVIL, "second"]), FormatError(EVIL)], ids=["plan", "format"])
def test_an_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(inspection, "inspect_path", refuse)
    told = CliRunner().invoke(cli, ["inspect", "x"]).stderr
    assert "note: all is well" in told and "\nnote" not in told and not CONTROL.search(told)
    assert told.count("\n") == (3 if isinstance(error, PlanError) else 1)
    as_json = CliRunner().invoke(cli, ["inspect", "x", "--json"]).stdout
    assert EVIL in json.loads(as_json)["problems"] and not CONTROL.search(as_json)


def test_a_folder_of_the_base(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    evil = EVIL.partition("\r")[0]
    folder = place.base / evil
    folder.mkdir()
    (folder / "model.bin").write_bytes(b"x")
    for arguments in (["plan"], ["run"]):
        result = CliRunner().invoke(cli, [*arguments, str(place.config_file())])
        assert result.exit_code == 0, result.output
        told = result.stdout + result.stderr
        assert one_line(evil) in told and not CONTROL.search(told)


def test_what_an_adapter_says(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    write_json(place.adapter / "adapter_config.json", peft_config(base_model_name_or_path=EVIL))
    told = CliRunner().invoke(cli, ["inspect", str(place.adapter)]).stdout
    assert one_line(EVIL) in told and "\nnote" not in told and not CONTROL.search(told)
    as_json = CliRunner().invoke(cli, ["inspect", str(place.adapter), "--json"]).stdout
    assert json.loads(as_json)["trained_on"] == EVIL and not CONTROL.search(as_json)
    assert shardmerge.plan(place.config()).adapters[0].trained_on == EVIL


def test_a_usage_error_and_a_bug(tmp_path: Path) -> None:
    """A shell puts names of files into a command line; and Python prints what no one handles."""
    evil = EVIL.replace("\n", "")
    usage = run_cli("plan", "a", f"--{evil}")
    assert usage.returncode == 2 and one_line(evil) in usage.stderr and not CONTROL.search(usage.stderr)
    script = (
        "import shardmerge.reporting.inspection\nfrom shardmerge.cli.main import main\n"
        f"def fail(_): raise RuntimeError({evil!r})\n"
        "shardmerge.reporting.inspection.inspect_path = fail\nmain()"
    )
    bug = run_python("-c", script, "inspect", "x")
    assert bug.returncode == 1 and f"RuntimeError: {one_line(evil)}" in bug.stderr and not CONTROL.search(bug.stderr)


def test_a_starter_config_on_a_terminal(tmp_path: Path) -> None:
    """Into a file or a pipe it is a config, and means the same."""
    adapter = make_place(tmp_path).adapter.rename(tmp_path / "a\u061cb")
    told = run_cli("init", adapter, "-o", "-")
    assert "a\u061cb" in told.stdout
    leader, follower = pty.openpty()
    try:
        command = [sys.executable, "-m", "shardmerge", "init", str(adapter), "-o", "-"]
        assert subprocess.run(command, stdout=follower, cwd=ROOT, timeout=120).returncode == 0
        assert b"a\\u061cb" in os.read(leader, 65536)
    finally:
        os.close(leader)
        os.close(follower)
