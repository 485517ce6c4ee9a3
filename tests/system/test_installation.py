"""The note for those who have torch's build for CUDA and no GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from shardmerge.system.installation import CPU_BUILD, cuda_of_torch, first_time, needless_cuda
from tests.support.builders import make_place, run_cli, run_python

CUDA_BUILD = "from typing import Optional\n__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\n"
OLD_CUDA_BUILD = "__version__ = '2.7.0+cu126'\ncuda = '12.6'\nhip = None\n"
CPU_BUILDS = "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n"
ROCM_BUILD = "__version__ = '2.13.0+rocm6'\ncuda: Optional[str] = None\nhip: Optional[str] = '6.4'\n"


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``version.py`` of a torch that is found first."""
    (tmp_path / "site" / "torch").mkdir(parents=True)
    (tmp_path / "site" / "torch" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    return tmp_path / "site" / "torch" / "version.py"


@pytest.mark.parametrize(
    ("text", "cuda"),
    [(CUDA_BUILD, "13.0"), (OLD_CUDA_BUILD, "12.6"), (CPU_BUILDS, None), (ROCM_BUILD, None), ("", None)],
)
def test_which_build_it_is(text: str, cuda: str | None, installed: Path) -> None:
    installed.write_text(text)
    assert cuda_of_torch() == cuda


def test_the_torch_of_the_tests_is_what_it_says_itself() -> None:
    import torch

    assert cuda_of_torch() == torch.version.cuda


def test_only_without_a_gpu(installed: Path, tmp_path: Path) -> None:
    installed.write_text(CUDA_BUILD)
    note = needless_cuda(devices=[str(tmp_path / "none")])
    assert (note is not None and CPU_BUILD in note) == (sys.platform == "linux")
    assert needless_cuda(devices=[str(tmp_path)]) is None


def test_no_version_file(installed: Path) -> None:
    assert cuda_of_torch() is None


def test_it_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert [first_time("a"), first_time("b"), first_time("a"), first_time("b")] == [True, True, False, False]


def test_a_home_that_cannot_be_written_to_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert first_time("a") and first_time("a")


@pytest.mark.skipif(sys.platform != "linux" or Path("/dev/nvidiactl").exists(), reason="only Linux without a GPU")
@pytest.mark.slow
def test_a_run_says_it_the_first_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    place = make_place(tmp_path)
    config = place.config_file()
    patch = "import shardmerge.system.installation as of; of.cuda_of_torch = lambda: '13.0'; "
    said = [
        run_python("-c", f"{patch}from shardmerge.cli.main import main; main()", "run", config, "--overwrite").stderr
        for _ in range(2)
    ]
    assert CPU_BUILD in said[0] and CPU_BUILD not in said[1]
    assert "CUDA" not in run_cli("run", config, "--overwrite").stderr
