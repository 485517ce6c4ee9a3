"""What becomes of a quantised base's weights: kept, made dense, or written back onto the base's own grid.

- ``mixed``: the weights that an update changes become dense, and with them those that programs fuse with them; all
  others keep their bytes. config.json lists the modules that are dense now.
- ``dense``: all weights become dense, and config.json says nothing of a quantisation.
- ``same``: updated weights get new codes, and keep their scales.

``auto`` is ``mixed`` where the method has a list of exceptions that programs follow, else ``dense``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardmerge.codecs import comfy
from shardmerge.codecs.quantization import MLX_METHOD
from shardmerge.config.schema import OutputConfig
from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.file_formats.model_config import setting
from shardmerge.planning.quantised import unread
from shardmerge.spec.tensors import DTYPE_BITS, DTYPE_NAMES, FLOAT_DTYPES, Encoding, Weight, dtype_code

#: Modules that vLLM computes as one, by the last parts of their names: either all of them are quantised, or none.
_FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("wq_a", "wkv"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_a", "in_proj_b"),
)
_SIBLINGS = {name: group for group in _FUSED for name in group}
#: The experts of a layer, which all programs load as one.
_EXPERTS = re.compile(r"(.*\.experts)[.\d].*")
#: Scales of a cache of keys and values, which mean nothing in a model that is not quantised.
_OF_CACHE = re.compile(r".*\.([kv]_proj\.output|k|v|q|kv|prob)_scale")


@dataclass(frozen=True, slots=True)
class Exceptions:
    """How a method's settings list the modules that are not quantised."""

    #: The lists to which names are added: the first always, the others where they are there.
    keys: tuple[str, ...]
    #: Whether a layer's experts are named by what holds them, or one by one.
    names_experts_together: bool = True
    #: Whether transformers (5.23) leaves experts out that are not quantised, where those of another layer are.
    loses_experts: bool = False
    #: What programs leave out by themselves only where there is no list: a new list names it, with all other modules
    #: that have a matrix and are not quantised.
    left_out_without_list: tuple[str, ...] = ()
    #: Whether there are no lists, but a key for each module, which is false for one that is not quantised.
    has_key_per_module: bool = False
    #: Whether programs compute some modules as one.
    fuses: bool = True


#: By ``quant_method``.
EXCEPTIONS: Mapping[str, Exceptions] = {
    "fp8": Exceptions(("modules_to_not_convert", "ignored_layers"), left_out_without_list=("lm_head",)),
    "mxfp8": Exceptions(("modules_to_not_convert", "ignored_layers"), left_out_without_list=("lm_head",)),
    "fbgemm_fp8": Exceptions(("modules_to_not_convert",), left_out_without_list=("lm_head",)),
    "compressed-tensors": Exceptions(("ignore",), names_experts_together=False, loses_experts=True),
    "modelopt": Exceptions(("ignore", "exclude_modules")),
    "bitsandbytes": Exceptions(("llm_int8_skip_modules",), left_out_without_list=("lm_head",)),
    MLX_METHOD: Exceptions((), names_experts_together=False, has_key_per_module=True, fuses=False),
    "": Exceptions(()),  # ComfyUI's: tensors alone say what is quantised
}


@dataclass(frozen=True, slots=True)
class QuantisedOutput:
    """How the output stores the weights that the base stores quantised."""

    #: What weights become that do not keep their bytes, by name.
    encodings: Mapping[str, Encoding] = field(default_factory=dict)
    #: Stored tensors that are neither weights nor parts of one, and go.
    left_out: frozenset[str] = frozenset()
    #: Changes of config.json and of files beside it, see `aux_files.collect`.
    config: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def quantised_output(checkpoint: Checkpoint, updated: Collection[str], output: OutputConfig) -> QuantisedOutput:
    """Decide for every weight of a base that is stored quantised. ``updated`` are the names of weights with updates."""
    stored = {name: weight for name, weight in checkpoint.weights.items() if weight.stored_as is not None}
    settings = checkpoint.quantization
    exceptions = EXCEPTIONS.get(str(settings.get("quant_method", "")))
    problems = [*_unread(checkpoint, output), *_unfit(output, bool(stored), settings, exceptions)]
    if not stored:
        return QuantisedOutput(problems=tuple(problems))
    touched = [name for name in updated if name in stored]
    mode, why = _mode(output, touched, exceptions)
    dtype = _dense_dtype(checkpoint, output)
    closed = closure(touched, stored, fuses=exceptions is None or exceptions.fuses)
    notes = _notes(mode, why, dtype, stored, closed)
    if mode == "same":
        kept = {name: weight.stored_as for name in touched if (weight := stored[name]).stored_as is not None}
        return QuantisedOutput(kept, problems=tuple(problems), notes=notes)
    becoming = list(stored) if mode == "dense" else closed
    encodings = {name: Encoding(dtype, (), _row_dims(stored[name])) for name in becoming}
    left_out: frozenset[str] = frozenset()
    config: dict[str, Any] = {}
    if len(becoming) == len(stored):
        if not problems and (unreadable := unread(checkpoint)):
            problems.append(_no_settings(unreadable, checkpoint))
        left_out = frozenset(name for name, weight in checkpoint.weights.items() if _is_of_quantisation(name, weight))
        if left_out:
            first = min(left_out)
            notes += (f"tensors left out, as only a quantised model uses them: {len(left_out)}, such as {first}",)
        config["quantization"] = None
    elif becoming and exceptions is not None and (exceptions.keys or exceptions.has_key_per_module):
        config["dense_modules"] = modules = modules_of(becoming, exceptions)
        if exceptions.left_out_without_list and not isinstance(settings.get(exceptions.keys[0]), list):
            modules = [*_plain_modules(checkpoint, exceptions), *modules]
        config["quantization"] = with_exceptions(settings, exceptions, modules)
    return QuantisedOutput(encodings, left_out, config, tuple(problems), notes)


def _is_of_quantisation(name: str, weight: Weight) -> bool:
    """Whether a tensor, one number or a marker, means nothing where no weight is quantised."""
    is_number = weight.tensor.dtype in FLOAT_DTYPES and math.prod(weight.tensor.shape) == 1
    return bool(comfy.MARKER.fullmatch(name)) or (is_number and bool(_OF_CACHE.fullmatch(name)))


def _no_settings(unreadable: Sequence[str], checkpoint: Checkpoint) -> str:
    """Why not all weights can become dense: config.json must go on saying how the others are stored."""
    return (
        f"all weights of {checkpoint.source.location} that can be read would become dense, and config.json would no "
        f"longer say how {unreadable[0]} is stored, which is quantised in a format that cannot be read"
    )


def _plain_modules(checkpoint: Checkpoint, exceptions: Exceptions) -> Iterator[str]:
    """The modules that have a matrix and are not quantised, and those that may be tied to one of them."""
    yield from exceptions.left_out_without_list
    for name, weight in checkpoint.weights.items():
        module = name.removesuffix(".weight")
        is_plain_matrix = weight.stored_as is None and module != name and len(weight.tensor.shape) == 2
        if is_plain_matrix and module not in exceptions.left_out_without_list:
            yield module


def _unfit(
    output: OutputConfig, is_quantised: bool, settings: Mapping[str, Any], exceptions: Exceptions | None
) -> Iterator[str]:
    """Why ``output.quantized`` cannot be what it is."""
    if not is_quantised and output.quantized in ("mixed", "same"):
        yield f"output.quantized: {output.quantized} is for bases with quantised weights, and this base has none"
    if is_quantised and output.quantized == "mixed" and exceptions is None:
        yield (
            f"output.quantized: mixed cannot be used with quant_method {settings.get('quant_method')}: its settings "
            "have no list of modules that are not quantised; use dense or same"
        )
    if output.format != "safetensors" and output.quantized in ("mixed", "same"):
        yield f"output.quantized: {output.quantized} has no effect with output.format: {output.format}; remove it"


def _unread(checkpoint: Checkpoint, output: OutputConfig) -> tuple[str, ...]:
    """Why settings that reach all weights cannot be used with weights that are stored in a format unknown to us."""
    found = unread(checkpoint)
    asked = [
        f"output.{key}: {value}"
        for key, value, harmless in (
            ("dtype", output.dtype, ("same",)),
            ("quantized", output.quantized, ("auto", "mixed", "same")),
            ("format", output.format, ("safetensors",)),
        )
        if value not in harmless
    ]
    if not found or not asked:
        return ()
    what = f"{' and '.join(asked)} cannot be used with {checkpoint.source.location}"
    stored = f"{found[0]} and {len(found) - 1:,} other tensors" if len(found) > 1 else found[0]
    return (
        f"{what}: it stores {stored} quantised in a format that cannot be read, and what belongs to them must stay as "
        "it is",
    )


def _mode(output: OutputConfig, touched: Sequence[str], exceptions: Exceptions | None) -> tuple[str, str]:
    """The mode, and why ``auto`` has chosen it."""
    if output.format != "safetensors":
        return "dense", "a GGUF file is made of full weights"
    if output.quantized != "auto":
        return output.quantized, "as output.quantized asks for"
    if not touched:
        return "mixed", "no quantised weight is updated"
    if exceptions is not None and exceptions.loses_experts and any(map(_EXPERTS.fullmatch, touched)):
        return "dense", "of this format transformers loads experts only if all are quantised or none (vLLM loads mixed)"
    if exceptions is not None:
        return "mixed", "programs that load this format follow its list of modules that are not quantised"
    return "dense", "this format has no list of modules that are not quantised"


def _row_dims(weight: Weight) -> int:
    return weight.stored_as.row_dims if weight.stored_as else 1


def _dense_dtype(checkpoint: Checkpoint, output: OutputConfig) -> str:
    """What weights become: ``output.dtype``, else the model's own, else BF16."""
    if output.dtype != "same":
        return dtype_code(output.dtype)
    for key in ("dtype", "torch_dtype"):
        if (found := setting(checkpoint.config, key)) in ("float16", "bfloat16", "float32"):
            return dtype_code(found)
    return "BF16"


def closure(touched: Iterable[str], stored: Mapping[str, Weight], fuses: bool = True) -> list[str]:
    """The weights that become dense together with those that are updated, in the base's order."""
    chosen: set[str] = set(touched)
    experts: set[str] = set()
    for name in touched if fuses else ():
        if match := _EXPERTS.fullmatch(name):
            experts.add(match[1])
            continue
        module = name.removesuffix(".weight")
        parent, _, last = module.rpartition(".")
        chosen |= {f"{parent}.{sibling}.weight" for sibling in _SIBLINGS.get(last, ())}
    return [name for name in stored if name in chosen or ((of := _EXPERTS.fullmatch(name)) and of[1] in experts)]


def modules_of(weights: Iterable[str], exceptions: Exceptions) -> list[str]:
    """The names by which the settings call the modules of weights, without repetition."""
    found: dict[str, None] = {}
    for name in weights:
        of = _EXPERTS.fullmatch(name)
        found[of[1] if of and exceptions.names_experts_together else name.removesuffix(".weight")] = None
    return list(found)


def with_exceptions(settings: Mapping[str, Any], exceptions: Exceptions, modules: Sequence[str]) -> dict[str, Any]:
    """The settings with ``modules`` among those that are not quantised."""
    changed = dict(settings)
    if exceptions.has_key_per_module:
        return changed | dict.fromkeys(modules, False)
    first, *others = exceptions.keys
    for key in (first, *(key for key in others if isinstance(settings.get(key), list))):
        listed = settings.get(key)
        listed = list(listed) if isinstance(listed, list) else []
        changed[key] = [*listed, *(module for module in modules if module not in listed)]
    return changed


def _notes(mode: str, why: str, dtype: str, stored: Mapping[str, Weight], closed: Sequence[str]) -> tuple[str, ...]:
    """What a plan says of a quantised base: the mode, the reason, and the bytes of each mode."""
    now = {name: sum(ref.nbytes for _, ref in weight.parts) for name, weight in stored.items()}
    bits = DTYPE_BITS[dtype]
    full = {name: math.prod(weight.tensor.shape) * bits // 8 for name, weight in stored.items()}
    same, dense = sum(now.values()), sum(full.values())
    mixed = same + sum(full[name] - now[name] for name in closed)
    kinds = sorted({weight.stored_as.codec for weight in stored.values() if weight.stored_as})
    return (
        f"the base stores {len(stored):,} weights quantised ({', '.join(kinds)}). output.quantized is {mode}: {why}. "
        f"These weights take {_size(same)} as same, {_size(mixed)} as mixed ({len(closed):,} become "
        f"{DTYPE_NAMES[dtype]}), {_size(dense)} as dense",
    )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
