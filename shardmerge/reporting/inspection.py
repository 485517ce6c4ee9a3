"""The description of a path, from its headers: a checkpoint, an adapter, a GGUF file or the output of a merge."""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from shardmerge.adapters.claims import BaseView, ModuleUpdate
from shardmerge.adapters.registry import FAMILIES, METHODS, are_factors, is_telling
from shardmerge.config.schema import AdapterConfig
from shardmerge.errors import FormatError
from shardmerge.file_formats.adapter_file import CONFIG_NAME, AdapterFile
from shardmerge.file_formats.adapter_folder import PICKLES, WEIGHTS, is_shard
from shardmerge.file_formats.adapter_opening import open_adapter
from shardmerge.file_formats.checkpoint import Checkpoint, open_checkpoint
from shardmerge.key_mapping.naming import module_name
from shardmerge.reporting import outputs
from shardmerge.reporting.text import human_bytes, labelled, table
from shardmerge.sources.source import Source, open_source
from shardmerge.spec.tensors import TensorRef, Weight

_ADAPTER_NAMES = (*WEIGHTS, CONFIG_NAME)


_SHOWN_LAST = ("adapter", "bytes", "dtypes", "quantised", "updates", "targets", "settings", "notes", "problems")


def inspect_path(location: str) -> dict[str, Any]:
    """Describe a checkpoint, an adapter or a GGUF file as JSON. Raises `SourceError` or `FormatError`."""
    source = open_source(location)
    if (file := outputs.gguf_file(source)) is not None:
        return {**outputs.describe_gguf(source, file), **outputs.made_of(source)}
    outputs.refuse_unfinished(source)
    if _is_adapter(source):
        adapter, model = open_adapter(source), _model_beside(source)
        if model is None:
            return _describe_adapter(adapter, location)
        adapter = adapter.apart_from({shard.file.uri for shard in model.shards})
        return {**_describe_checkpoint(model), "adapter": _describe_adapter(adapter, location)}
    checkpoint = open_checkpoint(source)
    if len(checkpoint.shards) == 1 and _has_factors(checkpoint):
        return _describe_adapter(open_adapter(source), location)
    return {**_describe_checkpoint(checkpoint), **outputs.made_of(source)}


def _model_beside(source: Source) -> Checkpoint | None:
    """The model in whose directory an adapter is stored; None where there is none."""
    if source.directory() is not source:
        return None
    try:
        checkpoint = open_checkpoint(source)
    except FormatError:
        return None
    says = checkpoint.model_type or checkpoint.config.get("architectures")
    return checkpoint if says and not are_factors(checkpoint.weights) else None


def _is_adapter(source: Source) -> bool:
    names = [name for name in source.names() if "/" not in name]
    if any(name in _ADAPTER_NAMES or is_shard(name) for name in names):
        return True
    return not any(name.endswith(".safetensors") for name in names) and any(name.endswith(PICKLES) for name in names)


def _has_factors(checkpoint: Checkpoint) -> bool:
    names = checkpoint.weights
    return is_telling(names) or any(".lora_A." in name or name.endswith((".A", ".lora_A", ".lora_a")) for name in names)


def _dtypes(tensors: Mapping[str, TensorRef]) -> dict[str, dict[str, int]]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for ref in tensors.values():
        counts[ref.dtype] += 1
        sizes[ref.dtype] += ref.nbytes
    return {dtype: {"tensors": counts[dtype], "bytes": sizes[dtype]} for dtype in sorted(counts)}


def _describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    tensors = {ref.name: ref for shard in checkpoint.shards for ref in shard.tensors}
    return {
        "kind": "checkpoint",
        "location": checkpoint.source.location,
        "revision": checkpoint.source.revision,
        "model_type": checkpoint.model_type,
        "architectures": checkpoint.config.get("architectures"),
        "bytes": checkpoint.info().nbytes,
        "shards": len(checkpoint.shards),
        "index": checkpoint.index_name,
        "tensors": len(tensors),
        "dtypes": _dtypes(tensors),
        **({"quantised": quantised} if (quantised := _quantised(checkpoint)) else {}),
        "tie_word_embeddings": checkpoint.ties_embeddings,
        "notes": list(checkpoint.notes),
    }


def _quantised(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """The weights that are stored quantised, by the format: their number, their bytes, and bits an element."""
    found: dict[str, list[Weight]] = {}
    for weight in checkpoint.weights.values():
        if weight.stored_as is not None:
            found.setdefault(weight.stored_as.codec, []).append(weight)
    described = {}
    for codec, weights in found.items():
        size = sum(ref.nbytes for weight in weights for _, ref in weight.parts)
        elements = sum(math.prod(weight.tensor.shape) for weight in weights)
        bits = round(8 * size / max(1, elements), 3)
        described[codec] = {"weights": len(weights), "bytes": size, "bits_per_element": bits}
    return described


def _describe_adapter(adapter: AdapterFile, location: str) -> dict[str, Any]:
    config = adapter.config or {}
    claims = adapter.claims(AdapterConfig(path=location), _Described(adapter))
    needs_scale = claims.unscaled
    if needs_scale:  # 1 as scaling lets the rest be read
        claims = adapter.claims(AdapterConfig(path=location, scaling=1.0), _Described(adapter))
    updates = [update for update in claims.updates if FAMILIES[update.family].changes_weight]
    kinds = Counter(_kind(update) for update in updates)
    adding = [update for update in updates if FAMILIES[update.family].adds]
    leftovers = [] if claims.refused else claims.leftovers(adapter.tensors)
    return {
        "kind": "adapter",
        "location": adapter.source.location,
        "revision": adapter.source.revision,
        "format": adapter.format(),
        "family": adapter.family,
        "updates": dict(Counter(update.family for update in updates)),
        "bytes": sum(file.size for file in adapter.files),
        "tensors": len(adapter.tensors),
        "files": len(adapter.files),
        "trained beside it": [f"{of.name} ({len(of.tensors)} tensors)" for of in adapter.beside],
        "dtypes": _dtypes(adapter.tensors),
        "ranks": sorted({update.rank for update in updates if update.rank}),
        "settings": _settings(config),
        "scalings": None if needs_scale else sorted({update.scaling for update in adding}),
        "targets": dict(sorted(kinds.items())),
        "trained_on": adapter.trained_on,
        "peft_version": config.get("peft_version"),
        "problems": [*claims.problems, *(f"{name} belongs to no update" for name in leftovers)],
    }


class _Described(BaseView):
    """Without a base the order of a module's parameters is not known; for a description, the config's will do."""

    def __init__(self, adapter: AdapterFile) -> None:
        wrapped = {name.partition(".base_layer.")[0] for name in adapter.tensors if ".base_layer.lora_" in name}
        targets = (adapter.config or {}).get("target_parameters")
        self._names = tuple(str(of).rpartition(".")[2] for of in targets) if isinstance(targets, list) else ()
        self._modules = {module_name(name) for name in wrapped}

    def registered(self, module: str) -> tuple[str, ...]:
        return self._names if module in self._modules else ()


def _kind(update: ModuleUpdate) -> str:
    """The last part of a module's name, and the parameter where it is not the weight."""
    last = update.module.rpartition(".")[2]
    return last if update.parameter == "weight" else f"{last}.{update.parameter}"


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What its method reads of an adapter's config, where it says something."""
    method = METHODS.get(str(config.get("peft_type")))
    if method is None:
        return {}
    read = [*method.settings, "bias", "modules_to_save", "fan_in_fan_out"]
    return {key: config[key] for key in read if config.get(key) not in (None, False, "none", [], {})}


def describe(found: Mapping[str, Any]) -> str:
    """What `inspect_path` found, as a person reads it."""
    shown = {key: value for key, value in found.items() if key not in _SHOWN_LAST}
    rows = [(key.replace("_", " "), _value(value)) for key, value in shown.items() if value not in (None, [])]
    rows.append(("size", human_bytes(found["bytes"])))
    for dtype, sizes in found["dtypes"].items():
        rows.append((dtype, f"{sizes['tensors']} tensors, {human_bytes(sizes['bytes'])}"))
    for codec, of in found.get("quantised", {}).items():
        bits = f"{of['bits_per_element']:g} bits an element with scales"
        rows.append(("quantised", f"{of['weights']} weights in {codec}, {human_bytes(of['bytes'])}, {bits}"))
    for key in ("updates", "targets"):
        if found.get(key):
            rows.append((key, ", ".join(f"{kind} ×{count}" for kind, count in found[key].items())))
    for key, value in found.get("settings", {}).items():
        rows.append((f"  {key}", _value(value)))
    text = table(rows)
    if found["kind"] == "adapter" and found["scalings"] is None:
        text += "\nit carries no config: a merge must be given its alpha or scaling"
    text = "\n".join([text, *map(labelled, found.get("notes", []))])
    text = "\n".join([text, *(f"problem: {problem}" for problem in found.get("problems", []))])
    return f"{text}\n\nan adapter is beside it:\n{describe(found['adapter'])}" if "adapter" in found else text


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return reprlib.repr(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)
