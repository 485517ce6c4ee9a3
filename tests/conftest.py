"""What every test has: no network by accident, and the real model where a test asks for it."""

from __future__ import annotations

import os
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
