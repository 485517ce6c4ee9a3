"""LoRA of all experts in one pair of tensors, as other trainers than PEFT write it: W'_e = W_e + s · B_e A_e.

- Tinker, SGLang and Megatron-Bridge: ``experts.w1.lora_A.weight`` (E, r, in) and ``experts.w1.lora_B.weight``
  (E, out, r); w1 is gate_proj, w3 up_proj, w2 down_proj. What is next to the hidden state is shared: A of w1 and w3,
  and B of w2, have a first dimension of 1, and e's is then the only one.
- NeMo AutoModel: ``experts.lora_gate_and_up_A`` (E, in, r), ``experts.lora_gate_and_up_B`` (E, r, 2 · out), gate first,
  ``experts.lora_down_A`` and ``experts.lora_down_B``. They are multiplied from the right, as x A_e B_e, so that ΔW_e is
  s · (A_e B_e)ᵀ.

s is α / r by PEFT's config. Every expert's part of a tensor is a range of its bytes, so each becomes an update of that
expert's own matrix, wherever the base stores it. For gpt-oss, which interleaves the rows of w1 and w3, the two become
one update.

Source: tinker-cookbook, tinker_cookbook/weights (shared-outer LoRA); SGLang, ``--experts-shared-outer-loras``; NeMo
AutoModel, nemo_automodel/components/_peft/lora_experts.py and components/moe/state_dict_mixin.py.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping

from shardmerge.adapters.claims import Claims, ModuleUpdate, shown
from shardmerge.adapters.methods.lora import Lora
from shardmerge.adapters.methods.lora_experts import LoraGated
from shardmerge.key_mapping.naming import module_name
from shardmerge.spec.tensors import DTYPE_BITS, TensorRef
from shardmerge.spec.updates import Parameter

#: Rank and scaling of a module, by its name in the adapter.
Scaled = Callable[[str], tuple[int, float]]
#: The base's weight of a module, whether it is a tensor by itself or a part of one; None where there is none.
Weight = Callable[[str], Parameter | None]

_PARTS: Mapping[str, str] = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
#: The ends of the two's roles in one update of both.
_ENDS: Mapping[str, str] = {"gate_proj": "", "up_proj": "_up"}
_STACKED = re.compile(r"(?P<experts>(?:.+\.)?experts)\.(?P<part>w[123]|gate_proj|up_proj|down_proj|gate_up_proj)")
_GROUPED = re.compile(r"(?P<module>.+)\.lora_(?P<part>gate_and_up|down)_(?P<role>[AB])")


def names_of(module: str) -> list[str]:
    """Names that ``target_modules`` may have for a module of experts: the experts, or its part by its usual name."""
    owner, found, _ = module.rpartition(".experts.")
    names = [f"{owner}.experts"] if found else []
    if match := _STACKED.fullmatch(module):
        names.append(f"{match['experts']}.{_PARTS.get(match['part'], match['part'])}")
    return names


# --- a pair of stacks for each of three matrices ----------------------------------------------------------------------


def is_stacked(module: str, factors: Mapping[str, TensorRef]) -> bool:
    """Whether a module's factors A and B are of all experts, (E, r, in) and (E, out, r)."""
    a, b = factors.get("A"), factors.get("B")
    are_stacks = a is not None and b is not None and len(a.shape) == len(b.shape) == 3
    return are_stacks and _STACKED.fullmatch(module) is not None


def claim_stacked(
    claims: Claims, module: str, factors: Mapping[str, TensorRef], rank: int, scaling: float, weight: Weight
) -> None:
    """An update of every expert's matrix."""
    match = _STACKED.fullmatch(module)
    assert match is not None
    a, b = factors["A"], factors["B"]
    for role, ref in factors.items():
        if role not in "AB":
            claims.reject([ref], f"{ref.name}: grouped experts know neither DoRA nor biases")
    experts = max(a.shape[0], b.shape[0])
    part = _PARTS.get(match["part"], match["part"])
    both = weight(_single(match["experts"], "gate_up_proj", 0)) if part in _ENDS else None
    if a.shape[1] != rank or b.shape[2] != rank or {a.shape[0], b.shape[0]} - {1, experts}:
        _misfit(claims, a, b, f"expected (E or 1, {rank}, in) and (E or 1, out, {rank}), of one number of experts E")
        return
    updates = [
        _update(match["experts"], part, expert, _member(a, expert), _member(b, expert), scaling)
        for expert in range(experts)
    ]
    if both is not None and both.interleaved:
        updates, part = _interleaved(claims, updates, match["experts"], part), "gate_up_proj"
    _claim(claims, updates, match["experts"], part, weight)


def _interleaved(claims: Claims, updates: list[ModuleUpdate], experts: str, part: str) -> list[ModuleUpdate]:
    """Updates of the matrix that interleaves gate and up, with the other's factors if they came first."""
    others = {of.module: of for of in claims.updates if of.family == LoraGated.name}
    made, taken = [], set()
    for expert, update in enumerate(updates):
        module = _single(experts, "gate_up_proj", expert)
        factors = tuple((f"{role}{_ENDS[part]}", ref) for role, ref in update.factors)
        other = others.get(module)
        if (
            other is not None and other.scaling == update.scaling
        ):  # else both stay, and are refused: one update a weight
            factors = tuple(sorted((*other.factors, *factors), key=lambda factor: factor[0]))
            taken.add(module)
        made.append(update.changed(module=module, family=LoraGated.name, factors=factors))
    claims.updates = [of for of in claims.updates if not (of.family == LoraGated.name and of.module in taken)]
    return made


# --- all in tensors of the experts' own, multiplied from the right ----------------------------------------------------


def claim_grouped(claims: Claims, tensors: Mapping[str, TensorRef], scaled: Scaled, weight: Weight) -> None:
    """NeMo AutoModel's ``lora_gate_and_up_A``, …: updates of every expert's gate, up and down."""
    pairs: dict[tuple[str, str], dict[str, TensorRef]] = {}
    likely = {name: ref for name, ref in tensors.items() if name.endswith(("_A", "_B"))}
    for name in claims.leftovers(likely) if likely else ():
        if match := _GROUPED.fullmatch(name):
            pairs.setdefault((match["module"], match["part"]), {})[match["role"]] = tensors[name]
    for (prefix, part), pair in pairs.items():
        if missing := {"A", "B"} - pair.keys():
            claims.half(next(iter(pair.values())), f"{prefix}.lora_{part}_{missing.pop()}")
        else:
            _claim_pair(claims, module_name(prefix), part, pair["A"], pair["B"], scaled, weight)


def _claim_pair(
    claims: Claims, module: str, part: str, a: TensorRef, b: TensorRef, scaled: Scaled, weight: Weight
) -> None:
    rank, scaling = scaled(module)
    if not (len(a.shape) == len(b.shape) == 3 and a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1] == rank):
        _misfit(
            claims, a, b, f"expected (E, in, {rank}) and (E, {rank}, out) of E experts, as NeMo AutoModel groups them"
        )
        return
    for which, (start, stop) in _matrices(module, part, b.shape[2], weight).items():
        updates = [
            _update(module, which, expert, a_e.transposed(), _rows(b_e.transposed(), start, stop), scaling)
            for expert in range(a.shape[0])
            for a_e, b_e in [(_member(a, expert), _member(b, expert))]
        ]
        _claim(claims, updates, module, which, weight)


def _matrices(module: str, part: str, rows: int, weight: Weight) -> Mapping[str, tuple[int, int]]:
    """The matrices that a tensor holds, and the rows of each."""
    if part == "down":
        return {"down_proj": (0, rows)}
    if weight(f"{module}.0.gate_proj") and not rows % 2:
        return {"gate_proj": (0, rows // 2), "up_proj": (rows // 2, rows)}
    # Experts without a gate; or both in one matrix, in an order of the model's own, which the trainer keeps.
    return {"up_proj" if weight(f"{module}.0.up_proj") else "gate_up_proj": (0, rows)}


# --- what both need ---------------------------------------------------------------------------------------------------


def _update(module: str, part: str, expert: int, a: TensorRef, b: TensorRef, scaling: float) -> ModuleUpdate:
    factors = (("A", a), ("B", b))
    return ModuleUpdate(_single(module, part, expert), "weight", Lora.name, factors, scaling, a.shape[0])


def _single(module: str, part: str, expert: int) -> str:
    """The name of one expert's matrix; that of gate and up together is of a Linear per expert."""
    return f"{module}.gate_up_projs.{expert}" if part == "gate_up_proj" else f"{module}.{expert}.{part}"


def _claim(claims: Claims, updates: list[ModuleUpdate], module: str, part: str, weight: Weight) -> None:
    """Append the updates, and check that they are of all experts of the base."""
    claims.updates += updates
    if weight(_single(module, part, len(updates))) is not None:
        claims.misfit(
            f"{updates[0].first} and {updates[0].factors[-1][1].name} are of {len(updates)} experts, but {module} of "
            "the base has more; a grouped tensor is of all of them"
        )


def _misfit(claims: Claims, a: TensorRef, b: TensorRef, expected: str) -> None:
    what = f"{shown(a, b)} are not grouped factors of experts"
    claims.reject([a, b], f"{what}: {expected}")


def _member(ref: TensorRef, index: int) -> TensorRef:
    """One matrix of a stack; of a stack of one, that one."""
    index = index if ref.shape[0] > 1 else 0
    strides = ref.strides or (ref.shape[1] * ref.shape[2], ref.shape[2], 1)
    return _window(ref, ref.shape[1:], strides[1:], index * strides[0], dense=ref.strides is None)


def _rows(ref: TensorRef, start: int, stop: int) -> TensorRef:
    strides = ref.strides or (ref.shape[1], 1)
    return _window(ref, (stop - start, ref.shape[1]), strides, start * strides[0], dense=ref.strides is None)


def _window(
    ref: TensorRef, shape: tuple[int, ...], strides: tuple[int, ...], skipped: int, *, dense: bool
) -> TensorRef:
    """A part of a tensor that begins after ``skipped`` elements."""
    itemsize = DTYPE_BITS[ref.dtype] // 8
    elements = (
        1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0
    )
    return dataclasses.replace(
        ref,
        shape=shape,
        strides=None if dense else strides,
        offset=ref.offset + skipped * itemsize,
        nbytes=elements * itemsize,
    )
