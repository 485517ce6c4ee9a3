"""The settings of compressed-tensors: groups of modules, each with a scheme by which its weights are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardmerge.codecs.quantization import groups

METHOD = "compressed-tensors"
#: Formats whose tensors have other meanings than their names say.
_UNREAD = ("sparse-24-bitmask", "sparse-bitmask", "marlin-24")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of a group are stored: ``strategy`` says what has a scale of its own."""

    kind: str
    bits: int
    strategy: str
    group_size: int
    is_symmetric: bool

    def __str__(self) -> str:
        of = f"a scale for {self.group_size} columns" if self.strategy == "group" else f"a scale a {self.strategy}"
        return f"{self.kind} of {self.bits} bits with {of}{'' if self.is_symmetric else ' and zero points'}"


def schemes(settings: Mapping[str, Any], kind: str) -> list[Scheme]:
    """The schemes of a kind, ``int`` or ``float``, that the settings name; what makes no sense is left out."""
    found = []
    for weights in groups(settings):
        bits, size = weights.get("num_bits", 8), weights.get("group_size")
        if weights.get("type", "int") != kind or type(bits) is not int or not 1 <= bits <= 8:
            continue
        has_groups = type(size) is int and size > 0
        strategy = weights.get("strategy") or ("group" if has_groups else "channel" if size == -1 else "tensor")
        strategy = "group" if strategy == "tensor_group" else strategy
        if strategy not in ("group", "channel", "tensor") or (strategy == "group" and not has_groups):
            continue
        symmetric = weights.get("symmetric", True) is not False
        found.append(Scheme(kind, bits, strategy, size if strategy == "group" and size else 0, symmetric))
    return list(dict.fromkeys(found))


def refusal(settings: Mapping[str, Any]) -> str:
    """Why the weights of a checkpoint with these settings are not what their tensors say; empty where they are."""
    sparsity = settings.get("sparsity_config")
    of = [settings.get("format"), sparsity.get("format") if isinstance(sparsity, dict) else None]
    if unread := [name for name in of if name in _UNREAD]:
        return f"config.json says the format {unread[0]}, which cannot be read"
    transforms = settings.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        return "config.json has a transform_config: weights are stored rotated, which cannot be merged into"
    return ""
