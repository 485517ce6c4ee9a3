"""torch does not need numpy, and neither do we: the commands on a machine that does not have it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import shardmerge as library
from tests.support.builders import make_place, run_python, write_json
from tests.support.device_cases import NAMES, config_of
from tests.support.peft_oracle import stored

#: An interpreter whose import system does not find numpy.
_WITHOUT = """
import sys
from importlib.machinery import PathFinder
find = PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *more: None if name == "numpy" else find(name, *more))
"""
#: Its seeded form draws with numpy, as PEFT does, and says so where it is missing.
_DRAWS = "UniLoRA, seeded"


def shardmerge(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = f"{_WITHOUT}\nfrom shardmerge.cli.main import main; main()"
    return run_python("-c", code, *arguments, cwd=cwd)


@pytest.mark.slow
def test_a_new_users_commands_do_not_speak_of_numpy(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    config = place.config_file()
    commands: list[list[str | Path]] = [
        ["init", place.adapter, "-o", "starter.yaml"],
        ["plan", config],
        ["run", config],
        ["verify", place.output],
        ["inspect", place.output],
        ["export", place.output, "-o", "again", "--dtype", "float16"],
    ]
    for command in commands:
        done = shardmerge(*command, cwd=tmp_path)
        assert done.returncode == 0, (command, done.stderr)
        assert "numpy" not in (done.stdout + done.stderr).lower(), command


def test_torch_would_complain(tmp_path: Path) -> None:
    """Without the command line's filter the warning is there, so the test above can fail."""
    assert "Failed to initialize NumPy" in run_python("-c", f"{_WITHOUT}\nimport torch").stderr


@pytest.mark.slow
def test_every_family_is_merged_to_the_same_bytes(tmp_path: Path) -> None:
    configs = {}
    for number, name in enumerate(name for name in NAMES if name != _DRAWS):
        config = config_of(name, tmp_path / f"with-{number}")
        configs[name] = config | {"output": config["output"] | {"path": str(tmp_path / f"without-{number}")}}
    (tmp_path / "configs.json").write_text(json.dumps([*configs.values()]))
    merge_all = "import json, shardmerge\nfor config in json.load(open(sys.argv[1])): shardmerge.merge(config)"
    done = run_python("-c", f"{_WITHOUT}\n{merge_all}", tmp_path / "configs.json")
    assert done.returncode == 0, done.stderr
    for number, (name, config) in enumerate(configs.items()):
        with_it = tmp_path / f"with-{number}"
        library.merge(config | {"output": config["output"] | {"path": str(with_it)}})
        theirs = stored(tmp_path / f"without-{number}")
        assert all(tensor.equal(theirs[key]) for key, tensor in stored(with_it).items()), name


def test_what_was_drawn_with_numpy_is_refused(tmp_path: Path) -> None:
    config = write_json(tmp_path / "config.yaml", config_of(_DRAWS, tmp_path / "out"))
    done = shardmerge("plan", config, cwd=tmp_path)
    assert done.returncode == 3 and "pip install numpy" in done.stderr
