"""LoRA on parameters (``target_parameters``): the parameter of each pair, and the layout of B of fused experts.

PEFT wraps the module that holds the parameter, so that ``.base_layer`` is in the keys of all that is below it, and
nests the wrappers of several parameters, the first registered innermost. Of E experts A is (r·E, in), the experts
outermost. B is (out, r·E), and its columns are laid out in one of two ways:

- ``rank_major``, PEFT's own: column k·E + e is expert e's for the rank k;
- ``grouped_by_expert``: column e·r + k is. Unsloth's trainer used it until 2026, when it changed to PEFT's.

The shapes are the same. Unsloth states the layout since then, in ``lora_B_layout`` and ``unsloth_fused_expert_lora``;
``mixed`` means that the layers of a model differ.
Source: peft/tuners/lora/layer.py, ParamWrapper; unsloth-zoo, pull requests 1232 and 1269.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from shardmerge.adapters.claims import Claims, ModuleUpdate, shown
from shardmerge.adapters.formats.checks import MISSING, is_rank
from shardmerge.adapters.formats.lora_forms import variants
from shardmerge.adapters.formats.peft_method import Context, Module
from shardmerge.adapters.formats.peft_targets import matches
from shardmerge.adapters.methods.lora_experts import ExpertSettings, LoraExperts

#: The file's word for a layout → ours.
LAYOUTS: Mapping[str, str] = {"rank_major": "peft", "grouped_by_expert": "unsloth"}
_FLAT, _MARKER = "lora_B_layout", "unsloth_fused_expert_lora"
_DIFFERENCE = (
    "peft (column k·E + e of lora_B is expert e's for rank k) or unsloth (column e·r + k is; Unsloth's trainer packed "
    "it so until September 2026)"
)


# --- which parameter --------------------------------------------------------------------------------------------------


def bare(module: str) -> tuple[str, int]:
    """A module's name without the wrappers of its parameters, and their number."""
    depth = 0
    while module.endswith(".base_layer"):
        module, depth = module.removesuffix(".base_layer"), depth + 1
    return module, depth


def targeted(module: str, context: Context) -> list[str]:
    """Parameters of a module that ``target_parameters`` names, in the order of registration or else the config's."""
    targets = context.config.get("target_parameters")
    if not targets:
        return _all_targeted(module, context)
    known = context.base.registered(module)
    found = []
    for target in targets:
        owner, _, parameter = target.rpartition(".")
        named = module == owner or module.endswith(f".{owner}") if owner else _has(module, parameter, context)
        if named and parameter not in found:
            found.append(parameter)
    return [name for name in known if name in found] if known else found


def _all_targeted(module: str, context: Context) -> list[str]:
    """Trainers of fused experts may name them in ``target_modules``, which means all their matrices."""
    targets = context.config.get("target_modules")
    if not isinstance(targets, (list, frozenset)) or not matches(targets, module):
        return []
    return [name for name in context.base.registered(module) if "bias" not in name]


def _has(module: str, parameter: str, context: Context) -> bool:
    """Whether a module has a parameter of that name: a bare name is of all such modules."""
    if known := context.base.registered(module):
        return parameter in known
    return context.base.stored(module, parameter) is not None


def claim_parameter(claims: Claims, module: Module, rank: int, scaling: float, context: Context) -> None:
    """LoRA on a parameter of a module."""
    name, _ = bare(module.name)
    a, b = module.factors["A"], module.factors["B"]
    parameter = owner(module.name, context)
    if parameter is None:
        _report_unknown_parameter(claims, module, name, context)
        return
    extra = [ref for role, ref in module.factors.items() if role not in ("A", "B")]
    for ref in extra:
        claims.reject([ref], f"{ref.name}: target_parameters know neither DoRA nor biases")
    if names := variants(context.config):
        claims.problems.append(f"{name}.{parameter}: adapter_config.json sets {names[0]}, which target_parameters lack")
    version = str(context.config.get("peft_version") or "")
    settings = ExpertSettings("peft", version)
    claims.updates.append(
        ModuleUpdate(name, parameter, LoraExperts.name, (("A", a), ("B", b)), scaling, rank, settings=settings)
    )
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] % rank:
        claims.misfit(f"{shown(a, b)}: expected (r·E, in) and (out, r·E) with r = {rank}")
        return
    layout, problem = layout_of(parameter, rank, a.shape[0] // rank, context)
    if problem:
        claims.misfit(f"{b.name}: {problem}")
    elif layout != "peft":
        claims.updates[-1] = claims.updates[-1].changed(settings=ExpertSettings(layout, version))


def owner(module: str, context: Context) -> str | None:
    """The parameter of a pair of factors, by the module's name with its wrappers; None where it is unknown."""
    name, depth = bare(module)
    targets = targeted(name, context)
    if depth >= len(targets) or (len(targets) > 1 and not context.base.registered(name)):
        return None
    return targets[len(targets) - 1 - depth]


def _report_unknown_parameter(claims: Claims, module: Module, name: str, context: Context) -> None:
    a, targets = module.factors["A"], targeted(name, context)
    if len(targets) > 1 and not context.base.registered(name):
        claims.reject(
            module.refs,
            f"{a.name} belongs to one of {', '.join(targets)} of {name}, but which is unknown: the order in which "
            "the model registers them is not known",
        )
        return
    missing = f"a parameter of {name} in target_parameters that it could belong to"
    claims.half(a, missing, [module.factors["B"]])


# --- the layout of B --------------------------------------------------------------------------------------------------


def layout_of(parameter: str, rank: int, experts: int, context: Context) -> tuple[str, str]:
    """The layout of B of a parameter's experts, ``peft`` or ``unsloth``, and its problem."""
    said, given = _said(parameter, context.config), context.expert_layout
    wanted = _entry(parameter, context.config).get("num_experts")
    if wanted is not None and wanted != experts:
        return "peft", (
            f"{_MARKER} in adapter_config.json says that {parameter} has {wanted} experts, but lora_A has {experts} "
            f"times the rank {rank}"
        )
    if rank == 1 or experts == 1:
        return "peft", ""  # both are the same
    if said and given not in (None, LAYOUTS[said]):
        return "peft", (
            f"{_FLAT} in adapter_config.json says {said} for {parameter}, which is expert_layout: {LAYOUTS[said]}, but "
            f"the config says expert_layout: {given}; one of them is wrong. Leave expert_layout out to go by the file"
        )
    if said or given:
        return LAYOUTS[said] if said else str(given), ""
    if _is_unsloths(context.config):
        return "peft", (
            f"adapter_config.json is Unsloth's and does not say how lora_B of {parameter} is laid out, and the "
            f"numbers do not show it. Give expert_layout: {_DIFFERENCE}"
        )
    return "peft", ""


def _said(parameter: str, config: Mapping[str, Any]) -> str | None:
    """The file's word for the layout of a parameter's B."""
    word = _entry(parameter, config).get(_FLAT) or config.get(_FLAT)
    return str(word) if word else None


def _entry(parameter: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    marker = config.get(_MARKER) or {}
    found: Mapping[str, Any] = (marker.get("parameters") or {}).get(parameter) or {}
    return found


def _is_unsloths(config: Mapping[str, Any]) -> bool:
    """Whether Unsloth made the adapter, by its traces in the config."""
    mapping = config.get("auto_mapping")
    return bool(config.get(_MARKER)) or (isinstance(mapping, dict) and bool(mapping.get("unsloth_fixed")))


def flat_problems(key: str, value: Any) -> list[str]:
    """A check of ``lora_B_layout``."""
    return [] if value is MISSING or value is None else _word_problems(key, value)


def marker_problems(key: str, value: Any) -> list[str]:
    """A check of ``unsloth_fused_expert_lora``."""
    if value is MISSING or value is None:
        return []
    parameters = value.get("parameters") if isinstance(value, dict) else None
    if not isinstance(parameters, dict):
        return [f"{key} must hold parameters, a layout for each by name, found {reprlib.repr(value)}"]
    problems = _unknown(key, value, "lora_A_layout", "parameters")
    if value.get("lora_A_layout", "grouped_by_expert") != "grouped_by_expert":
        problems.append(f"{key}: lora_A_layout must be grouped_by_expert, found {reprlib.repr(value['lora_A_layout'])}")
    for name, entry in parameters.items():
        where = f"{key}.parameters[{reprlib.repr(name)}]"
        if not isinstance(entry, dict):
            problems.append(f"{where} must hold {_FLAT} and num_experts, found {reprlib.repr(entry)}")
            continue
        problems += _unknown(where, entry, _FLAT, "num_experts")
        problems += _word_problems(f"{where}.{_FLAT}", entry.get(_FLAT))
        if "num_experts" in entry and not is_rank(entry["num_experts"]):
            found = reprlib.repr(entry["num_experts"])
            problems.append(f"{where}.num_experts must be a whole number above zero, found {found}")
    return problems


def contradictions(config: Mapping[str, Any]) -> list[str]:
    """Where ``lora_B_layout`` and a parameter's own layout disagree."""
    flat, marker = config.get(_FLAT), config.get(_MARKER)
    parameters = marker.get("parameters") if isinstance(marker, dict) else None
    entries = parameters if flat and isinstance(parameters, dict) else {}
    return [
        f"adapter_config.json says {_FLAT}: {reprlib.repr(flat)}, but {reprlib.repr(entry.get(_FLAT))} for "
        f"{reprlib.repr(name)} in {_MARKER}; one of them is wrong"
        for name, entry in entries.items()
        if isinstance(entry, dict) and entry.get(_FLAT) != flat
    ]


def _unknown(where: str, value: Mapping[str, Any], *known: str) -> list[str]:
    return [f"{where}: the key {reprlib.repr(key)} is unknown to this version" for key in value if key not in known]


def _word_problems(where: str, word: Any) -> list[str]:
    if isinstance(word, str) and word in LAYOUTS:
        return []
    why = "; mixed says only that its layers differ" if word == "mixed" else ""
    return [f"{where} must be {' or '.join(LAYOUTS)}, found {reprlib.repr(word)}{why}"]
