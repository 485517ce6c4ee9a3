"""Parts of a parameter that some trainers train as modules of their own.

- The projections of a gated delta net. Qwen3.5 stores q, k and v one below the other in ``in_proj_qkv``. Qwen3-Next
  stores them with z in ``in_proj_qkvz``, and b and a in ``in_proj_ba``, by heads of the keys. Tinker trains each by
  itself (``in_proj_q``, ``in_proj_k``, ``in_proj_v``).
- A Linear per expert (``gate_up_projs.<i>``, ``down_projs.<i>``) of a parameter (E, in, out), as in unsloth's 4-bit
  gpt-oss: Δ of expert i is that of the transpose, with rows in their stored order.
- A matrix per expert (``<i>.gate_proj``, ``<i>.up_proj``, ``<i>.down_proj``; also ``w1``, ``w3``, ``w2``) where the
  model has a parameter (E, 2 · out, in), the gate above, without a conversion of transformers.

Source: transformers 5.23, models/qwen3_next/modeling_qwen3_next.py (fix_query_key_value_ordering),
models/qwen3_5/modeling_qwen3_5.py and integrations/moe.py; unsloth-zoo, temporary_patches/gpt_oss.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from shardmerge.key_mapping import pieces
from shardmerge.key_mapping.pieces import RefusalError, View
from shardmerge.spec.tensors import Orientation

_PROJECTION = re.compile(r"(?P<at>.+)\.in_proj_(?P<parts>qkv|qk|[qkvzba])")
_LINEAR = re.compile(r"(?P<at>.+)\.(?P<parameter>\w+)s\.(?P<expert>\d{1,6})")
_SINGLE = re.compile(r"(?P<at>.+)\.(?P<expert>\d{1,6})\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)")
_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass(frozen=True, slots=True)
class Experts:
    """A module of experts in the table."""

    #: Its parameters, in order of registration.
    parameters: tuple[str, ...]
    #: Of the matrices (out, in) against the parameters, (E, in, out) if it is transposed.
    in_memory: Orientation = Orientation.SAME
    #: How gate and up are joined: ``concatenated``, ``interleaved``; ``none``, there is no gate; "" is not known, and
    #: then ``in_memory`` says nothing either.
    gates: str = ""


@dataclass(frozen=True, slots=True)
class Known:
    """Lookups in a checkpoint."""

    #: The tensor of that name in memory, if the checkpoint has it.
    view: Callable[[str], View | None]
    experts: Callable[[str], Experts | None]
    #: The config of the model that contains a module.
    config: Callable[[str], Mapping[str, Any]]


def part(module: str, parameter: str, known: Known) -> View | None:
    """The part with that name, in matrix orientation; None where there is none. Raises `RefusalError`."""
    if match := _PROJECTION.fullmatch(module):
        return _projection(match["at"], match["parts"], parameter, known)
    if found := _linear(module, parameter, known):
        return _expert(*found, known)
    if parameter == "weight" and (match := _SINGLE.fullmatch(module)) and (experts := known.experts(match["at"])):
        return _single(match["at"], int(match["expert"]), _PARTS.get(match["part"], match["part"]), experts, known)
    return None


def is_interleaved(module: str, known: Known) -> bool:
    """Whether the rows of gate and up alternate in a Linear per expert."""
    found = _linear(module, "weight", known)
    return found is not None and found[0].endswith(".gate_up_proj") and found[2].gates == "interleaved"


def _linear(module: str, parameter: str, known: Known) -> tuple[str, int, Experts] | None:
    """The parameter of all experts behind a Linear per expert, the expert's number, and the experts."""
    match = _LINEAR.fullmatch(module)
    experts = known.experts(match["at"]) if match else None
    if match is None or experts is None:
        return None
    name = match["parameter"] if parameter == "weight" else f"{match['parameter']}_{parameter}"
    return (f"{match['at']}.{name}", int(match["expert"]), experts) if name in experts.parameters else None


def _projection(at: str, parts: str, parameter: str, known: Known) -> View | None:
    for kept in ("qkv", "qkvz", "ba"):
        view = known.view(f"{at}.in_proj_{kept}.{parameter}")
        if view is None or not set(parts) < set(kept):
            continue
        config = known.config(at)
        keys, values = _number(config, "linear_num_key_heads"), _number(config, "linear_num_value_heads")
        if values % keys:
            raise RefusalError(f"{values} heads of values are not a multiple of {keys} of keys")
        sizes = {"b": 1, "a": 1}
        if kept != "ba":
            wide = _number(config, "linear_value_head_dim")
            sizes = dict.fromkeys("qk", _number(config, "linear_key_head_dim")) | {"v": wide, "z": wide}
        per_key = {name: size if name in "qk" else size * (values // keys) for name, size in sizes.items()}
        # Qwen3.5 stores them one below the other, Qwen3-Next head by head.
        rounds, factor = (1, keys) if kept == "qkv" else (keys, 1)
        cut = pieces.split(view, [per_key[name] * factor for name in kept] * rounds, view.row_axis)
        return pieces.concatenate([of for name in parts for of in cut[kept.index(name) :: len(kept)]], view.row_axis)
    return None


def _expert(name: str, number: int, experts: Experts, known: Known) -> View | None:
    """One expert's matrix (out, in), or its bias."""
    view = known.view(name)
    if view is None:
        return None
    if not experts.gates:
        raise RefusalError(
            "the base keeps all experts in one tensor, and in which orientation is not known of this class"
        )
    one = pieces.unstack(view, number)
    return pieces.transpose(one, 0, 1) if experts.in_memory is Orientation.TRANSPOSED and len(one.shape) == 2 else one


def _single(at: str, number: int, which: str, experts: Experts, known: Known) -> View | None:
    if which in experts.parameters:
        return _expert(f"{at}.{which}", number, experts, known)
    if which == "down_proj" or "gate_up_proj" not in experts.parameters:
        return None
    both = _expert(f"{at}.gate_up_proj", number, experts, known)
    if both is None:
        return None
    if experts.gates != "concatenated":
        raise RefusalError("the base keeps the rows of gate and up in turn, in one matrix")
    return pieces.chunk(both, 2, 0)[which == "up_proj"]


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if type(value) is not int or not 0 < value < 1 << 20:
        raise RefusalError(f"the base keeps it in one matrix with others, and config.json does not say {key}")
    return value
