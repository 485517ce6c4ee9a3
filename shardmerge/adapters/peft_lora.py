"""PEFT's LoRA files: ``adapter_config.json`` and the keys of ``adapter_model.safetensors`` → updates.

Keys are ``base_model.model.<module>.lora_A.weight`` (r, in) and ``….lora_B.weight`` (out, r), at times with the
adapter's name before ``.weight``. Source: peft/tuners/lora/config.py and layer.py, 0.21.
"""

from __future__ import annotations

import math
import re
import reprlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from shardmerge.adapters.base import Claims, ModuleUpdate
from shardmerge.naming import module_name
from shardmerge.spec import TensorRef

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<role>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")

#: Config keys that do not change what a merge means.
_INERT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
        "velora_config",
    }
)
#: Config keys that are read below.
_READ = frozenset(
    {
        "alpha_pattern",
        "bias",
        "init_lora_weights",
        "lora_alpha",
        "r",
        "rank_pattern",
        "target_modules",
        "use_rslora",
    }
)
#: Initialisations after which B A is the whole update. Others move the base, or change what the factors mean.
_PLAIN_INITIALISATIONS = ("gaussian", "eva", "orthogonal", "loftq", "true", "false")
#: Features by config key: set to anything but null, false or empty, the adapter is more than LoRA on Linear layers.
_UNSUPPORTED: Mapping[str, str] = {
    "use_dora": "DoRA",
    "lora_bias": "trained biases of lora_B",
    "modules_to_save": "modules that were trained whole",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "LoRA on parameters (fused experts)",
    "layer_replication": "replicated layers: the model has layers that the base does not store",
    "alora_invocation_tokens": "activated LoRA, which acts on some tokens only and cannot be merged",
    "use_qalora": "QALoRA, whose A is pooled over groups of the input",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing, which chooses an adapter per token and cannot be merged",
    "kasa_config": "KaSA, which truncates the base's singular values",
    "monteclora_config": "MonteCLoRA",
}
#: What is wrong with tensors that are left over, by the segment that gives them away.
_LEFTOVER_KINDS: Mapping[str, str] = {
    ".lora_embedding_": "LoRA on an embedding, not supported yet",
    ".lora_magnitude_vector": "DoRA, not supported yet",
    ".token_adapter.": "trained token embeddings, not supported yet",
    ".modules_to_save.": "a module that was trained whole, not supported yet",
    ".base_layer.": "a replaced base layer, not supported yet",
}


def leftover_kind(name: str) -> str:
    """What a tensor that belongs to no update seems to be; empty where that cannot be said."""
    if re.search(r"\.lora_B(\.[^.]+)?\.bias$", name):
        return "a bias of lora_B, not supported yet"
    return next((kind for segment, kind in _LEFTOVER_KINDS.items() if segment in name), "")


def claim(tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Claims:
    """Check the config, pair the factors, compute each module's scaling."""
    claims = Claims(problems=_config_problems(config))
    if claims.problems:
        claims.refused = True
        return claims
    for (name, infix), pair in _pairs(tensors).items():
        module = module_name(name)
        rank: int = _pattern(config.get("rank_pattern"), module, config["r"])
        alpha: float = _pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
        scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        _claim_pair(claims, name, infix, pair, rank, scaling)
        if not _is_target(module, config.get("target_modules")):
            claims.problems.append(
                f"adapter_config.json's target_modules do not cover {module}, for which the adapter has tensors; "
                "PEFT would ignore them"
            )
    return claims


def claim_bare(tensors: Mapping[str, TensorRef], alpha: float | None, scaling: float | None) -> Claims:
    """PEFT's keys without a config: the rank is in the shapes, alpha or scaling must be given."""
    if alpha is None and scaling is None:
        problem = "there is no adapter_config.json beside it, so its scale is unknown: give alpha (or scaling)"
        return Claims(problems=[problem], refused=True)
    claims = Claims()
    for (name, infix), pair in _pairs(tensors).items():
        rank = (pair["A"].shape[:1] if "A" in pair else ()) or (1,)
        scale = scaling if scaling is not None else (alpha or 0.0) / max(rank[0], 1)
        _claim_pair(claims, name, infix, pair, rank[0], scale)
    return claims


def _pairs(tensors: Mapping[str, TensorRef]) -> dict[tuple[str, str], dict[str, TensorRef]]:
    pairs: dict[tuple[str, str], dict[str, TensorRef]] = {}
    for name, ref in tensors.items():
        if match := _FACTOR.fullmatch(name):
            pairs.setdefault((match["module"], match["adapter"] or ""), {})[match["role"]] = ref
    return pairs


def _claim_pair(
    claims: Claims, name: str, infix: str, pair: Mapping[str, TensorRef], rank: int, scaling: float
) -> None:
    module = module_name(name)
    if missing := {"A", "B"} - pair.keys():
        suffix = f".{infix}.weight" if infix else ".weight"
        there = next(iter(pair.values()))
        claims.half(there, f"{name}.lora_{missing.pop()}{suffix}")
        return
    a, b = pair["A"], pair["B"]
    claims.updates.append(ModuleUpdate(module, "weight", "lora", (("A", a), ("B", b)), scaling, rank))
    if 0 in a.shape or 0 in b.shape:
        return  # an empty tensor is told of as such
    if len(a.shape) != 2 or len(b.shape) != 2:
        claims.misfit(
            f"{a.name} {list(a.shape)} and {b.name} {list(b.shape)} are no matrices: LoRA on a convolution is not "
            "supported yet"
        )
    elif a.shape[0] != b.shape[1]:
        claims.misfit(
            f"{a.name} {list(a.shape)} and {b.name} {list(b.shape)} disagree on the rank: expected (r, in) and (out, r)"
        )
    elif a.shape[0] != rank:
        claims.misfit(
            f"{a.name} has rank {a.shape[0]}, but adapter_config.json says {rank} for {module} (r and rank_pattern)"
        )


def _pattern(pattern: Any, module: str, default: Any) -> Any:
    """The value of the first key, in the file's order, that matches the end of the module's name, as PEFT does it."""
    for key, value in (pattern or {}).items():
        if re.match(_whole_pattern(key), module):
            return value
    return default


def _whole_pattern(key: str) -> str:
    """What PEFT makes of a key of rank_pattern or alpha_pattern."""
    return rf"(.*\.)?({key})$"


def _is_target(module: str, target_modules: Any) -> bool:
    if target_modules is None or target_modules == "all-linear":
        return True
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in target_modules)


# --- the config -------------------------------------------------------------------------------------------------------


def _config_problems(config: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{key}: {what} (not supported yet)" if "cannot be merged" not in what else f"{key}: {what}"
        for key, what in _UNSUPPORTED.items()
        if config.get(key)
    ]
    if (bias := config.get("bias", "none")) not in ("none", None):
        problems.append(f"bias: {bias!r}: trained biases (not supported yet)")
    problems += _initialisation_problems(config.get("init_lora_weights", True))
    unknown = [key for key, value in config.items() if value and key not in _INERT | _READ | _UNSUPPORTED.keys()]
    problems += [
        f"adapter_config.json: the key {key!r} is unknown to this version, and so is what it does to the weights; "
        "if it does nothing to them, remove it from the file"
        for key in unknown
    ]
    return problems + [problem for check in _TYPE_CHECKS for problem in check(config)]


def _initialisation_problems(value: Any) -> list[str]:
    name = str(value).lower()
    if name.startswith(_PLAIN_INITIALISATIONS) or value is None:
        return []
    return [
        f"init_lora_weights: {value!r}: this initialisation changes the base's own weights, so B A alone is not the "
        "update. Convert the adapter with PEFT first (save_pretrained with path_initial_model_for_weight_conversion), "
        "which sets init_lora_weights to true"
    ]


def _is_number(value: Any) -> bool:
    # Compared rather than asked isfinite, which fails on a whole number beyond all floats.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _check_value(key: str, valid: Callable[[Any], bool], expected: str) -> Callable[[Mapping[str, Any]], list[str]]:
    def check(config: Mapping[str, Any]) -> list[str]:
        if key in config and valid(config[key]):
            return []
        found = reprlib.repr(config[key]) if key in config else "nothing"
        return [f"adapter_config.json: {key} must be {expected}, found {found}"]

    return check


def _check_pattern(key: str, valid: Callable[[Any], bool], expected: str) -> Callable[[Mapping[str, Any]], list[str]]:
    def check(config: Mapping[str, Any]) -> list[str]:
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            return [f"adapter_config.json: {key} must map module names to values, found {reprlib.repr(patterns)}"]
        problems = []
        for pattern, value in patterns.items():
            place = f"{key}[{reprlib.repr(pattern)}]"
            if not valid(value):
                problems.append(f"adapter_config.json: {place} must be {expected}, found {reprlib.repr(value)}")
            problems += _regex_problems(place, _whole_pattern(pattern))
        return problems

    return check


def _check_flag(config: Mapping[str, Any]) -> list[str]:
    value = config.get("use_rslora")
    if value is None or isinstance(value, bool):
        return []
    return [f"adapter_config.json: use_rslora must be true or false, found {reprlib.repr(value)}"]


def _check_targets(config: Mapping[str, Any]) -> list[str]:
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return _regex_problems("target_modules", targets) if targets != "all-linear" else []
    if targets is None or (isinstance(targets, list) and all(isinstance(target, str) for target in targets)):
        return []
    found = reprlib.repr(targets)
    return [f"adapter_config.json: target_modules must be a string or a list of strings, found {found}"]


def _regex_problems(where: str, pattern: str) -> list[str]:
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return [f"adapter_config.json: {where} is no regular expression: {error}"]
    return []


_TYPE_CHECKS: tuple[Callable[[Mapping[str, Any]], list[str]], ...] = (
    _check_value("r", _is_rank, "a whole number above zero"),
    _check_flag,
    _check_value("lora_alpha", _is_number, "a finite number"),
    _check_pattern("rank_pattern", _is_rank, "a whole number above zero"),
    _check_pattern("alpha_pattern", _is_number, "a finite number"),
    _check_targets,
)
