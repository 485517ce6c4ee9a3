"""PEFT's files: ``adapter_config.json`` with the keys of one of its methods, or its LoRA keys alone.

`adapters.formats.peft_method` reads a method's keys, `adapters.formats.bare` LoRA without a config.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection, Mapping

from shardmerge.adapters.claims import NO_BASE, BaseView, Claims
from shardmerge.adapters.formats import bare
from shardmerge.adapters.formats.base import AdapterContent, AdapterFormat, Config, Pairs, Tensors
from shardmerge.adapters.formats.checks import is_number
from shardmerge.adapters.formats.peft_lora import LoraMethod
from shardmerge.adapters.formats.peft_method import METHODS, Context
from shardmerge.spec.tensors import Orientation

_BESIDE = "keep the adapter beside the base and load both with PEFT"
_PROMPT = (
    "it trains virtual tokens or what attention sees of them, not weights, so there is nothing to merge; " + _BESIDE
)

#: Methods of PEFT that have no merge: ``peft_type`` → why, and the way out.
REFUSED_TYPES: Mapping[str, str] = {
    "PROMPT_TUNING": _PROMPT,
    "MULTITASK_PROMPT_TUNING": _PROMPT,
    "P_TUNING": _PROMPT,
    "PREFIX_TUNING": _PROMPT,
    "CPT": _PROMPT,
    "CARTRIDGE": _PROMPT,
    "ADAPTION_PROMPT": "it adds gated attention over trained prompts to layers, so no weight is equal to it; "
    f"{_BESIDE}",
    "XLORA": "it mixes several LoRA adapters by a classifier that looks at every token; merge one of them, or a "
    "fixed mix",
    "POLY": "it mixes skills by the task that every input names when it runs, so no one weight is equal to it "
    f"for all tasks; {_BESIDE}",
    "SHADOW": "it runs a second, smaller model beside the base, which changes what goes from layer to layer, so "
    f"no weight is equal to it; {_BESIDE}",
    "LILY": f"a router mixes shared matrices anew for every input, so no weight is equal to it; {_BESIDE}",
    "ADAMSS": "which rows each of its subspaces has is not in its files: when PEFT loads it, scikit-learn's k-means "
    "groups them anew by W's singular vectors, and nothing in the files shows whether they are the groups of the "
    "training; merge it with PEFT, and with the scikit-learn of the training",
}


class Peft(AdapterFormat):
    name = "peft"
    summary = (
        "PEFT's `adapter_config.json` with `adapter_model.safetensors` or `.bin`, any method of the table below; "
        "or its LoRA keys alone, as diffusers and ComfyUI's trainers write them, with the scale in the file or our "
        "config"
    )
    config_states_scale = True
    heeds_ignored_keys = True
    pairs = Pairs(
        re.compile(r"(?P<module>.+)\.lora_(?P<role>[AB])(\.\w+)?\.weight"), orientation=Orientation.TRANSPOSED
    )

    def detect(self, tensors: Tensors, config: Config | None) -> bool:
        return config is not None and "peft_type" in config

    def method(self, tensors: Collection[str], config: Config | None) -> str:
        return str((config or {}).get("peft_type", LoraMethod.peft_type))

    def is_loaded_by_peft(self, config: Config | None) -> bool:
        return config is not None

    def claim(self, content: AdapterContent, base: BaseView = NO_BASE) -> Claims:
        config, alpha = content.config, content.alpha
        if config is not None and alpha is not None and _has_zero_alpha(config):
            config = {**config, "lora_alpha": alpha}
            content = dataclasses.replace(content, config=config, alpha=None, scaling=None)
        return super().claim(content, base)

    def read(self, content: AdapterContent, base: BaseView) -> Claims:
        context = Context(content.config or {}, base, expert_layout=content.expert_layout, ignored=content.ignored)
        if content.config is None:
            return bare.claim(content.tensors, content.scales, context)
        peft_type = content.config.get("peft_type")
        if isinstance(peft_type, str) and (method := METHODS.get(peft_type)):
            return method.claim(content.tensors, context)
        return Claims.refusal(_unknown_method(peft_type))


def _has_zero_alpha(config: Config) -> bool:
    """Whether a LoRA's config holds the 0 that exporters write as a placeholder; with it the adapter does nothing."""
    alpha = config.get("lora_alpha")
    return config.get("peft_type") == LoraMethod.peft_type and is_number(alpha) and alpha == 0


def _unknown_method(peft_type: object) -> str:
    known = ", ".join(sorted(METHODS))
    if peft_type is None:
        return f"adapter_config.json names no peft_type; this version merges {known}"
    if reason := REFUSED_TYPES.get(str(peft_type)):
        return f"peft_type {peft_type}: {reason}"
    near = difflib.get_close_matches(str(peft_type), METHODS, 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"peft_type {str(peft_type)[:80]!r} is unknown{hint}; this version merges {known}"
