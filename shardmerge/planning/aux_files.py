"""The files beside the weights: config, tokenizer, chat template, code, licences. Copied byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardmerge.codecs.quantization import MODELOPT_SETTINGS, SECTIONS, SETTINGS_FILES
from shardmerge.config.schema import AdapterConfig
from shardmerge.destinations.record import RECORD_NAME
from shardmerge.file_formats import recognise
from shardmerge.file_formats.adapter_file import AdapterFile
from shardmerge.file_formats.checkpoint import Checkpoint
from shardmerge.file_formats.checkpoint_files import read_json
from shardmerge.file_formats.model_config import vocabulary_size
from shardmerge.planning.other_weights import is_adapter, is_below, is_weights, needed_folders, sort_out
from shardmerge.planning.special_files import is_of_another, linked_folders, unfit_in_adapter, unfit_in_base
from shardmerge.planning.tied import without_ties
from shardmerge.planning.tokenizer import Files, take_tokenizer, without_template
from shardmerge.sources.source import Source, read_file
from shardmerge.spec.plans import AuxFile
from shardmerge.system import json_text

#: Files that may hold a chat template among other things, which some programs prefer to a file of its own.
_HOLD_TEMPLATES = ("tokenizer_config.json", "processor_config.json")
_DTYPE_KEYS = ("dtype", "torch_dtype")
#: What config.json says of a head.
_HEAD_KEYS = ("architectures", "id2label", "label2id", "num_labels")


@dataclass(slots=True)
class AuxFiles:
    files: list[AuxFile] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    #: Of the warnings, which files of a tokenizer were left out.
    of_tokenizer: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    #: Why files cannot be read or copied at all; then nothing else is said of any.
    unfit: list[str] = field(default_factory=list)


def collect(
    checkpoint: Checkpoint,
    adapters: Sequence[tuple[AdapterConfig, AdapterFile]],
    changes: Mapping[str, Any],
    copies_weights: bool = True,
) -> AuxFiles:
    """The base's files; the tokenizer and template of the first adapter that has one, in place of the base's.

    ``changes`` are what config.json must say: ``dtype``, by torch's name, ``vocab_size``, ``tie_word_embeddings``,
    ``transformers_weights``, ``architectures`` and the labels, and ``quantization``, the settings of which None is to
    have none; ``dense_modules`` are those that it lists as not quantised now. Without any, its bytes stay as they are.
    ``copies_weights``: whether weights beside the model's go along, too.
    """
    result = AuxFiles()
    base = _model_directory(checkpoint)
    chosen = {} if base is None else _of_base(checkpoint, base, copies_weights, result)
    sources = [(config.path, adapter.source) for config, adapter in adapters]
    result.unfit += [problem for _, source in sources for problem in unfit_in_adapter(source)]
    if result.unfit:
        return result
    has_own_template = take_tokenizer(chosen, sources, result.of_tokenizer)
    result.warnings += result.of_tokenizer
    if "quantization" in changes and changes["quantization"] is None:
        chosen = {name: file for name, file in chosen.items() if name not in SETTINGS_FILES}
    for name, (source, stored) in sorted(chosen.items()):
        content = None
        if name == "config.json" and changes:
            content = _with_changes(read_file(source.stat(stored), json_text.MAX_BYTES), checkpoint.config, changes)
        elif name == MODELOPT_SETTINGS and "dense_modules" in changes:
            content = _with_dense(read_json(source, stored), changes["dense_modules"])
        elif name in _HOLD_TEMPLATES and has_own_template and source is base:
            content = without_template(read_json(base, stored))
        result.files.append(AuxFile(name, source.stat(stored), content))
    result.problems = _pointers(chosen)
    return result


def _of_base(checkpoint: Checkpoint, base: Source, copies_weights: bool, result: AuxFiles) -> Files:
    """All that the base's directory holds but its weights, and of those what the model needs."""
    names = base.names()
    needed = needed_folders(base, names)
    weights = sort_out(checkpoint, base, names, needed, copies_weights)
    result.warnings += weights.notes
    with_weights = {name.rpartition("/")[0] for name in names if "/" in name and is_weights(name)}
    chosen: Files = {name: (base, name) for name in weights.copied}
    for name in names:
        # A part of another model is of no use.
        folder = name.rpartition("/")[0]
        of_another = folder and (folder in with_weights or is_of_another(folder))
        if is_weights(name) or is_adapter(name) or name == RECORD_NAME or name.endswith("/"):
            continue
        if not of_another or is_below(name, needed):
            chosen[name] = (base, name)
    refused, ignored = linked_folders(base, names, needed, with_weights - needed)
    result.unfit += unfit_in_base(base, names, {*chosen, *refused})
    if ignored:
        result.warnings.append(f"links of the base to folders in it are not followed: {', '.join(ignored)}")
    return chosen


def _pointers(chosen: Files) -> list[str]:
    """Git LFS pointers among the files: the output would be broken by a tokenizer or a config that is one."""
    found = sorted(
        name
        for name, (source, stored) in chosen.items()
        if source.local_path is not None  # elsewhere there are the files themselves
        and source.stat(stored).size <= recognise.POINTER_BYTES
        and recognise.is_pointer(source.read(stored, 0, recognise.HEAD_BYTES))
    )
    if not found:
        return []
    return [f"files that would be copied are Git LFS pointers: {', '.join(found)}; fetch them with `git lfs pull`"]


def _model_directory(checkpoint: Checkpoint) -> Source | None:
    """The directory to copy from; None for a base that is one file without a config.json beside it."""
    directory = checkpoint.source.directory()
    alone = directory is not checkpoint.source and "config.json" not in directory.names()
    return None if alone else directory


def _with_changes(text: bytes | bytearray, config: Mapping[str, Any], changes: Mapping[str, Any]) -> str | None:
    """config.json with the changes made; None where they change nothing, so that the bytes stay."""
    changed = dict(config)
    if "dtype" in changes:
        changed = _replace(changed, _DTYPE_KEYS, lambda value: isinstance(value, str), changes["dtype"])
    if "vocab_size" in changes:
        old = vocabulary_size(config)
        changed = _replace(changed, ("vocab_size",), lambda value: value == old, changes["vocab_size"])
    if "tie_word_embeddings" in changes:
        changed = without_ties(changed)
    changed |= {key: changes[key] for key in _HEAD_KEYS if key in changes}
    if "quantization" in changes:
        changed = _with_quantization(changed, changes["quantization"])
    if "transformers_weights" in changes:
        changed["transformers_weights"] = changes["transformers_weights"]
    if changed == config:
        return None
    ending = "\n" if text.endswith(b"\n") else ""
    return json.dumps(changed, indent=2, ensure_ascii=False) + ending


def _with_quantization(config: Mapping[str, Any], settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """config.json with other settings of a quantisation where it has some; without them if ``settings`` is None."""
    changed = {}
    for key, value in config.items():
        if key in SECTIONS and isinstance(value, dict):
            if settings is None:
                continue
            value = {name: found for name, found in settings.items() if name in value or name != "quant_method"}
        elif key.endswith("_config") and isinstance(value, dict):
            value = _with_quantization(value, settings)
        changed[key] = value
    return changed


def _with_dense(settings: Mapping[str, Any], modules: Sequence[str]) -> str:
    """modelopt's settings with more modules that are not quantised."""
    inner = settings.get("quantization")
    inner = dict(inner) if isinstance(inner, dict) else {}
    listed = inner.get("exclude_modules")
    listed = listed if isinstance(listed, list) else []
    inner["exclude_modules"] = [*listed, *(module for module in modules if module not in listed)]
    return json.dumps({**settings, "quantization": inner}, indent=2, ensure_ascii=False)


def _replace(config: Mapping[str, Any], keys: Sequence[str], wanted: Callable[[Any], bool], new: Any) -> dict[str, Any]:
    """Keys of the model and of its sub-models (``text_config`` and such); a quantisation's are not touched."""
    replaced = {}
    for key, value in config.items():
        if key in keys and wanted(value):
            value = new
        elif key.endswith("_config") and key != "quantization_config" and isinstance(value, dict):
            value = _replace(value, keys, wanted, new)
        replaced[key] = value
    return replaced
