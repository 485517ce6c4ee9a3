"""What every test has: no network by accident, and the real model where a test asks for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# transformers and PEFT look for files of a model on the Hub, even of one in a local directory.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a bf16 checkpoint in three shards, built once and cached outside the tree."""
    from tools.smollm2 import ensure_base

    return ensure_base()
