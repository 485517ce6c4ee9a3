"""The scaling of LoRA's updates, computed a second time from the adapter's own files.

No code that reads adapters for a merge is called, so a mistake there cannot repeat itself here. The definitions, by the
adapter's format ("our config" is the merge's):

- PEFT: α / r, or α / √r with ``use_rslora``. α is ``lora_alpha``, or the value of the first key of ``alpha_pattern``
  that, as a regular expression, matches the end of the module's name (for a parameter in ``target_parameters``, of the
  module's and the parameter's name); r likewise by ``r`` and ``rank_pattern``. Where an nn.MultiheadAttention is a
  target, its out_proj gets the update twice, with α and r of the attention's name. Our config's ``alpha`` replaces a
  ``lora_alpha`` of 0.
- Any file without a config: our config's ``scaling``, or α / r. α is our config's ``alpha``; otherwise a number stored
  beside the factors; otherwise the value in the header's metadata, which is a number, or PEFT's config as JSON, read as
  above (with one section for each part of a pipeline). Without any of these, the scale is 1.
- MLX: ``lora_parameters.scale``.

Each is multiplied by the adapter's ``weight`` in our config.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from shardmerge.adapters.methods.lora_experts import ExpertSettings
from shardmerge.config.schema import AdapterConfig
from shardmerge.file_formats.adapter_file import AdapterFile
from shardmerge.file_formats.adapter_opening import open_adapter
from shardmerge.key_mapping.naming import module_name, unwrapped
from shardmerge.sources.source import open_source
from shardmerge.spec.updates import Update

#: The end of a factor's key, in any of the formats.
_FACTOR = re.compile(r"(\.lora_[A-Za-z_]+(\..*)?|[._]lora(_linear_layer)?\.(down|up)\.weight|\.[AB])$")
_ALPHAS = ("ss_network_alpha", "network_alpha", "lora_alpha", "alpha")


@dataclass(frozen=True, slots=True)
class ScaledBy:
    """An adapter's files and its entry in our config, which determine its scalings."""

    adapter: AdapterFile
    entry: AdapterConfig
    format: str

    @classmethod
    def of(cls, entry: AdapterConfig) -> ScaledBy:
        """Open an entry's adapter; without tensors if its config suffices: those of 45,000 targets take 40 MB."""
        adapter = open_adapter(open_source(entry.path), entry.ignore_files)
        form = adapter.format(entry.format)
        if adapter.config is not None and form in _BY_CONFIG:
            adapter = dataclasses.replace(adapter, tensors={})
        return cls(adapter, entry, form)

    def scaling(self, update: Update) -> float:
        """The multiplier of an update of a family in `formulas.FORMULAS`.

        For a format that is not defined here, it is the plan's.
        """
        defined = _BY_FORMAT.get(self.format)
        return update.scaling if defined is None else defined(self, update) * self.entry.weight

    def mlx(self, update: Update) -> float:
        """The scale in MLX's config, which holds for all modules."""
        return float((self.adapter.config or {})["lora_parameters"]["scale"])

    def peft(self, update: Update) -> float:
        """By PEFT's config; without one as `bare`, but twice for the out_proj of an nn.MultiheadAttention."""
        if self.adapter.config is not None:
            return self._peft(update, self.adapter.config)
        return self.bare(update, twice=2 if _attention(_owner(update), {}) else 1)

    def bare(self, update: Update, twice: int = 1) -> float:
        """By our config, the file's numbers and its metadata."""
        entry = self.entry
        if entry.scaling is not None:
            return entry.scaling
        alpha = entry.alpha
        if alpha is None:
            beside = _FACTOR.sub(".alpha", update.factors[0][1].name)
            if beside not in self.adapter.tensors and (config := self._config_in_header(update)) is not None:
                return self._peft(update, config)
            alpha = alpha_said(self.adapter, beside)
        return twice * (1.0 if alpha is None else alpha / self._rank(update))

    def _peft(self, update: Update, config: Mapping[str, Any]) -> float:
        owner = _owner(update)
        module = module_name(owner).removeprefix(config.get("part", ""))
        of_parameter = isinstance(update.settings, ExpertSettings)
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

    def _rank(self, update: Update) -> int:
        """Rows of A as (r, in), however it is stored. The A of a bias is another tensor of its module."""
        if update.has("A"):
            return update.factor("A").shape[0]
        first = next(name for name in self.adapter.tensors if unwrapped(name).startswith(f"{_owner(update)}.lora_A"))
        return self.adapter.tensors[first].shape[0]

    def _config_in_header(self, update: Update) -> Mapping[str, Any] | None:
        """The config that diffusers writes; ``transformer.r`` applies to modules that begin with ``transformer.``."""
        said = _parsed(self.adapter.metadata.get("lora_adapter_metadata", "{}"))
        module = module_name(_owner(update))
        parts = [key.removesuffix("lora_alpha") for key in said if key == "lora_alpha" or key.endswith(".lora_alpha")]
        part = next((part for part in parts if module.startswith(part)), None)
        if part is None:
            return None
        config = {key.removeprefix(part): value for key, value in said.items() if key.startswith(part)}
        return {**config, "part": part}


#: The scaling by the format's name.
_BY_FORMAT: Mapping[str, Callable[[ScaledBy, Update], float]] = {
    "kohya": ScaledBy.bare,
    "mlx": ScaledBy.mlx,
    "peft": ScaledBy.peft,
    "pure-pytorch": ScaledBy.bare,
}
#: Formats whose config, where there is one, determines the scaling alone.
_BY_CONFIG = frozenset({"mlx", "peft"})


def alpha_said(adapter: AdapterFile, beside: str) -> float | None:
    """α of a module by the adapter's file: the tensor named ``beside``, or the metadata's number."""
    if (ref := adapter.tensors.get(beside)) is not None:
        return adapter.read_number(ref)
    return next((float(adapter.metadata[key]) for key in _ALPHAS if key in adapter.metadata), None)


@lru_cache(maxsize=4)
def _parsed(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    return found


def _owner(update: Update) -> str:
    """The part of the adapter's key before the factor's name."""
    return _FACTOR.sub("", unwrapped(update.factors[0][1].name))


def _attention(module: str, config: Mapping[str, Any]) -> str:
    """The nn.MultiheadAttention that wraps the module of this name in the file; empty where none does.

    A module whose own parameters are in ``target_parameters`` is wrapped too, but is not a target itself.
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
