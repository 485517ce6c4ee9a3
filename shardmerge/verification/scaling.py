"""The scaling of LoRA's updates, worked out once more from the adapter's own files.

On purpose no code of ``shardmerge.adapters`` is called: a mistake there must not repeat itself here. The definitions:

- PEFT: α / r, or α / √r with ``use_rslora``. α and r are ``lora_alpha`` and ``r``, or the value of the first key of
  ``alpha_pattern`` and ``rank_pattern`` that, as a regular expression, matches the end of the module's name (of a
  parameter in ``target_parameters``: the module's and the parameter's). The out_proj of an nn.MultiheadAttention that
  is a target gets its update twice, and its α and r by the name of that. An ``lora_alpha`` of 0 is our config's
  ``alpha``.
- PEFT's keys without a config, and pure PyTorch: our config's ``scaling``, or its ``alpha`` / r.
- kohya: our config's ``scaling``, or α / r with our config's ``alpha`` or the file's; 1 where there is none, or where
  the file's is 0.
- MLX: ``lora_parameters.scale``.

All of them times the adapter's ``weight`` in our config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardmerge.adapter_file import AdapterFile
from shardmerge.config import AdapterConfig
from shardmerge.naming import module_name
from shardmerge.spec import Update

#: Families whose scaling is worked out here.
SCALED = frozenset({"lora", "dora", "lora-experts", "lora-blocks", "lora-gated", "lora-bias"})


@dataclass(frozen=True, slots=True)
class ScaledBy:
    """What an adapter's scalings depend on: its files, and what our config says of it."""

    adapter: AdapterFile
    entry: AdapterConfig

    def scaling(self, update: Update) -> float:
        """The whole multiplier of an update of one of the families `SCALED`."""
        return self._own(update) * self.entry.weight

    def _own(self, update: Update) -> float:
        entry, config = self.entry, self.adapter.config
        kind = self.adapter.format(entry.format)
        if kind == "mlx" and config is not None:
            return float(config["lora_parameters"]["scale"])
        if kind == "peft" and config is not None:
            return self._peft(update, config)
        if entry.scaling is not None:
            return entry.scaling
        if kind == "kohya":
            alpha = self._kohya_alpha(update) if entry.alpha is None else entry.alpha
            return 1.0 if alpha is None else alpha / _rank(update)
        if entry.alpha is None:
            raise ValueError("neither alpha nor scaling is known")
        twice = 2 if kind == "peft" and _attention(_owner(update), {}) else 1
        return twice * entry.alpha / self._bare_rank(update)

    def _peft(self, update: Update, config: Mapping[str, Any]) -> float:
        owner = _owner(update)
        module = module_name(owner)
        of_parameter = any(key == "layout" for key, _ in update.settings)
        if of_parameter:
            while module.endswith(".base_layer"):
                module = module.removesuffix(".base_layer")
            module = f"{module}.{update.parameter}"
        attention = "" if of_parameter else _attention(module, config)
        twice = 2 if attention else 1
        module = _unwrapped(attention or module)
        rank = _by_pattern(config.get("rank_pattern"), module, config["r"])
        alpha = _by_pattern(config.get("alpha_pattern"), module, config["lora_alpha"] or self.entry.alpha or 0)
        return twice * float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def _bare_rank(self, update: Update) -> int:
        if update.has("A"):
            return _rank(update)
        first = next(name for name in self.adapter.tensors if name.startswith(f"{_owner(update)}.lora_A"))
        return self.adapter.tensors[first].shape[0]

    def _kohya_alpha(self, update: Update) -> float | None:
        name = re.sub(r"(\.lora_down\.weight|[._]lora\.down\.weight)$", "", update.factor("A").name) + ".alpha"
        ref = self.adapter.tensors.get(name)
        return None if ref is None else self.adapter.read_number(ref) or None


def _rank(update: Update) -> int:
    """Rows of A; a factor that is stored transposed is seen the right way round."""
    return update.factor("A").shape[0]


def _owner(update: Update) -> str:
    """What stands before the factor's name in the adapter's key."""
    return update.factors[0][1].name.rpartition(".lora_")[0]


def _attention(module: str, config: Mapping[str, Any]) -> str:
    """The nn.MultiheadAttention whose wrapper a module, by its name in the file, is below; empty where there is none.

    A module whose own parameters are in ``target_parameters`` is wrapped, too, but is no target itself.
    """
    around, _, inside = module.rpartition(".base_layer.")
    targets = config.get("target_modules")
    if inside != "out_proj" or (targets is None and config.get("target_parameters")):
        return ""
    name = _unwrapped(around)
    if isinstance(targets, str):
        return around if targets == "all-linear" or re.fullmatch(targets, name) else ""
    return around if targets is None or any(f".{name}".endswith(f".{target}") for target in targets) else ""


def _unwrapped(module: str) -> str:
    return re.sub(r"(\.base_layer)+(?=\.)", "", module)


def _by_pattern(pattern: Any, module: str, default: Any) -> Any:
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
