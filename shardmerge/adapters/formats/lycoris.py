"""LoKr and LoHa by LyCORIS' names, each module with its own α: `adapters.methods.lokr` and `.loha` make the update.

s = α / r, r being the inner dimension of the products that make the factors. Where both factors of LoKr are whole,
there is no r, and s is 1 whatever α is. Unlike PEFT, LyCORIS treats a one-dimensional convolution as any other.
Source: LyCORIS, lycoris/modules/lokr.py and loha.py; ComfyUI, comfy/weight_adapter/lokr.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.peft_method import Context, Module, PeftMethod
from shardmerge.adapters.formats.scales import Scales
from shardmerge.adapters.methods.loha import Loha
from shardmerge.adapters.methods.lokr import Lokr, LokrSettings
from shardmerge.key_mapping.naming import PEFT_PREFIX, unwrapped
from shardmerge.spec.tensors import TensorRef

_OF: Mapping[str, PeftMethod] = {"hada": Loha(), "lokr": Lokr()}
#: How keys begin → what PEFT calls the method.
METHODS: Mapping[str, str] = {kind: method.peft_type for kind, method in _OF.items()}
#: The ends of keys.
ROLES = tuple(key for method in _OF.values() for key in method.roles)
#: Where a factor's inner dimension is, by preference; the same for Tucker's factors and for others.
_INNER = ("w1_b", "w2_b")


def factors(found: Mapping[str, TensorRef], kind: str) -> dict[str, TensorRef]:
    """The factors of one method among a module's tensors, by the roles of its family."""
    return {role.removesuffix("?"): found[key] for key, role in _OF[kind].roles.items() if key in found}


def claim(
    claims: Claims,
    update: ModuleUpdate,
    kind: str,
    found: Mapping[str, TensorRef],
    number: TensorRef | None,
    scales: Scales,
) -> None:
    """Append the module's update, or say what is wrong with its factors; ``number`` is its α."""
    if number is not None:
        claims.account_for([number])
    first = next(iter(found.values()))
    prefix = unwrapped(first.name).rpartition(f".{kind}_")[0]
    rank = next((found[role].shape[0] for role in _INNER if role in found and found[role].shape), 0)
    module = Module(update.module, prefix, "", dict(found), update.module)
    missing = [key for key, role in _OF[kind].roles.items() if not role.endswith("?") and role not in found]
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
    """The update that PEFT's reader makes of the factors, its scale not known yet; None where it refuses them."""
    updates, problems = len(claims.updates), len(claims.problems)
    _OF[kind].claim_module(claims, module, Context({"r": rank or 1, "alpha": rank or 1}))
    claims.problems[problems:] = [
        problem.replace("adapter_config.json says", "another factor says").replace(" (r and rank_pattern)", "")
        for problem in claims.problems[problems:]
    ]
    return claims.updates[-1].changed(rank=rank) if len(claims.updates) > updates else None
