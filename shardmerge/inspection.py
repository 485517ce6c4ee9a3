"""What a path is: a base checkpoint or an adapter, told from its headers."""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import yaml

from shardmerge.adapter_file import CONFIG_NAME, AdapterFile, open_adapter
from shardmerge.adapter_folder import PICKLES, WEIGHTS, is_shard
from shardmerge.adapters import FAMILIES, METHODS, ModuleUpdate, Registered, looks_like_image_trainers
from shardmerge.checkpoint import Checkpoint, open_checkpoint
from shardmerge.config import AdapterConfig
from shardmerge.errors import FormatError
from shardmerge.naming import module_name
from shardmerge.report import human_bytes, labelled, table
from shardmerge.sources import Source, open_source
from shardmerge.spec import TensorRef

_ADAPTER_NAMES = (*WEIGHTS, CONFIG_NAME)


_SHOWN_LAST = ("bytes", "dtypes", "updates", "targets", "settings", "notes", "problems")


def inspect_path(location: str) -> dict[str, Any]:
    """Describe a checkpoint or an adapter as JSON. Raises `SourceError` or `FormatError`."""
    source = open_source(location)
    if _is_adapter(source):
        return _describe_adapter(open_adapter(source), location)
    checkpoint = open_checkpoint(source)
    if len(checkpoint.shards) == 1 and _has_factors(checkpoint):
        return _describe_adapter(open_adapter(source), location)
    return _describe_checkpoint(checkpoint)


def _is_adapter(source: Source) -> bool:
    names = [name for name in source.names() if "/" not in name]
    if any(name in _ADAPTER_NAMES or is_shard(name) for name in names):
        return True
    return not any(name.endswith(".safetensors") for name in names) and any(name.endswith(PICKLES) for name in names)


def _has_factors(checkpoint: Checkpoint) -> bool:
    names = checkpoint.weights
    return looks_like_image_trainers(names) or any(
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
    tensors = {name: weight.tensor for name, weight in checkpoint.weights.items()}
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
        "tie_word_embeddings": checkpoint.ties_embeddings,
        "notes": list(checkpoint.notes),
    }


def _describe_adapter(adapter: AdapterFile, location: str) -> dict[str, Any]:
    config = adapter.config or {}
    claims = adapter.claims(AdapterConfig(path=location), _registered(adapter))
    needs_scale = claims.unscaled
    if needs_scale:  # 1 as scaling lets the rest be read
        claims = adapter.claims(AdapterConfig(path=location, scaling=1.0), _registered(adapter))
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


def _registered(adapter: AdapterFile) -> Registered:
    """Without a base, the order of a module's parameters is not known; for a description, the config's will do."""
    wrapped = {name.partition(".base_layer.")[0] for name in adapter.tensors if ".base_layer.lora_" in name}
    targets = (adapter.config or {}).get("target_parameters")
    names = tuple(str(target).rpartition(".")[2] for target in targets) if isinstance(targets, list) else ()
    modules = {module_name(name) for name in wrapped}
    return lambda module: names if module in modules else ()


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
    for key in ("updates", "targets"):
        if found.get(key):
            rows.append((key, ", ".join(f"{kind} ×{count}" for kind, count in found[key].items())))
    for key, value in found.get("settings", {}).items():
        rows.append((f"  {key}", _value(value)))
    text = table(rows)
    if found["kind"] == "adapter" and found["scalings"] is None:
        text += "\nit carries no config: a merge must be given its alpha or scaling"
    text = "\n".join([text, *map(labelled, found.get("notes", []))])
    return "\n".join([text, *(f"problem: {problem}" for problem in found.get("problems", []))])


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return reprlib.repr(value)
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# --- a config to begin with -------------------------------------------------------------------------------------------

_STARTER = """\
# Merge {what}.
# Look first: shardmerge plan {name}      then: shardmerge run {name}

base: {base}  # {base_comment}

adapters:
  - path: {adapter}
    weight: 1.0            # multiplies the adapter's own scaling{scale}{beside}

output:
  path: {output}
  dtype: same              # same | float32 | bfloat16 | float16
  max_shard_size: same     # same | 5GB

compute:
  device: auto             # auto | cpu | cuda | cuda:1
  dtype: float32           # W + ΔW is computed in this
  max_memory: auto         # working set above the interpreter's own, e.g. 256MB
"""


def starter_config(location: str, name: str) -> str:
    """A commented config for an adapter, from its own metadata. ``name`` is the file it will be written to."""
    found = inspect_path(location)
    if found["kind"] != "adapter":
        raise FormatError(f"{location}: this is a checkpoint, not an adapter; init takes an adapter")
    ranks = ", ".join(map(str, found["ranks"])) or "unknown"
    scalings = ", ".join(f"{value:.6g}" for value in found["scalings"] or [])
    what = f"a {_one_line(str(found['family']))} adapter, rank {ranks}" + (f", scaling {scalings}" if scalings else "")
    scale = (
        "" if scalings else "\n    alpha: 16              # the adapter carries no config: what was alpha in training?"
    )
    trained_on = found["trained_on"]
    last = location.rstrip("/").rpartition("/")[2]
    return _STARTER.format(
        what=what,
        name=_one_line(name),
        base=_quoted("auto" if trained_on else "path/to/base"),
        base_comment=f"the adapter says it was trained on {json.dumps(trained_on)}; or give a path"
        if trained_on
        else "a directory, a .safetensors file or a Hub id",
        adapter=_quoted(location),
        scale=scale,
        beside="".join(
            f"\n    # {_one_line(text)}: trained with it, and merged too; ignore_files: [its name] leaves it out"
            for text in found["trained beside it"]
        ),
        output=_quoted((last.partition("@")[0] or last).removesuffix(".pt") + "-merged"),
    )


def _one_line(text: str) -> str:
    """What may stand in a comment: an adapter's metadata must not get out of it."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _quoted(text: str) -> str:
    """A YAML string, in quotes where YAML would take it for something else (500, true, 2024-01-01)."""
    plain = text and all(character.isalnum() or character in "/._-@" for character in text) and text[0] not in "-@."
    if plain and yaml.safe_load(text) == text:
        return text
    return yaml.safe_dump(text, allow_unicode=True, default_style='"', width=math.inf).strip()
