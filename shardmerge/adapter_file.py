"""An adapter's files → its config and its tensors, as `TensorRef`s. No tensor data is read."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardmerge import patterns
from shardmerge.adapters import AdapterContent, Claims, Ordered, Registered, Stored, claim, detect_format, no_order
from shardmerge.checkpoint import read_json, read_shard
from shardmerge.config import AdapterConfig
from shardmerge.errors import FormatError
from shardmerge.pickled import read_pickled
from shardmerge.sources import Source, directory_of, open_reader
from shardmerge.spec import DTYPE_BITS, SourceFile, TensorRef

CONFIG_NAME = "adapter_config.json"
#: PEFT's names and MLX's.
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapters.safetensors")
PICKLES = (".bin", ".pt", ".pth")
_STRUCT_CODES = {"F16": "e", "F32": "f", "F64": "d", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B"}


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter as it is stored. ``config`` is None where there is no adapter_config.json."""

    source: Source
    file: SourceFile
    config_file: SourceFile | None
    config: Mapping[str, Any] | None
    tensors: Mapping[str, TensorRef]
    #: The metadata of its safetensors header; empty for a pickle.
    metadata: Mapping[str, str]

    @property
    def trained_on(self) -> str | None:
        """The base that its config names."""
        config = self.config or {}
        value = config.get("base_model_name_or_path", config.get("model"))
        return value if isinstance(value, str) and value else None

    @property
    def family(self) -> str:
        """The method that made it, by PEFT's name where it has one."""
        config = self.config or {}
        kind = config.get("peft_type", config.get("fine_tune_type", "LORA"))
        return str(kind)

    def format(self, wanted: str = "auto") -> str:
        return detect_format(self.tensors, self.config) if wanted == "auto" else wanted

    def claims(
        self,
        config: AdapterConfig,
        registered: Registered = lambda module: (),
        stored: Stored = lambda module: None,
        ordered: Ordered = no_order,
    ) -> Claims:
        """Its updates and problems, as ``config`` says; the others are as `shardmerge.adapters.claim` takes them."""
        kind = self.format(config.format)
        scaled = config.alpha is not None or config.scaling is not None
        if self.config is not None and kind in ("peft", "mlx") and scaled:
            problem = f"it has its own {CONFIG_NAME}, so alpha and scaling must not be given; weight scales it"
            return Claims(problems=[problem], refused=True)
        tensors = self.chosen(config)
        if not tensors:
            return Claims(problems=[f"no tensor's name begins with prefix {config.prefix!r}"], refused=True)
        content = AdapterContent(
            tensors, self.config, self.metadata, config.alpha, config.scaling, config.expert_layout, self.read_number
        )
        try:
            with patterns.bounded():
                return claim(kind, content, registered, stored, ordered)
        except patterns.SlowPatternError as error:
            return Claims(problems=[f"{CONFIG_NAME}: {error}"], refused=True)

    def chosen(self, config: AdapterConfig) -> Mapping[str, TensorRef]:
        """Its tensors, or those that begin with the config's ``prefix``."""
        prefix = config.prefix
        return self.tensors if not prefix else {k: ref for k, ref in self.tensors.items() if k.startswith(prefix)}

    def read_number(self, ref: TensorRef) -> float:
        """The value of a tensor of one number."""
        reader = open_reader(self.file)
        try:
            data = bytearray(DTYPE_BITS[ref.dtype] // 8)
            reader.read_into(ref.offset, memoryview(data))
        finally:
            reader.close()
        if ref.dtype == "BF16":  # the upper half of a float32
            data, code = bytearray(b"\0\0") + data, "f"
        elif (code := _STRUCT_CODES.get(ref.dtype, "")) == "":
            raise FormatError(f"{ref.uri}: {ref.name} is stored as {ref.dtype}; expected a number")
        (value,) = struct.unpack(f"<{code}", data)
        if not math.isfinite(value):
            raise FormatError(f"{ref.uri}: {ref.name} holds {value}")
        return float(value)


def open_adapter(source: Source) -> AdapterFile:
    """Find the weights and the config, and read the header. Raises `FormatError` or `SourceError`."""
    name = _weights_name(source)
    if name in WEIGHTS:
        # Named by itself, it still has its config beside it, where PEFT wrote both.
        source = directory_of(source)
    names = source.names()
    config = read_json(source, names, CONFIG_NAME) if CONFIG_NAME in names else None
    file = source.stat(name)
    metadata: Mapping[str, str] = {}
    if name.endswith(PICKLES):
        tensors = read_pickled(source.fetch(name), file.uri)
    else:
        shard = read_shard(source, name)
        metadata, tensors = dict(shard.metadata), {ref.name: ref for ref in shard.tensors}
    if not tensors:
        raise FormatError(f"{file.uri}: holds no tensors")
    config_file = source.stat(CONFIG_NAME) if config is not None else None
    return AdapterFile(source, file, config_file, config, tensors, metadata)


def _weights_name(source: Source) -> str:
    names = [name for name in source.names() if "/" not in name]
    for usual in WEIGHTS:
        if usual in names:
            return usual
    # Trainer checkpoints keep optimizer.pt and friends beside the adapter; only a sole candidate is no guess.
    candidates = [name for name in names if name.endswith((".safetensors", *PICKLES))]
    if len(candidates) == 1:
        return candidates[0]
    # PEFT saves an adapter that is not called "default" into a folder of its name.
    nested = [name for name in source.names() if name.endswith(WEIGHTS)]
    found = ", ".join(candidates or nested) or "none of that kind"
    raise FormatError(
        f"{source.location}: expected {' or '.join(WEIGHTS[:2])}, or one .safetensors or .pt file; found {found}"
    )
