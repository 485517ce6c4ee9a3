"""Adapters as image and video trainers write them: by module, each with its own scale, without a config.

LoRA, W' = W + α / r · up · down: down is (r, in) or, of a convolution, (r, in, k…); up is (out, r) or (out, r, 1…).
LoKr and LoHa by LyCORIS' names, of which `adapters.methods.lokr` and `.loha` make the update. Whole differences,
W' = W + D, see `adapters.methods.whole`; and whole tensors in W's place.

A module's α is a number in the file, or is found where `adapters.formats.scales` looks; where nothing says it, the
scale is 1. Of LyCORIS' r is the inner dimension of the products that make the factors. Where both factors of LoKr are
whole, there is no r, and s is 1 whatever α is. Unlike PEFT, LyCORIS treats a one-dimensional convolution as any other.

Keys are ``lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight``, with the module's dots written
as underscores, so only the base's own names show where they were (some files have dots behind the block); or with
dots: ``diffusion_model.blocks.0.attn.q.lora_down.weight``, ``unet.mid_block.attentions.0.proj_in.lora.down.weight``.
Source: kohya-ss/sd-scripts, networks/lora.py; LyCORIS, lycoris/modules; ComfyUI, comfy/lora.py and
comfy/weight_adapter/lokr.py; diffusers, loaders/lora_conversion_utils.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from shardmerge.adapters.claims import BaseView, Claims, ModuleUpdate, shown
from shardmerge.adapters.formats import parts
from shardmerge.adapters.formats.base import AdapterContent, AdapterFormat, Tensors
from shardmerge.adapters.formats.checks import Config
from shardmerge.adapters.formats.peft_method import Context, Module, PeftMethod
from shardmerge.adapters.formats.scales import Scales
from shardmerge.adapters.methods.loha import Loha
from shardmerge.adapters.methods.lokr import Lokr, LokrSettings
from shardmerge.adapters.methods.lora import Lora
from shardmerge.adapters.methods.whole import Difference, Replacement, WholeSettings
from shardmerge.key_mapping.naming import PEFT_PREFIX, WRAPPER, module_name, unwrapped
from shardmerge.spec.tensors import TensorRef

_INFIX = rf"(?:\.{WRAPPER})*?(?:\.(?!weight$)[^.]+)??(?:\.{WRAPPER})*?"
#: The keys of a pair; PEFT's, too, for files that have both.
_PAIRS = re.compile(
    r"(?P<module>.+?)(?:\.lora_(?P<kohya>down|up)\.weight|[._]lora(?:_linear_layer)?\.(?P<diffusers>down|up)\.weight"
    rf"|\.lora_(?P<peft>[AB]){_INFIX}\.weight)"
)
#: LyCORIS' methods by the beginning of their keys, which end as PEFT's do.
_METHODS: Mapping[str, PeftMethod] = {"hada": Loha(), "lokr": Lokr()}
_ROLES = (key for method in _METHODS.values() for key in method.roles)
_LYCORIS = re.compile(rf"(?P<module>.+)\.(?P<role>{'|'.join(_ROLES)})")
#: The end of a key → the parameter, and the family that adds the tensor to it or replaces it.
_WHOLES: Mapping[str, tuple[str, str]] = {
    "diff": ("weight", Difference.name),
    "diff_b": ("bias", Difference.name),
    "diff_m": ("modulation", Difference.name),  # LightX2V's
    "w_norm": ("weight", Difference.name),
    "b_norm": ("bias", Difference.name),
    "set_weight": ("weight", Replacement.name),
}
_WHOLE = re.compile(rf"(?P<module>.+)\.(?P<role>{'|'.join(_WHOLES)})")
_ALPHA = re.compile(r"(?P<module>.+)\.(?P<role>alpha)")
#: The ends of keys that are not merged from such files → what they are.
REFUSED: Mapping[str, str] = {
    "dora_scale": "DoRA's lengths, without the axis that they are of",
    "lora_mid.weight": "the core of a CP-decomposed convolution",
    "oft_blocks": "OFT or BOFT",
    "oft_diag": "OFT",
    "rescale": "OFT's rescaling",
    "on_input": "IA3",
    **dict.fromkeys(("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"), "GLoRA"),
    "lokr_t1": "a core of LoKr's first factor",
    "scalar": "a trained scalar of LyCORIS",
    **dict.fromkeys(("bias_indices", "bias_values", "bias_size"), "a sparse bias of LyCORIS"),
    "reshape_weight": "another shape for the weight",
    "lora_magnitude_vector": "DoRA's lengths by PEFT's name",
}
_UNKNOWN = (
    "neither tensors nor the metadata of the file say the alpha of all its modules, so their scale is unknown: give "
    "alpha (or scaling)"
)


class Kohya(AdapterFormat):
    name = "kohya"
    summary = (
        "image and video trainers' files: LoRA as `lora_down`, `lora_up` and `alpha` by module, LoKr and LoHa by "
        "LyCORIS' names, whole differences (`diff`, `diff_b`, `w_norm`); names with dots or underscores"
    )

    def detect(self, tensors: Tensors, config: Config | None) -> bool:
        """PEFT's LoRA keys alone are not such a file."""
        if config is not None:
            return False
        plain = [unwrapped(name) for name in tensors]
        pairs = [match["peft"] is None for name in plain if (match := _PAIRS.fullmatch(name))]
        if any(pairs) or any(_LYCORIS.fullmatch(name) or _WHOLE.fullmatch(name) for name in plain):
            return True
        # DoRA's lengths by PEFT's name are read beside PEFT's keys.
        refused = tuple(f".{end}" for end in REFUSED if not (pairs and end == "lora_magnitude_vector"))
        return any(name.endswith(refused) for name in plain)

    def shows_adapter(self, names: Collection[str]) -> bool:
        """It has factors, or nothing but differences."""
        plain = [unwrapped(name) for name in names]
        if all(_WHOLE.fullmatch(name) or _ALPHA.fullmatch(name) for name in plain):
            return bool(plain)
        return any(
            _LYCORIS.fullmatch(name) or ((of := _PAIRS.fullmatch(name)) and of["peft"] is None) for name in plain
        )

    def method(self, tensors: Collection[str], config: Config | None) -> str:
        kinds = {match["role"].partition("_")[0] for name in tensors if (match := _LYCORIS.fullmatch(unwrapped(name)))}
        return " and ".join(_METHODS[kind].peft_type for kind in sorted(kinds)) or "LORA"

    def read(self, content: AdapterContent, base: BaseView) -> Claims:
        scales, claims = content.scales, Claims()
        if problem := _refusal(content.tensors) or scales.unread():
            return Claims.refusal(problem)
        modules = _grouped(content.tensors)
        if problem := parts.mixed_modules_problem(map(module_name, modules), base.weight):
            return Claims.refusal(problem)
        for module, found in modules.items():
            _claim_module(claims, module, found, scales, base)
        scales.finish(claims, _UNKNOWN, "kohya's scripts, ComfyUI and diffusers")
        return claims


def _refusal(tensors: Iterable[str]) -> str:
    """The message about an adapter with keys of methods that are not merged from such files."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in tensors:
        for end in REFUSED:
            if unwrapped(name).endswith(f".{end}"):
                found[end].append(name)
    if not found:
        return ""
    kinds = "; ".join(f"{end} ({REFUSED[end]}; {names[0]})" for end, names in found.items())
    return f"it has keys of what this version does not merge from image trainers' files, so nothing of it is: {kinds}"


def _grouped(tensors: Mapping[str, TensorRef]) -> dict[str, dict[str, TensorRef]]:
    """Modules by their names in the file, with their tensors by role; a second tensor of one role is left over."""
    modules: dict[str, dict[str, TensorRef]] = {}
    for written, ref in tensors.items():
        name = unwrapped(written)
        if match := _PAIRS.fullmatch(name):
            role = match["kohya"] or match["diffusers"] or {"A": "down", "B": "up"}[match["peft"]]
        elif match := _LYCORIS.fullmatch(name) or _WHOLE.fullmatch(name) or _ALPHA.fullmatch(name):
            role = match["role"]
        else:
            continue
        modules.setdefault(match["module"], {}).setdefault(role, ref)
    return modules


def _claim_module(claims: Claims, module: str, found: Mapping[str, TensorRef], scales: Scales, base: BaseView) -> None:
    number = found.get("alpha")
    for role, (parameter, family) in _WHOLES.items():
        if role in found:
            _claim_whole(claims, module, parameter, family, found[role])
    methods = {kind: of for kind in _METHODS if (of := _lycoris_factors(found, kind))}
    for kind, factors in methods.items():
        _claim_lycoris(claims, update_of(module), kind, factors, number, scales)
    pair = {role: found[role] for role in ("down", "up") if role in found}
    if pair or (number is not None and not methods):
        _claim_pair(claims, module, {**pair, **({"alpha": number} if number is not None else {})}, scales, base)


def update_of(module: str, parameter: str = "weight", family: str = Lora.name) -> ModuleUpdate:
    """An update of a module by its name in the file, without the part that kohya's scripts put before it."""
    part = parts.flat_part_of(module)
    name = module_name(module.removeprefix(part))
    return ModuleUpdate(name, parameter, family, (), flattened=bool(part) or "." not in module)


def _claim_whole(claims: Claims, module: str, parameter: str, family: str, ref: TensorRef) -> None:
    update = update_of(module, parameter, family).changed(or_parameter=parameter == "weight")
    if family == Replacement.name:
        update = update.changed(factors=(("whole", ref),), settings=WholeSettings(as_in_memory=True))
    else:
        update = update.changed(factors=(("difference", ref),))
    claims.updates.append(update)


def _claim_pair(claims: Claims, module: str, factors: Mapping[str, TensorRef], scales: Scales, base: BaseView) -> None:
    if missing := {"down", "up"} - factors.keys():
        key = f"{module}.{_end(factors)[min(missing)]}.weight"
        claims.half(next(iter(factors.values())), key, factors.values())
        return
    down, up = factors["down"], factors["up"]
    if "alpha" in factors:
        claims.account_for([factors["alpha"]])
    claims.updates.append(update_of(module).changed(factors=(("A", down), ("B", up))))
    if 0 in down.shape or 0 in up.shape:
        return
    kernels = up.shape[2:]
    if len(down.shape) < 2 or len(up.shape) < 2 or up.shape[1] != down.shape[0] or any(size != 1 for size in kernels):
        claims.misfit(
            f"{shown(down, up)}: expected (r, in) and (out, r) of one rank, or of a convolution (r, in, k…) and "
            "(out, r, 1…)"
        )
        return
    rank = down.shape[0]
    of_peft = ".lora_A" in down.name
    of_part = parts.part_of(module) != "" and not parts.is_own(module, base.weight)
    scaling = scales.of(claims, rank, factors.get("alpha"), one_if_unsaid=not of_peft or of_part)
    claims.updates[-1] = claims.updates[-1].changed(rank=rank, scaling=scaling)


def _end(factors: Mapping[str, TensorRef]) -> Mapping[str, str]:
    """The end of the missing half's name."""
    if any(".lora_A" in ref.name or ".lora_B" in ref.name for ref in factors.values()):
        return {"down": "lora_A", "up": "lora_B"}
    return {"down": "lora_down", "up": "lora_up"}


# --- LyCORIS' methods -------------------------------------------------------------------------------------------------


def _lycoris_factors(found: Mapping[str, TensorRef], kind: str) -> dict[str, TensorRef]:
    """The factors of one method among a module's tensors, by role."""
    return {role.removesuffix("?"): found[key] for key, role in _METHODS[kind].roles.items() if key in found}


def _claim_lycoris(
    claims: Claims,
    update: ModuleUpdate,
    kind: str,
    found: Mapping[str, TensorRef],
    number: TensorRef | None,
    scales: Scales,
) -> None:
    """Append the module's update, or report problems of its factors; ``number`` is its α."""
    if number is not None:
        claims.account_for([number])
    first = next(iter(found.values()))
    prefix = unwrapped(first.name).rpartition(f".{kind}_")[0]
    rank = next((found[role].shape[0] for role in ("w1_b", "w2_b") if role in found and found[role].shape), 0)
    module = Module(update.module, prefix, "", dict(found), update.module)
    missing = [key for key, role in _METHODS[kind].roles.items() if not role.endswith("?") and role not in found]
    if missing:
        claims.half(first, module.key(missing[0]), module.refs)
        return
    made = _made(claims, module, kind, rank)
    if made is None:
        return
    of_peft = prefix.startswith(PEFT_PREFIX)
    if not {"w1", "w2"} <= found.keys():
        scaling = scales.of(claims, rank or 1, number, one_if_unsaid=not of_peft)
    else:
        scaling = 1.0 if scales.scaling is None else scales.scaling
        if of_peft and scales.scaling is None:
            claims.problems.append(
                f"{first.name} and {found['w2'].name} are PEFT's and whole, so that the r of their scale alpha / r is "
                "in adapter_config.json alone, which is not beside them: give scaling"
            )
    settings = made.settings
    if isinstance(settings, LokrSettings) and not of_peft:
        settings = LokrSettings(kronecker=True)
    claims.updates[-1] = made.changed(scaling=scaling, flattened=update.flattened, settings=settings)


def _made(claims: Claims, module: Module, kind: str, rank: int) -> ModuleUpdate | None:
    """The update by PEFT's reader, without its scale; None where that refuses the factors."""
    updates, problems = len(claims.updates), len(claims.problems)
    _METHODS[kind].claim_module(claims, module, Context({"r": rank or 1, "alpha": rank or 1}))
    claims.problems[problems:] = [
        problem.replace("adapter_config.json says", "another factor says").replace(" (r and rank_pattern)", "")
        for problem in claims.problems[problems:]
    ]
    return claims.updates[-1].changed(rank=rank) if len(claims.updates) > updates else None
