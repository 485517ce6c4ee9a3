"""Describe a path from its headers: a checkpoint, an adapter, a GGUF file or the output of a merge.

A description is not a proof: what a record or a header states is repeated as it is.
"""

from __future__ import annotations

import math
import reprlib
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

from shardmerge.adapters.claims import BaseView, ModuleUpdate
from shardmerge.adapters.registry import FAMILIES, METHODS, are_factors, shows_adapter
from shardmerge.config.schema import AdapterConfig
from shardmerge.destinations.record import RECORD_NAME, SEAL, find_record, is_unfinished
from shardmerge.errors import FormatError
from shardmerge.file_formats.adapter_file import CONFIG_NAME, AdapterFile
from shardmerge.file_formats.adapter_folder import PICKLES, WEIGHTS, is_shard
from shardmerge.file_formats.adapter_opening import open_adapter
from shardmerge.file_formats.checkpoint import Checkpoint, open_checkpoint
from shardmerge.gguf.glance import glance
from shardmerge.key_mapping.naming import module_name
from shardmerge.reporting.text import count, human_bytes, labelled, table
from shardmerge.reporting.verified import last_time
from shardmerge.sources.source import Source, open_source
from shardmerge.spec.tensors import TensorRef, Weight

_ADAPTER_NAMES = (*WEIGHTS, CONFIG_NAME)
_GGUF = ".gguf"
_NOT_REMEMBERED = "not by this user on this machine; `shardmerge verify` does it"
#: Keys of a description that its text has after the others, or not in a row of their own.
_SHOWN_LAST = ("adapter", "bytes", "dtypes", "quantised", "updates", "targets", "settings", "notes", "problems")


def inspect_path(location: str) -> dict[str, Any]:
    """Describe a checkpoint, an adapter or a GGUF file as JSON. Raises `SourceError` or `FormatError`."""
    source = open_source(location)
    if (file := _gguf_file(source)) is not None:
        return {**_describe_gguf(source, file), **_record_of(source)}
    _refuse_unfinished(source)
    if _is_adapter(source):
        adapter, model = open_adapter(source), _model_beside(source)
        if model is None:
            return _describe_adapter(adapter, location)
        adapter = adapter.apart_from({shard.file.uri for shard in model.shards})
        return {**_describe_checkpoint(model), "adapter": _describe_adapter(adapter, location)}
    checkpoint = open_checkpoint(source)
    if len(checkpoint.shards) == 1 and _has_factors(checkpoint):
        return _describe_adapter(open_adapter(source), location)
    return {**_describe_checkpoint(checkpoint), **_record_of(source)}


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
    return shows_adapter(names) or any(
        ".lora_A." in name or name.endswith((".A", ".lora_A", ".lora_a")) for name in names
    )


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
    if needs_scale:  # a scaling of 1 lets the rest be read
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
        "trained beside it": [f"{of.name} ({count(len(of.tensors), 'tensor')})" for of in adapter.beside],
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
    """Stands for the base, which states the order of a module's parameters; here the config's order is used."""

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
    """The settings in an adapter's config that its method reads, without those that have no effect."""
    method = METHODS.get(str(config.get("peft_type")))
    if method is None:
        return {}
    read = [*method.settings, "bias", "modules_to_save", "fan_in_fan_out"]
    return {key: config[key] for key in read if config.get(key) not in (None, False, "none", [], {})}


def _gguf_file(source: Source) -> str | None:
    """The GGUF file that a source is, or that holds all of its weights. `FormatError` where there are several."""
    top = [name for name in source.names() if "/" not in name]
    found = [name for name in top if name.endswith(_GGUF)]
    if not found or any(name.endswith(".safetensors") for name in top):
        return None
    if len(found) > 1:
        raise FormatError(f"{source.location}: holds several GGUF files, give one: {', '.join(found[:5])}")
    return found[0]


def _describe_gguf(source: Source, name: str) -> dict[str, Any]:
    size = source.stat(name).size
    where = source.location if source.location.endswith(name) else f"{source.location}/{name}"
    seen = glance(partial(source.read, name), size, where)
    architecture = seen.text("general.architecture")
    counts, sizes = seen.tensors, seen.nbytes
    return {
        "kind": "GGUF file",
        "location": where,
        "revision": source.revision,
        "name": seen.text("general.name"),
        "contents": seen.text("general.type"),
        "architecture": architecture,
        "version": seen.version,
        "tensors": sum(counts.values()),
        "layers": seen.values.get(f"{architecture}.block_count"),
        "context": seen.values.get(f"{architecture}.context_length"),
        "hidden_size": seen.values.get(f"{architecture}.embedding_length"),
        "quantization": max(sizes, key=lambda kind: sizes[kind], default=None),
        "bytes": size,
        "dtypes": {kind: {"tensors": counts[kind], "bytes": sizes[kind]} for kind in sorted(counts)},
    }


def _refuse_unfinished(source: Source) -> None:
    """`FormatError` where the directory holds an unfinished merge and no model."""
    folder = source.directory().local_path
    if folder is not None and not source.names() and is_unfinished(folder):
        raise FormatError(
            f"{source.location}: holds a merge that was not finished; finish it by running the same command again"
        )


def _record_of(source: Source) -> dict[str, Any]:
    folder = source.directory().local_path
    if folder is None or (record := find_record(folder)) is None:
        return {}
    adapters = record.values.get("adapters")
    found: dict[str, Any] = {
        "merged_by": f"shardmerge {record.values.get('shardmerge', 'of an unknown version')}",
        "base": _place(record.values.get("base")),
        "adapters": [_place(info) for info in adapters] if isinstance(adapters, list) else [],
        "updated_weights": len(targets) if isinstance(targets := record.values.get("targets"), Mapping) else None,
        "verified": last_time(folder, record.seal) or _NOT_REMEMBERED,
    }
    if not record.is_believed:
        found["problems"] = [f"{RECORD_NAME} was changed after the merge: it no longer has its {SEAL}"]
    return found


def _place(info: Any) -> str:
    known = info if isinstance(info, Mapping) else {}
    location, revision, weight = known.get("location"), known.get("revision"), known.get("weight", 1)
    times = f" (weight {weight})" if weight != 1 else ""
    return f"{location or 'unknown'}{f'@{revision}' if revision else ''}{times}"


def describe(found: Mapping[str, Any]) -> str:
    """The text of a description by `inspect_path`."""
    shown = {key: value for key, value in found.items() if key not in _SHOWN_LAST}
    rows = [(key.replace("_", " "), _value(value)) for key, value in shown.items() if value not in (None, [])]
    rows.append(("size", human_bytes(found["bytes"])))
    for dtype, sizes in found["dtypes"].items():
        rows.append((dtype, f"{count(sizes['tensors'], 'tensor')}, {human_bytes(sizes['bytes'])}"))
    for codec, of in found.get("quantised", {}).items():
        bits = f"{of['bits_per_element']:g} bits an element with scales"
        rows.append(("quantised", f"{count(of['weights'], 'weight')} in {codec}, {human_bytes(of['bytes'])}, {bits}"))
    for key in ("updates", "targets"):
        if found.get(key):
            rows.append((key, ", ".join(f"{kind} ×{number}" for kind, number in found[key].items())))
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
