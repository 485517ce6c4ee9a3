"""The device on which a model answers, by the name that a person gives."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from shardmerge.config import suggestions
from shardmerge.config.choices import DEVICE, DEVICES
from shardmerge.errors import ConfigError

if TYPE_CHECKING:
    import torch


def device_named(name: str, what: str) -> torch.device:
    """``cpu``, ``cuda`` or ``cuda:1``; ``auto`` is the CPU. ``what`` is to run there.

    Raises `ConfigError` where the name means no device, `PlanError` where there is no such device.
    """
    from shardmerge.system.torch_devices import resolve_device

    if not re.fullmatch(DEVICE, name):
        hint = suggestions.hint(name, DEVICES)
        raise ConfigError(f"the device is {name!r}; expected auto, cpu, cuda or cuda:1" + (f"; {hint}" if hint else ""))
    return resolve_device(name, "the device", what)
