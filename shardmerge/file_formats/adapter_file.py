"""A stored adapter: its config, and its tensors as `TensorRef`s."""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from shardmerge.adapters.claims import NO_BASE, BaseView, Claims
from shardmerge.adapters.formats.base import AdapterContent
from shardmerge.adapters.formats.wholes import claim_beside
from shardmerge.adapters.registry import FORMATS, detect_format
from shardmerge.config.schema import AdapterConfig
from shardmerge.errors import FormatError
from shardmerge.sources.source import Source, open_reader
from shardmerge.spec.tensors import DTYPE_BITS, SourceFile, TensorRef
from shardmerge.system import bounded_regex

CONFIG_NAME = "adapter_config.json"
_STRUCT_CODES = {"F16": "e", "F32": "f", "F64": "d", "I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B"}
#: DoRA of three matrices of 384 experts in 61 layers has 210,816.
MAX_TENSORS = 250_000


@dataclass(frozen=True, slots=True)
class Beside:
    """A file of other trained weights. ``problem`` is why its tensors cannot be read."""

    name: str
    file: SourceFile
    tensors: Mapping[str, TensorRef]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A stored adapter. ``config`` is None if there is no adapter_config.json."""

    source: Source
    #: Its weights: one file, or all shards.
    files: tuple[SourceFile, ...]
    config_file: SourceFile | None
    config: Mapping[str, Any] | None
    tensors: Mapping[str, TensorRef]
    #: The metadata of its safetensors headers; empty for a pickle.
    metadata: Mapping[str, str]
    beside: tuple[Beside, ...] = ()
    #: Problems with its folder, and notes.
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def file(self) -> SourceFile:
        """The first file of its weights."""
        return self.files[0]

    @property
    def name(self) -> str:
        """The name of that file."""
        return self.file.uri.rpartition("/")[2]

    @property
    def all_files(self) -> tuple[SourceFile, ...]:
        """Every file that a merge depends on."""
        config = (self.config_file,) if self.config_file else ()
        return (*self.files, *config, *(beside.file for beside in self.beside))

    def apart_from(self, files: Collection[str]) -> AdapterFile:
        """The adapter without other weights in these files, by uri: they are the base's."""
        return dataclasses.replace(self, beside=tuple(of for of in self.beside if of.file.uri not in files))

    @property
    def trained_on(self) -> str | None:
        """The base that its config names."""
        config = self.config or {}
        value = config.get("base_model_name_or_path", config.get("model"))
        return value if isinstance(value, str) and value else None

    @property
    def family(self) -> str:
        """The method that made it, by PEFT's name if it has one."""
        return detect_format(self.tensors, self.config).method(self.tensors, self.config)

    def format(self, wanted: str = "auto") -> str:
        """The name of its format: ``wanted``, or the one that its files show."""
        return detect_format(self.tensors, self.config).name if wanted == "auto" else wanted

    def claims(self, config: AdapterConfig, base: BaseView = NO_BASE) -> Claims:
        """Its updates and problems with this config. ``base`` resolves what the adapter's files leave open."""
        claims = self._own_claims(config, base)
        claims.problems += self.problems
        claims.warnings += self.notes
        for beside in self.beside:
            if beside.problem:
                claims.problems.append(beside.problem)
            tensors = _chosen(beside.tensors, config)
            twice = [name for name in tensors if name in self.tensors]
            if twice:
                claims.problems.append(
                    f"{beside.name} is beside the adapter and has {len(twice)} tensors that {self.name} has, too, such "
                    f"as {twice[0]} {list(tensors[twice[0]].shape)}; if it is of another adapter, "
                    f"{way_out(beside.name)}"
                )
            claim_beside(claims, beside.name, {name: ref for name, ref in tensors.items() if name not in twice})
        return claims

    def _own_claims(self, config: AdapterConfig, base: BaseView) -> Claims:
        tensors = self.chosen(config)
        if not tensors:
            return Claims.refusal(f"no tensor's name begins with prefix {config.prefix!r}")
        content = AdapterContent(
            tensors,
            self.config,
            self.metadata,
            config.alpha,
            config.scaling,
            None if config.expert_layout == "auto" else config.expert_layout,
            self.read_number,
            config.ignore_keys,
        )
        try:
            with bounded_regex.bounded():
                return FORMATS[self.format(config.format)].claim(content, base)
        except bounded_regex.SlowPatternError as error:
            return Claims.refusal(f"{CONFIG_NAME}: {error}")

    def chosen(self, config: AdapterConfig) -> Mapping[str, TensorRef]:
        """Its tensors, or those that begin with the config's ``prefix``."""
        return _chosen(self.tensors, config)

    def read_number(self, ref: TensorRef) -> float:
        """The value of a tensor of one number."""
        data = bytearray(DTYPE_BITS[ref.dtype] // 8)
        with open_reader(next(file for file in self.files if file.uri == ref.uri)) as reader:
            reader.read_into(ref.offset, memoryview(data))
        if ref.dtype == "BF16":  # the upper half of a float32
            data, code = bytearray(b"\0\0") + data, "f"
        elif (code := _STRUCT_CODES.get(ref.dtype, "")) == "":
            raise FormatError(f"{ref.uri}: {ref.name} is stored as {ref.dtype}; expected a number")
        (value,) = struct.unpack(f"<{code}", data)
        if not math.isfinite(value):
            raise FormatError(f"{ref.uri}: {ref.name} holds {value}")
        return float(value)


def way_out(name: str) -> str:
    """Advice on how to ignore a file."""
    return f"ignore_files: [{name}] in the adapter's entry of the config merges without it"


def _chosen(tensors: Mapping[str, TensorRef], config: AdapterConfig) -> Mapping[str, TensorRef]:
    prefix = config.prefix
    return tensors if not prefix else {k: ref for k, ref in tensors.items() if k.startswith(prefix)}
