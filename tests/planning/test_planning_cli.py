"""Refusals as a user of the command line meets them, and what `plan` does without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.builders import Place, make_place, run_cli, run_python, slow_but, snapshot, write_json, write_peft
from tests.support.refusals import EXIT_CODES, REFUSALS, Refusal

#: One of each kind: leftover, shape, setting, base, several problems, other classes of error.
CHOSEN = (
    "leftover with its nearest",
    "shape is the transpose",
    "prompt tuning",
    "neither base nor adapter",
    "no base",
    "base is cut",
)


def config_file(place: Place, refusal: Refusal) -> Path:
    return write_json(place.folder / "config.yaml", refusal.setup(place))


@pytest.mark.parametrize("name", slow_but(CHOSEN, CHOSEN[0], CHOSEN[-1]))
def test_refusal_as_text(tmp_path: Path, name: str) -> None:
    refusal = REFUSALS[name]
    config = config_file(make_place(tmp_path), refusal)
    before = snapshot(tmp_path)
    done = run_cli("plan", config)
    assert done.returncode == EXIT_CODES[refusal.error.__name__]
    assert done.stdout == ""
    assert done.stderr.startswith("shardmerge: ")
    assert "Traceback" not in done.stderr
    for part in refusal.parts:
        assert part in done.stderr
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", slow_but(CHOSEN, *CHOSEN[1:4]))
def test_refusal_as_json(tmp_path: Path, name: str) -> None:
    refusal = REFUSALS[name]
    config = config_file(make_place(tmp_path), refusal)
    before = snapshot(tmp_path)
    done = run_cli("run", config, "--json")
    assert done.returncode == EXIT_CODES[refusal.error.__name__]
    told = json.loads(done.stdout)
    assert told.keys() == {"error", "exit_code", "problems"}
    assert told["error"] == refusal.error.__name__
    assert told["exit_code"] == done.returncode
    assert all(problem in done.stderr for problem in told["problems"])
    assert len(told["problems"]) == (2 if name == "neither base nor adapter" else 1)
    assert "Traceback" not in done.stderr
    assert snapshot(tmp_path) == before


HEAVY = "print(sorted({'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)), file=sys.stderr)"


@pytest.mark.parametrize(
    "arguments",
    [["plan", "config.yaml"], ["inspect", "base"], ["inspect", "adapter"], ["init", "adapter", "-o", "-"], ["--help"]],
    ids=" ".join,
)
def test_torch_is_not_imported(tmp_path: Path, arguments: list[str]) -> None:
    make_place(tmp_path).config_file()
    script = f"import sys; from shardmerge.cli.main import cli; cli.main(standalone_mode=False); {HEAVY}"
    done = run_python("-c", script, *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    assert done.stdout


def test_torch_would_be_seen() -> None:
    assert run_python("-c", f"import sys, shardmerge.execution.worker; {HEAVY}").stderr == "['torch']\n"


def test_plan_of_many_adapters_is_one_page(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    adapters = [str(write_peft(tmp_path / f"adapter{number}")) for number in range(3)]
    done = run_cli("plan", place.config_file(adapters=adapters))
    assert done.returncode == 0, done.stderr
    for path in (*adapters, str(place.base), str(place.output)):
        assert path in done.stdout
    assert "scalings: 2\n" in done.stdout
    assert not place.output.exists()
