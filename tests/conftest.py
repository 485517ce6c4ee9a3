"""What every test has: no network by accident, and the real model where a test asks for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# A failed assertion of a helper shows its values, as that of a test does.
pytest.register_assert_rewrite("tests.support", "tests.contracts")

if TYPE_CHECKING:
    from tests.support.gguf_merges import GgufModels

# transformers and PEFT look for files of a model on the Hub, even of one in a local directory.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads of torch that wait for work would otherwise take the cores of other tests. Set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The tests start hundreds of processes. Without bytecode, each would compile the package again, and each run the tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch computes with one thread.

    Two that wait for each other on a busy machine take seconds for what one does in milliseconds; and how many there
    are moves the last bit of products of small or odd sizes.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


#: Folders whose tests compare values for which the number of torch's threads has no meaning.
_ONE_THREAD = ("adapters", "codecs", "contracts", "gguf", "planning", "verification")


@pytest.fixture(scope="module", autouse=True)
def _threads_of_folder(request: pytest.FixtureRequest) -> None:
    if request.path.parent.name in _ONE_THREAD:
        request.getfixturevalue("one_thread")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a bf16 checkpoint in three shards, built once and cached outside the tree."""
    from tools.smollm2 import ensure_base

    return ensure_base()


@pytest.fixture(scope="session")
def gguf_models(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> GgufModels:
    """Models that a GGUF file can hold, with adapters, by their name in `tests.support.gguf_zoo`."""
    from tests.support.gguf_merges import GgufModels

    return GgufModels(tmp_path_factory.mktemp("gguf-models"), smollm2)
