"""Which devices torch finds on this machine."""

from __future__ import annotations

import torch

from shardmerge.errors import PlanError


def missing(name: str, setting: str = "compute.device") -> str | None:
    """Why there is no such device here; None where there is. ``setting`` asked for it."""
    device = torch.device("cpu" if name == "auto" else name)
    found = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type != "cuda" or (device.index or 0) < found:
        return None
    instead = f"there are cuda:0 to cuda:{found - 1}, and cpu" if found else "cpu (or auto) always is there"
    if torch.version.cuda is None and torch.version.hip is None:
        instead += "; this build of torch is without CUDA"
    return f"{setting} is {name}, but torch {torch.__version__} finds {found} CUDA devices here; {instead}"


def resolve_device(name: str, setting: str = "compute.device", what: str = "the merge") -> torch.device:
    """``auto`` is the CPU: a merge is bound by the disk, and the CPU's sums are the same everywhere.

    Raises `PlanError` if the device is not there; ``setting`` asked for it, and ``what`` is refused.
    """
    if problem := missing(name, setting):
        raise PlanError([problem], what)
    return torch.device("cpu" if name == "auto" else name)


def has_cuda() -> bool:
    return torch.cuda.is_available()
