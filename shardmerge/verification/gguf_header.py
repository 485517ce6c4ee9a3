"""Read the header of a GGUF file by the format's definition, without the code that writes it, and check its key-values.

    "GGUF", version (u32), number of tensors (u64), number of key-values (u64)
    each key-value:  key, type (u32), value
    each tensor:     name, number of dimensions (u32), dimensions (u64, columns first), type (u32), offset (u64)
    padding to ``general.alignment`` (32 by default); then the tensors' data, at offsets counted from here

A string is its length (u64) and its bytes; an array the type of its items (u32), their number (u64) and the items.
Little-endian throughout. Source: ggml's docs/gguf.md.

Files are untrusted, so a header is read in chunks (`gguf.formats.Cursor`). Of arrays and long strings only the length
and a checksum are kept.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shardmerge.errors import FormatError
from shardmerge.gguf.formats import ARRAY, BOOL, CHUNK, SCALARS, STRING, Cursor, Read
from shardmerge.spec.tensors import TensorInfo
from shardmerge.system.checksums import Checksums

#: Limits of a header; the largest vocabularies with their merges take 20 MB.
_MOST_BYTES = 256 << 20
_MOST_TENSORS, _MOST_KEYS = 1 << 20, 1 << 16
_MOST_ITEMS = 1 << 24
#: Bytes of a tensor's name (llama.cpp's limit) and of a key (the format's).
_NAME, _KEY = 64, (1 << 16) - 1
#: Strings up to this length are kept.
_KEPT = 4096
_DIMENSIONS = 4
#: Type of a tensor → its name, and the elements and bytes of a block.
_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    30: ("BF16", 1, 2),
}


@dataclass(frozen=True, slots=True)
class Long:
    """An array or a long string: the type and number of its items, and a checksum of their bytes."""

    item: int
    count: int
    checksum: str

    def __str__(self) -> str:
        return f"{self.count} {'bytes' if self.item == 0 else 'items'} of checksum {self.checksum[:8]}"


Value = int | float | bool | str | Long


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """Key-values, and tensors by name: type, shape in torch's order, and offsets in the data."""

    values: Mapping[str, tuple[int, Value]]
    tensors: Mapping[str, TensorInfo]
    alignment: int
    data_start: int

    def whole(self, key: str) -> int | None:
        """The integer of a key; None where there is none."""
        value = self.values.get(key, (0, None))[1]
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def count(self, key: str) -> int | None:
        value = self.values.get(key, (0, None))[1]
        return value.count if isinstance(value, Long) else None


def read_header(read: Read, size: int, where: str) -> GgufHeader:
    """The header of a file of ``size`` bytes. `FormatError` where it is not valid; the data may be anything."""
    cursor = _Cursor(read, min(size, _MOST_BYTES), where)
    magic = cursor.take(4)
    if magic != b"GGUF":
        raise FormatError(f"{where}: begins with {magic!r}, so it is not a GGUF file")
    version, tensors, keys = cursor.unpack("<IQQ")
    if version != 3:
        raise FormatError(f"{where}: GGUF version {version}; expected 3")
    if tensors > _MOST_TENSORS or keys > _MOST_KEYS:
        raise FormatError(f"{where}: says that it has {tensors} tensors and {keys} key-values, which is absurd")
    values: dict[str, tuple[int, Value]] = {}
    for _ in range(keys):
        key = cursor.name(_KEY)
        if key in values:
            raise FormatError(f"{where}: the key {key[:_NAME]!r} is there twice")
        values[key] = _value(cursor)
    alignment = _alignment(values, where)
    infos: dict[str, TensorInfo] = {}
    for _ in range(tensors):
        name = cursor.name(_NAME)
        if name in infos:
            raise FormatError(f"{where}: the tensor {name!r} is there twice")
        infos[name] = _info(cursor, name, size)
    padding = cursor.take(-cursor.at % alignment)
    if any(padding):
        raise FormatError(f"{where}: the padding before its data is not zero")
    return GgufHeader(values, infos, alignment, cursor.at)


class _Cursor(Cursor):
    def name(self, most: int) -> str:
        (length,) = self.unpack("<Q")
        if not 0 < length <= most:
            raise FormatError(f"{self.where}: a name of {length} bytes; expected 1 to {most}")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.where}: a name is not UTF-8: {error}") from None

    def checksum(self, count: int) -> str:
        """The checksum of the next bytes."""
        found = Checksums(False)
        while count:
            part = self.take(min(count, CHUNK))
            found.update(part)
            count -= len(part)
        return found.hex()["xxh3_128"]


def _value(cursor: _Cursor) -> tuple[int, Value]:
    (kind,) = cursor.unpack("<I")
    if kind == STRING:
        (length,) = cursor.unpack("<Q")
        if length > _KEPT:
            return kind, Long(0, length, cursor.checksum(length))
        return kind, cursor.take(length).decode(errors="backslashreplace")
    if kind == ARRAY:
        return kind, _array(cursor)
    return kind, _scalar(cursor, kind)


def _scalar(cursor: _Cursor, kind: int) -> int | float | bool:
    if kind == BOOL:
        (byte,) = cursor.take(1)
        if byte > 1:
            raise FormatError(f"{cursor.where}: a truth value of {byte}")
        return bool(byte)
    return cursor.unpack(cursor.layout(kind))[0]


def _array(cursor: _Cursor) -> Long:
    item, count = cursor.unpack("<IQ")
    if count > _MOST_ITEMS:
        raise FormatError(f"{cursor.where}: an array of {count} items, which is absurd")
    if item in SCALARS:
        return Long(item, count, cursor.checksum(count * struct.calcsize(f"<{SCALARS[item]}")))
    if item != STRING:
        raise FormatError(f"{cursor.where}: an array of items of type {item}, which no model has")
    found = Checksums(False)
    for _ in range(count):
        head = cursor.take(8)
        found.update(head)
        found.update(cursor.take(int.from_bytes(head, "little")))
    return Long(item, count, found.hex()["xxh3_128"])


def _alignment(values: Mapping[str, tuple[int, Value]], where: str) -> int:
    value = values.get("general.alignment", (4, 32))[1]
    if not isinstance(value, int) or value <= 0 or value % 8 or value > 1 << 16:
        raise FormatError(f"{where}: general.alignment is {value}; expected a multiple of 8")
    return value


def _info(cursor: _Cursor, name: str, size: int) -> TensorInfo:
    (dimensions,) = cursor.unpack("<I")
    if not 0 < dimensions <= _DIMENSIONS:
        raise FormatError(f"{cursor.where}: {name} has {dimensions} dimensions; expected 1 to {_DIMENSIONS}")
    shape = cursor.unpack(f"<{dimensions}Q")[::-1]
    code, offset = cursor.unpack("<IQ")
    if code not in _TYPES:
        raise FormatError(f"{cursor.where}: {name} is of type {code}; known are {', '.join(map(str, _TYPES))}")
    kind, block, size_of_block = _TYPES[code]
    elements = math.prod(shape)
    if not elements or shape[-1] % block:
        raise FormatError(
            f"{cursor.where}: {name} is {kind} of shape {list(shape)}, which is not a whole number of blocks"
        )
    nbytes = elements // block * size_of_block
    if offset > size or nbytes > size:
        raise FormatError(f"{cursor.where}: {name} takes {nbytes} bytes at {offset}, the whole file has {size}")
    return TensorInfo(kind, shape, (offset, offset + nbytes))


# --- key-values against the tensors and config.json -------------------------------------------------------------------

#: Without these, programs refuse the file or guess. ``{}`` is the architecture.
_REQUIRED = (
    "general.file_type",
    "general.quantization_version",
    "{}.block_count",
    "{}.context_length",
    "{}.embedding_length",
    "{}.feed_forward_length",
    "{}.attention.head_count",
    "{}.attention.head_count_kv",
    "{}.attention.layer_norm_rms_epsilon",
    "tokenizer.ggml.model",
    "tokenizer.ggml.tokens",
)
#: A key without the architecture → its names in config.json; the first that exists counts.
_CONFIG: Mapping[str, tuple[str, ...]] = {
    "block_count": ("num_hidden_layers",),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.sliding_window": ("sliding_window",),
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_used_count": ("num_experts_per_tok",),
}
#: The relative error of a float32.
_FLOAT32 = 2.0**-24


def contradictions(header: GgufHeader, config: Mapping[str, Any]) -> Iterator[str]:
    """A message for missing keys, and for every key that contradicts the tensors or the config."""
    architecture = header.values.get("general.architecture", (0, None))[1]
    if not isinstance(architecture, str):
        yield "there is no general.architecture"
        return
    missing = [key for key in (key.format(architecture) for key in _REQUIRED) if key not in header.values]
    if missing:
        yield f"there is no {', '.join(missing)}"
        return
    yield from _against_config(header, architecture, config)
    layers = {name.split(".")[1] for name in header.tensors if name.startswith("blk.") and name.count(".") > 1}
    count = header.whole(f"{architecture}.block_count")
    if layers != {str(layer) for layer in range(len(layers))} or len(layers) != count:
        yield f"{architecture}.block_count is {count}, but there are tensors of {len(layers)} layers"
    shapes = _shapes(header, architecture)
    for name, info in header.tensors.items():
        wanted = shapes.get(_kind(name))
        if wanted is not None and None not in wanted and info.shape != wanted:
            yield f"{name} has shape {list(info.shape)}; the key-values make it {list(wanted)}"


def _against_config(header: GgufHeader, architecture: str, config: Mapping[str, Any]) -> Iterator[str]:
    text = config.get("text_config")
    settings = {**config, **(text if isinstance(text, dict) else {})}
    for key, names in _CONFIG.items():
        found = header.values.get(f"{architecture}.{key}", (0, None))[1]
        name = next((name for name in names if settings.get(name) is not None), None)
        if name is None or not isinstance(found, (int, float)) or not isinstance(settings[name], (int, float)):
            continue
        if abs(found - settings[name]) > abs(settings[name]) * _FLOAT32:
            yield f"{architecture}.{key} is {found}, but config.json says {name} {settings[name]}"


def _kind(name: str) -> str:
    """``blk.3.attn_q.weight`` → ``attn_q.weight``."""
    return name.split(".", 2)[2] if name.startswith("blk.") and name.count(".") > 1 else name


def _shapes(header: GgufHeader, architecture: str) -> dict[str, tuple[int | None, ...]]:
    """Expected shapes in torch's order, by `_kind`; None for a dimension that no key states."""

    def of(key: str) -> int | None:
        return header.whole(f"{architecture}.{key}")

    width, inner, experts = of("embedding_length"), of("feed_forward_length"), of("expert_count")
    heads, groups = of("attention.head_count"), of("attention.head_count_kv")
    vocabulary = header.count("tokenizer.ggml.tokens")
    each = of("attention.key_length")
    if each is None and width and heads:
        each = width // heads
    queries, keys = _times(heads, each), _times(groups, each)
    both = queries + 2 * keys if queries is not None and keys is not None else None
    expert_inner = of("expert_feed_forward_length") or inner
    up = _times(2, inner) if architecture == "phi3" else inner  # Phi-3 has gate and up in one
    shapes: dict[str, tuple[int | None, ...]] = {
        "token_embd.weight": (vocabulary, width),
        "output.weight": (vocabulary, width),
        "attn_q.weight": (queries, width),
        "attn_k.weight": (keys, width),
        "attn_v.weight": (keys, width),
        "attn_qkv.weight": (both, width),
        "attn_output.weight": (width, queries),
        "ffn_gate.weight": (inner, width),
        "ffn_up.weight": (up, width),
        "ffn_down.weight": (width, inner),
        "ffn_gate_inp.weight": (experts, width),
        "ffn_gate_exps.weight": (experts, expert_inner, width),
        "ffn_up_exps.weight": (experts, expert_inner, width),
        "ffn_down_exps.weight": (experts, width, expert_inner),
        "attn_q_norm.weight": (each,),
        "attn_k_norm.weight": (each,),
    }
    norms = ("output_norm", "attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")
    shapes |= {f"{name}.weight": (width,) for name in norms}
    return shapes | {f"{name.removesuffix('weight')}bias": shape[:1] for name, shape in shapes.items()}


def _times(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one * other
