"""`shardmerge merge BASE ADAPTER... -o OUT`, and what all commands have in common."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shardmerge.cli.main import cli
from shardmerge.cli.printing import with_options
from shardmerge.reporting.text import count
from tests.support.builders import contents, make_place
from tests.support.command_line import invoke, invoke_json


def test_the_bytes_of_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    invoke(monkeypatch, "run", place.config_file())
    other = tmp_path / "other"
    assert invoke_json(monkeypatch, "merge", place.base, place.adapter, "-o", other)["output"] == str(other)
    shards = [name for name in contents(place.output) if name.endswith(".safetensors")]
    assert shards and all(contents(other)[name] == contents(place.output)[name] for name in shards)


def test_options_are_the_config_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    options = ["--dtype", "bfloat16", "--max-shard-size", "8kB", "-s", "adapters.1.weight=0.5", "-q"]
    result = invoke(monkeypatch, "merge", place.base, place.adapter, place.adapter, "-o", place.output, *options)
    assert not result.stdout
    found = invoke_json(monkeypatch, "inspect", place.output)
    assert [entry.endswith("(weight 0.5)") for entry in found["adapters"]] == [False, True]
    assert set(found["dtypes"]) == {"BF16"} and found["shards"] > 2


@pytest.mark.parametrize("options", [["--quantization", "q4_0"], ["--allow-config-loss"]])
def test_options_without_effect_are_refused(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = invoke(monkeypatch, "merge", "base", "adapter", "-o", tmp_path / "out", *options, code=2)
    assert "is for --format gguf" in result.stderr


def test_a_second_run_names_the_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = make_place(tmp_path)
    arguments: list[str | Path] = ["merge", place.base, place.adapter, "-o", place.output]
    invoke(monkeypatch, *arguments)
    result = invoke(monkeypatch, *arguments, code=3)
    assert "--overwrite" in result.stderr and "overwrite=True" not in result.stderr
    invoke(monkeypatch, *arguments, "--overwrite")


# --- every command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_examples_and_the_common_options(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = invoke(monkeypatch, name, "--help").stdout
    assert text == invoke(monkeypatch, name, "-h").stdout
    assert re.search(rf"\n  Examples:\n    shardmerge {name} ", text)
    assert "--json" in text and "-q, --quiet" in text


def test_no_short_help_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = invoke(monkeypatch, "--help").stdout.partition("\nCommands:\n")[2].partition("\n\n")[0]
    assert len(listed.splitlines()) == len(cli.commands) and "..." not in listed


def test_messages_of_the_library_name_options_here() -> None:
    text = "or replace it with overwrite=True; base= names it; not /tmp/overwrite=True/x"
    assert with_options(text) == "or replace it with --overwrite; --base names it; not /tmp/overwrite=True/x"


def test_plurals() -> None:
    assert [count(number, "weight") for number in (0, 1, 2, 1000)] == [
        "0 weights",
        "1 weight",
        "2 weights",
        "1,000 weights",
    ]
