"""Stored formats ↔ tiles in the compute dtype. Torch, no I/O."""

from __future__ import annotations

from shardmerge.codecs.floats import NUMBER_DTYPES, TORCH_DTYPES, encode_into, overflow_limit, view_bytes
from shardmerge.codecs.stochastic import encode_by_chance

__all__ = ["NUMBER_DTYPES", "TORCH_DTYPES", "encode_by_chance", "encode_into", "overflow_limit", "view_bytes"]
