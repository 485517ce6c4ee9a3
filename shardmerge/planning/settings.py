"""Settings of the config that only the machine, or the whole plan, can judge: a device, and what would do nothing."""

from __future__ import annotations

from shardmerge.adapters.work import tile_dtype
from shardmerge.codecs.registry import encoder
from shardmerge.spec.plans import MergePlan
from shardmerge.spec.tensors import DTYPE_BITS, dtype_code


def check_device(name: str) -> list[str]:
    """Whether a device is there. torch takes a second to import, so it is asked only where it is not the CPU."""
    if name in ("auto", "cpu"):
        return []
    from shardmerge.system import torch_devices

    return list(filter(None, [torch_devices.missing(name)]))


def check_memory(plan: MergePlan) -> list[str]:
    """Whether the memory that the config allows is enough."""
    allowed = plan.config["compute"]["max_memory"]
    if allowed == "auto" or plan.memory.total <= allowed:
        return []
    return [
        f"compute.max_memory is {allowed:,} bytes, but the largest layer needs {plan.memory.total:,} to work on at "
        "least 16 of its rows at a time; give at least that"
    ]


def check_rounding(plan: MergePlan) -> list[str]:
    """Whether stochastic rounding was asked for where no updated weight is rounded at all."""
    if plan.rounding != "stochastic":
        return []
    compute_dtype = dtype_code(plan.compute_dtype)
    updated = [tensor for shard in plan.shards for tensor in shard.tensors if tensor.updates]
    kinds = {(tile_dtype(tensor, compute_dtype), encoder(tensor).rounds_to(tensor)) for tensor in updated}
    if not kinds or any(DTYPE_BITS[to] < DTYPE_BITS[of] for of, to in kinds):
        return []
    of, to = min(kinds)
    return [
        f"output.rounding: stochastic has no effect: updated weights are computed in {of} and stored in {to}, so none "
        "is rounded; remove it, or give a narrower output.dtype"
    ]
