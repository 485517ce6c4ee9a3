"""The oldest versions that pyproject.toml allows, exactly those: they are installed, tests are run and models merged.

torch of that age comes with CUDA from the package index, so this takes 6 GB of disk, and minutes to download.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from shardmerge.errors import ConfigError
from shardmerge.inference import hf
from tests.support.builders import ROOT, write_json
from tests.support.peft_oracle import stored

ADAPTER = ROOT / "configs" / "demo" / "adapter"
#: What a merge needs, and what each of the extras for users brings.
EXTRAS = ("", "hf", "gguf")
#: Tests that need neither transformers nor PEFT, of what the dependencies are used for: YAML and pydantic, the Hub's
#: client, filelock, xxhash, torch. Those of the command line need a newer click for their runner; the last test has
#: the commands.
NAMES = (
    *("config", "config_yaml", "sources", "hub_merge", "journal", "durable", "verification", "api"),
    *("pickled", "codecs", "engine_bytes", "sinks", "patterns", "fidelity"),
)


def lower_bounds() -> dict[str, str]:
    """``name==version`` of every dependency of ours at its lower bound."""
    found = {}
    for line in importlib.metadata.requires("shardmerge") or ():
        requirement = Requirement(line)
        wanted = [
            extra for extra in EXTRAS if requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        ]
        if wanted:
            bounds = [of.version for of in requirement.specifier if of.operator == ">="]
            assert len(bounds) == 1, f"{line}: a lower bound is to be given, and tested"
            found[requirement.name] = f"{requirement.name}=={bounds[0]}"
    return found


def files_of_tests() -> list[Path]:
    found = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}
    return [found[f"test_{name}.py"] for name in NAMES]


def test_the_tests_that_are_run_are_there() -> None:
    assert len(files_of_tests()) == len(NAMES)


def test_every_dependency_has_a_lower_bound() -> None:
    assert {"torch", "pydantic", "peft", "transformers", "tokenizers"} <= lower_bounds().keys()


def test_what_the_commands_ask_for_is_what_pyproject_says() -> None:
    bounds = lower_bounds()
    assert {name: bounds[name] for name in hf.OLDEST} == {name: f"{name}=={of}" for name, of in hf.OLDEST.items()}


@pytest.mark.parametrize(("found", "refused"), [("0.13.2", True), ("0.14.0", False), ("1.0.0rc1", False)])
def test_an_older_one_is_refused_by_its_version(found: str, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "installed_version", lambda name: found)
    if refused:
        with pytest.raises(ConfigError, match=r"this needs peft 0\.14 or newer, found 0\.13\.2"):
            hf.library("peft")
    else:
        assert hf.library("peft").__name__ == "peft"


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the oldest versions, and pytest."""
    folder = tmp_path_factory.mktemp("oldest")
    if shutil.disk_usage(folder).free < 12 << 30:
        pytest.skip("needs 12 GB of disk")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    found = folder / "bin" / "python"
    wanted = [*lower_bounds().values(), "pytest", "hypothesis"]
    subprocess.run([found, "-m", "pip", "install", "--quiet", "--no-cache-dir", *wanted], check=True)
    return found


def run(python: Path, *arguments: str | Path, cwd: Path = ROOT) -> str:
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, *map(str, arguments)], cwd=cwd, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_these_are_the_versions(python: Path) -> None:
    found = json.loads(run(python, "-m", "pip", "list", "--format", "json"))
    versions = {of["name"].lower().replace("_", "-"): of["version"].partition("+")[0] for of in found}
    for name, pinned in lower_bounds().items():
        wanted = pinned.partition("==")[2]
        assert (versions[name.lower().replace("_", "-")] + ".0.0").startswith(wanted), name


@pytest.mark.slow
def test_our_tests_pass(python: Path) -> None:
    options = ["-q", "-m", "not slow", "-p", "no:cacheprovider"]
    assert "passed" in run(python, "-m", "pytest", *options, *files_of_tests())


@pytest.mark.slow
def test_a_real_model(python: Path, smollm2: Path, tmp_path: Path) -> None:
    """The same bits as with the newest; and transformers and PEFT of that age compare it, and talk to it."""
    base = tmp_path / "base"
    shutil.copytree(smollm2, base)
    # What transformers 5 calls its class of tokenizers; one that is to be loaded by 4.45 says it so.
    settings = json.loads((base / "tokenizer_config.json").read_text())
    write_json(base / "tokenizer_config.json", {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
    config = {"base": str(base), "adapters": [str(ADAPTER)], "output": {"path": str(tmp_path / "old")}}
    old = write_json(tmp_path / "old.yaml", config)
    run(python, "-m", "shardmerge", "plan", old)
    run(python, "-m", "shardmerge", "run", old)
    run(Path(sys.executable), "-m", "shardmerge", "run", old, "-s", f"output.path={tmp_path / 'new'}")
    ours, theirs = stored(tmp_path / "new"), stored(tmp_path / "old")
    assert ours.keys() == theirs.keys() and all(tensor.equal(theirs[name]) for name, tensor in ours.items())
    commands: list[list[str | Path]] = [
        ["verify", tmp_path / "old"],
        ["inspect", tmp_path / "old"],
        ["compare", tmp_path / "old", "--max-new-tokens", "8"],
        ["chat", tmp_path / "old", "--prompt", "What is the capital of Loraland?"],
        ["export", tmp_path / "old", "--format", "gguf", "-o", tmp_path / "gguf"],
        ["verify", tmp_path / "gguf"],
    ]
    for command in commands:
        run(python, "-m", "shardmerge", *command)
