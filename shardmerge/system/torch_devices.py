"""Resolves the device of a setting."""

from __future__ import annotations

import torch

from shardmerge.errors import PlanError


def missing(name: str, setting: str = "compute.device") -> str | None:
    """Why torch does not find a device that ``setting`` names; None if it does."""
    device = torch.device("cpu" if name == "auto" else name)
    found = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type != "cuda" or (device.index or 0) < found:
        return None
    instead = f"there are cuda:0 to cuda:{found - 1}, and cpu" if found else "cpu (or auto) always exists"
    if torch.version.cuda is None and torch.version.hip is None:
        instead += "; this build of torch is without CUDA"
    return f"{setting} is {name}, but torch {torch.__version__} finds {found} CUDA devices here; {instead}"


def resolve_device(name: str, setting: str = "compute.device", what: str = "the merge") -> torch.device:
    """The device ``name``. ``auto`` is the CPU: a merge is bound by the disk, and the CPU's sums are reproducible.

    Raises `PlanError`, which refuses ``what``, if torch does not find the device that ``setting`` names.
    """
    if problem := missing(name, setting):
        raise PlanError([problem], what)
    return torch.device("cpu" if name == "auto" else name)


def has_cuda() -> bool:
    return torch.cuda.is_available()
