"""Settings of the config that only the machine, or the whole plan, can judge: a device, and what would do nothing."""

from __future__ import annotations

from collections.abc import Sequence

from shardmerge.adapters.work import tile_dtype
from shardmerge.codecs.registry import encoder
from shardmerge.config.schema import MergeConfig
from shardmerge.spec.plans import ShardPlan
from shardmerge.spec.tensors import DTYPE_BITS


def check_device(name: str) -> list[str]:
    """Whether a device is there. torch takes a second to import, so it is asked only where it is not the CPU."""
    if name in ("auto", "cpu"):
        return []
    from shardmerge.system import torch_devices

    return list(filter(None, [torch_devices.missing(name)]))


def check_rounding(config: MergeConfig, shards: Sequence[ShardPlan], compute_dtype: str) -> list[str]:
    """Whether stochastic rounding was asked for where no updated weight is rounded at all."""
    if config.output.rounding != "stochastic":
        return []
    updated = [tensor for shard in shards for tensor in shard.tensors if tensor.updates]
    kinds = {(tile_dtype(tensor, compute_dtype), encoder(tensor).rounds_to(tensor)) for tensor in updated}
    if not kinds or any(DTYPE_BITS[to] < DTYPE_BITS[of] for of, to in kinds):
        return []
    of, to = min(kinds)
    return [
        f"output.rounding: stochastic has no effect: updated weights are computed in {of} and stored in {to}, so none "
        "is rounded; remove it, or give a narrower output.dtype"
    ]
