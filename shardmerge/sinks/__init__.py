"""Where a merge goes: the layout of the output, the writer of a shard, the commit of the whole."""

from __future__ import annotations

from shardmerge.sinks.layout import Layout, lay_out, output_dtype
from shardmerge.sinks.safetensors import SafetensorsSink, ShardWriter

__all__ = ["Layout", "SafetensorsSink", "ShardWriter", "lay_out", "output_dtype"]
