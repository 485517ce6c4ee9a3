"""The files beside the weights: config, tokenizer, chat template, code, licences. Copied byte for byte."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from shardmerge.adapter_file import AdapterFile
from shardmerge.checkpoint import Checkpoint
from shardmerge.config import AdapterConfig
from shardmerge.journal import RECORD_NAME
from shardmerge.planning.tied import without_ties
from shardmerge.planning.vocabulary import vocabulary_size
from shardmerge.sources import Source, directory_of
from shardmerge.spec import AuxFile

_WEIGHTS = re.compile(
    r".*(\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|onnx|onnx_data|h5|msgpack|ot|npz|pickle|pkl|tflite|mlmodel|nemo)"
    r"|\.(safetensors|bin|h5|msgpack)\.index(\.[^./]+)?\.json)(\.tmp|\.lock)?",
    re.DOTALL,  # a name may hold the end of a line
)
_TOKENIZER = re.compile(
    r"(tokenizer[^/]*|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|spiece\.model"
    r"|sentencepiece[^/]*\.model|[^/]+\.tiktoken|chat_template\.(jinja|json)|additional_chat_templates/[^/]+\.jinja)"
)
#: Folders of a training run or of other formats of the same model.
_OTHER_FOLDERS = re.compile(r"(checkpoint-\d+|runs|logs|wandb|global_step\d+|onnx|openvino|coreml|original|gguf)(/.*)?")
_DTYPE_KEYS = ("dtype", "torch_dtype")


@dataclass(slots=True)
class AuxFiles:
    files: list[AuxFile] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def collect(
    checkpoint: Checkpoint, adapters: Sequence[tuple[AdapterConfig, AdapterFile]], changes: Mapping[str, Any]
) -> AuxFiles:
    """The base's files; the tokenizer and template of the first adapter that has one, in place of the base's.

    ``changes`` are what config.json must say: ``dtype``, by torch's name, ``vocab_size``, ``tie_word_embeddings``.
    Without any, its bytes stay as they are.
    """
    result = AuxFiles()
    chosen: dict[str, tuple[Source, str]] = {}
    base = _model_directory(checkpoint)
    if base is not None:
        chosen = {name: (base, name) for name in base.names() if not _is_weights(name) and name != RECORD_NAME}
        _leave_other_models(chosen, base, result)
    for config, adapter in adapters:
        own = [name for name in adapter.source.names() if _TOKENIZER.fullmatch(name) and not _is_weights(name)]
        if own:
            _take_tokenizer(chosen, own, config, adapter, result)
            break
    for name, (source, stored) in sorted(chosen.items()):
        content = None
        if name == "config.json" and changes:
            content = _with_changes(source.read(stored, 0, 1 << 26), checkpoint.config, changes)
        result.files.append(AuxFile(name, source.stat(stored), content))
    return result


def _is_weights(name: str) -> bool:
    return _WEIGHTS.fullmatch(name) is not None


def _model_directory(checkpoint: Checkpoint) -> Source | None:
    """A base that is one file brings its neighbours only where a config.json says that they belong to a model."""
    directory = directory_of(checkpoint.source)
    alone = directory is not checkpoint.source and "config.json" not in directory.names()
    return None if alone else directory


def _leave_other_models(chosen: dict[str, tuple[Source, str]], base: Source, result: AuxFiles) -> None:
    """Leave out folders that hold weights of their own: they are another model, and copying half of it helps nobody."""
    folders = {name.rpartition("/")[0] for name in base.names() if "/" in name and _is_weights(name)}
    for name in list(chosen):
        folder = name.rpartition("/")[0]
        if folder and (folder in folders or _OTHER_FOLDERS.fullmatch(folder)):
            del chosen[name]
    kept_out = sorted(folder for folder in folders if not _OTHER_FOLDERS.fullmatch(folder))
    if kept_out:
        result.warnings.append(
            f"folders of the base with weights of their own are not copied: {', '.join(kept_out[:5])}"
        )


def _take_tokenizer(
    chosen: dict[str, tuple[Source, str]],
    names: Sequence[str],
    config: AdapterConfig,
    adapter: AdapterFile,
    result: AuxFiles,
) -> None:
    def differs(name: str) -> bool:
        if name not in chosen:
            return True
        source, stored = chosen[name]
        size = adapter.source.stat(name).size
        return source.stat(stored).size != size or source.read(stored, 0, size) != adapter.source.read(name, 0, size)

    changed = [name for name in names if differs(name)]
    for name in names:
        chosen[name] = (adapter.source, name)
    kept = [name for name in chosen if PurePosixPath(name).name == "tokenizer.model" and name not in names]
    if "tokenizer.json" in changed and kept:
        result.warnings.append(
            f"adapter {config.path} has a tokenizer.json that differs from the base's, but no {kept[0]}; the base's "
            f"{kept[0]} is kept, and programs that prefer it (llama.cpp's converter) will see the base's vocabulary"
        )


def _with_changes(text: bytes, config: Mapping[str, Any], changes: Mapping[str, Any]) -> str | None:
    """config.json with the changes made; None where they change nothing, so that the bytes stay."""
    changed = dict(config)
    if "dtype" in changes:
        changed = _replace(changed, _DTYPE_KEYS, lambda value: isinstance(value, str), changes["dtype"])
    if "vocab_size" in changes:
        old = vocabulary_size(config)
        changed = _replace(changed, ("vocab_size",), lambda value: value == old, changes["vocab_size"])
    if "tie_word_embeddings" in changes:
        changed = without_ties(changed)
    if changed == config:
        return None
    ending = "\n" if text.endswith(b"\n") else ""
    return json.dumps(changed, indent=2, ensure_ascii=False) + ending


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
