"""Recognise weights that the base stores quantised, by their names and by config.json, and explain the refusal.

A quantised module has no ``weight`` of floats. It has packed numbers and scales (``weight_packed`` and ``weight_scale``
of compressed-tensors, ``qweight`` of GPTQ and AWQ, ``weight.absmax`` of bitsandbytes, ``…_blocks`` of MXFP4), so a
message that ``weight`` is missing would name the wrong cause.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shardmerge.codecs.quantization import SECTIONS
from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.file_formats.model_config import sections
from shardmerge.spec.tensors import FLOAT_DTYPES, TensorRef

#: Last parts of names that go with packed numbers, or are them.
_COMPANION = re.compile(
    r"(weight_)?(packed|scale|scale_inv|scale_2|global_scale|zero_point|g_idx|shape)|qweight|qzeros|scales|W_q|SCB"
    r"|codes|codebooks|\w+_(blocks|scales)"
)
#: What stands beside a ``weight``, or below its name, that means nothing without it.
_BESIDE = ("weight_scale", "weight_scale_inv", "weight_scale_2", "SCB", "scales", "weight.absmax", "weight_scales")
#: Dtypes that hold codes, and no numbers of a model: but for I32, which may be indices, too.
_PACKED = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "U16", "U32")
#: Methods of one kind of number.
_NUMBERS = {"fp8": "FP8", "fbgemm_fp8": "FP8", "mxfp4": "MXFP4", "bitnet": "ternary numbers"}
#: Names of tensors that a message lists.
_SHOWN = 4
#: What can be done where a quantised weight cannot be what it would have to be.
DENSE_COPY = "merge into a dense copy of the base, as `shardmerge export --quantized dense` makes one"
_WAY_OUT = (
    "only F32, F16 and BF16 weights can be merged into, so merge into the model as it was before it was quantised, or "
    "dequantise it first"
)


def unread(checkpoint: Checkpoint) -> list[str]:
    """The tensors that hold packed numbers of a format that no codec has claimed, by name."""
    if not any(section.get(key) for section in sections(checkpoint.config) for key in SECTIONS):
        return []
    plain = (weight.tensor for weight in checkpoint.weights.values() if weight.stored_as is None)
    return [
        ref.name for ref in plain if ref.dtype in _PACKED or (ref.dtype == "I32" and _COMPANION.fullmatch(_last(ref)))
    ]


def scaled(names: Iterable[str]) -> frozenset[str]:
    """Modules and parameters beside which there are scales: those of which `is_quantised` may say something."""
    ends = tuple(f".{end}" for end in _BESIDE)
    return frozenset(
        name.removesuffix(end) for name in names if name.endswith(ends) for end in ends if name.endswith(end)
    )


def is_quantised(checkpoint: Checkpoint, module: str, parameter: str, stored: TensorRef) -> str | None:
    """That the tensor which a module's parameter is stored as holds no floats by itself; None where it does.

    Floats that have a scale beside them are not weights either.
    """
    owner = stored.name.removesuffix(".weight")
    beside = [name for name in _BESIDE if f"{owner}.{name}" in checkpoint.weights] if owner != stored.name else []
    is_scaled = stored.dtype in FLOAT_DTYPES and any(name.startswith("weight_scale") for name in beside)
    if not beside or (stored.dtype in FLOAT_DTYPES and not is_scaled):
        return None
    return _message(checkpoint, module, parameter, [f"weight of {stored.dtype}", *beside])


def has_packed(checkpoint: Checkpoint, module: str, parameter: str) -> str | None:
    """That a parameter is stored packed, and not under its own name; None where nothing of the module is packed."""
    packed = [ref for ref in _below(checkpoint, module, parameter) if _COMPANION.fullmatch(_last(ref))]
    if all(ref.dtype in FLOAT_DTYPES for ref in packed):
        return None
    return _message(checkpoint, module, parameter, sorted(set(map(_last, packed)))[:_SHOWN])


def _message(checkpoint: Checkpoint, module: str, parameter: str, names: Sequence[str]) -> str:
    what = f"its {parameter} is quantised, stored as {_method(checkpoint.config)} ({', '.join(names)})"
    return f"{module}: {what}; {_WAY_OUT}"


def _last(ref: TensorRef) -> str:
    return ref.name.rpartition(".")[2]


def _below(checkpoint: Checkpoint, module: str, parameter: str) -> Sequence[TensorRef]:
    """The stored tensors of a module, found by the longest end of its name that is in the base.

    Trainers and checkpoints disagree on prefixes, and the rules for names know of ``weight`` only. Of a module with
    several parameters, those that begin as this one are taken, where there are any.
    """
    parts = module.split(".")
    stored = {f".{name}": weight.tensor for name, weight in checkpoint.weights.items()}
    for start in range(len(parts)):
        tail = f".{'.'.join(parts[start:])}."
        if start and not re.search(r"\.\d+\.", tail):
            break  # without the number of a layer it may be any module
        # Of a fused parameter that is named as a module, MXFP4 stores ``…_blocks`` and ``…_scales``.
        ends = (tail, f"{tail[:-1]}_blocks", f"{tail[:-1]}_scales")
        found = [ref for name, ref in stored.items() if any(end in name for end in ends)]
        if found:
            return [ref for ref in found if f"{tail}{parameter}" in f".{ref.name}"] or found
    return ()


def _method(config: Mapping[str, Any]) -> str:
    """``INT4 by compressed-tensors``."""
    for section in (section.get(key) for section in sections(config) for key in SECTIONS):
        if isinstance(section, dict) and section:
            method = str(
                section.get("quant_method") or section.get("mode") or "a method that config.json does not name"
            )
            return f"{_numbers(section, method)} by {method}"
    return "packed numbers by a method that config.json does not name"


def _numbers(section: Mapping[str, Any], method: str) -> str:
    groups = section.get("config_groups")
    of_groups = list(groups.values()) if isinstance(groups, dict) else []
    weights = [group.get("weights") for group in of_groups if isinstance(group, dict)]
    found = {
        f"{str(one.get('type', 'int')).upper()}{one.get('num_bits', '')}" for one in weights if isinstance(one, dict)
    }
    if found:
        return " or ".join(sorted(found)).replace("FLOAT", "FP")
    if section.get("load_in_4bit"):
        return str(section.get("bnb_4bit_quant_type", "4 bits")).upper()
    if section.get("load_in_8bit"):
        return "INT8"
    bits = section.get("bits", section.get("w_bit"))
    return f"INT{bits}" if type(bits) is int else _NUMBERS.get(method, "packed numbers")
