"""What ComfyUI says of single weights: their formats, in tensors or in the metadata of a file, and no config.json.

- ``module.comfy_quant``: U8, JSON such as ``{"format": "float8_e4m3fn"}``;
- ``_quantization_metadata`` among a file's metadata: JSON, ``{"layers": {module: {"format": …}}}``;
- ``scaled_fp8``, a tensor without a meaning of its own: older files of FP8 have it, and ``scale_weight`` for weights.

Of its formats ``float8_e4m3fn`` can be read, see `shardmerge.codecs.fp8`. The scales of ``mxfp8`` and ``nvfp4`` are
stored in tiles, in another order than the weight, and ``convrot`` multiplies weights by rotations. Source: ComfyUI's
``convert_old_quants`` (comfy/utils.py) and ``QUANT_ALGOS`` (comfy/quant_ops.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from shardmerge.codecs.codec import StoredTensors
from shardmerge.system import json_text

#: The end of the name of a tensor that says what a weight is stored as.
FORMAT = "comfy_quant"
#: Tensors that say that weights have scales.
MARKER = re.compile(r"(.*\.)?scaled_fp8")
_METADATA = "_quantization_metadata"
_READ = ("float8_e4m3fn",)
#: Bytes of the JSON of a weight.
_FORMAT_BYTES = 4096
#: Keys of settings, or beginnings of formats, that say that what is stored is not the weight.
_ROTATED = "convrot"

Metadata = tuple[tuple[str, str], ...]


def problems(tensors: StoredTensors) -> Iterator[str]:
    """Why weights cannot be read that ComfyUI has quantised, by their format: the first, and how many there are."""
    found: dict[str, list[str]] = {}
    try:
        for module, settings in (*_in_metadata(tensors), *_in_tensors(tensors)):
            if (what := _unreadable(settings)) and f"{module}.weight" not in found.get(what, ()):
                found.setdefault(what, []).append(f"{module}.weight")
    except ValueError as error:
        yield str(error)
    for what, names in found.items():
        more = f" and {len(names) - 1:,} more weights" if names[1:] else ""
        yield f"{names[0]}{more}: stored by ComfyUI as {what}, which cannot be read"


def without_formats(metadata: Metadata, quantised: Collection[str]) -> Metadata:
    """The metadata of a file with the formats of those weights only that are still ``quantised``, by name."""
    said = dict(metadata)
    try:
        settings = _settings(said[_METADATA])
    except (KeyError, ValueError):  # `problems` says what is wrong with it
        return metadata
    layers = {name: of for name, of in settings["layers"].items() if f"{name}.weight" in quantised}
    if layers == settings["layers"]:
        return metadata
    said[_METADATA] = json.dumps({**settings, "layers": layers})
    return tuple((key, value) for key, value in said.items() if key != _METADATA or layers)


def _in_metadata(tensors: StoredTensors) -> Iterator[tuple[str, Any]]:
    for metadata in tensors.metadata:
        for key, value in metadata:
            if key == _METADATA:
                yield from _settings(value)["layers"].items()


def _in_tensors(tensors: StoredTensors) -> Iterator[tuple[str, Any]]:
    refs = [ref for name, ref in tensors.items() if name.endswith(f".{FORMAT}")]
    for ref in refs:
        if ref.dtype != "U8" or ref.nbytes > _FORMAT_BYTES:
            raise ValueError(f"{ref.name} is {ref.dtype} {list(ref.shape)}; expected are {_FORMAT_BYTES:,} U8 at most")
    for name, content in tensors.contents(refs).items():
        yield name.removesuffix(f".{FORMAT}"), _parsed(content, name)


def _settings(text: str) -> Mapping[str, Any]:
    """The settings in a file's metadata; ``layers`` are a dictionary."""
    settings = _parsed(text.encode(), _METADATA)
    if not isinstance(settings.get("layers"), dict):
        raise ValueError(f"{_METADATA} in a file's metadata has no layers")
    return settings


def _parsed(content: bytes, name: str) -> Mapping[str, Any]:
    try:
        return json_text.parse_object(content)
    except json_text.JsonError as error:
        raise ValueError(f"{name} {error}") from None


def _unreadable(settings: Any) -> str:
    """The format of a weight that cannot be read; empty of one that can."""
    said = settings if isinstance(settings, dict) else {"format": settings}
    name = said.get("format")
    is_rotated = any(key.startswith(_ROTATED) and value is not False for key, value in said.items())
    if name in _READ and not is_rotated:
        return ""
    return f"{name!s:.100}{f' with {_ROTATED}' if is_rotated else ''}"
