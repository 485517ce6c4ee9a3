"""What the readers of adapters claim of a file's tensors, without a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardmerge.adapters.claims import Claims
from shardmerge.adapters.registry import FORMATS
from shardmerge.spec.tensors import TensorRef
from tests.support.builders import RANK, content, peft_config, peft_tensors


def shapes(*modules: str, infix: str = "", rank: int = RANK) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in peft_tensors(modules, rank, infix=infix).items()}


def claim_peft(tensors: Mapping[str, TensorRef], **changes: Any) -> Claims:
    return FORMATS["peft"].claim(content(tensors, peft_config(**changes)))
