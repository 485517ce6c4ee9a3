"""Lays out the tensors of a GGUF file: from stored names, shapes and dtypes to output tensors, as data.

Tensors and order are the official converter's for the merged checkpoint: generated tensors first, then files by name,
the tensors of a file by name, and a layer's experts at the last of them.

An output tensor is a sequence of stored rows, perhaps reordered within heads, perhaps with 1 added. A row is one of the
last dimension. So a tile of output rows is made of one tile of stored rows, or of few.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from shardmerge.codecs import ggml
from shardmerge.gguf.formats import padded
from shardmerge.gguf.generated import RopeScaling, generated
from shardmerge.gguf.model import Model
from shardmerge.spec.tensors import FLOAT_DTYPES, Encoding, RowRange

#: Tensors of checkpoints that no model needs.
_UNUSED = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")
#: Tensors of a multimodal model that are not its text model's. Source: the converter's filter.
_OTHER_SENSES = ("vision_", "vision.", "audio_", "audio.", "visual.", "projector.", "image_newline")
#: Low precision costs most in the output head. llama-quantize writes Q6_K there; the next type that can be written here
#: has 8 bits.
_HEAD_TYPES: Mapping[str, str] = {"Q4_0": "Q8_0", "Q4_1": "Q8_0", "Q5_0": "Q8_0", "Q5_1": "Q8_0"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


class Stored(Protocol):
    """A stored tensor; `TensorRef` is one."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of a stored tensor, along its last dimension."""

    tensor: str
    rows: RowRange


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of the file: the rows of its ``parts`` in order, or else its ``values``.

    Shapes are torch's, the last dimension being a row; the file has them reversed.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...] = ()
    #: The stored dtype, to which a merged value is rounded first.
    dtype: str = "F32"
    #: (g, a, b): the parts' rows viewed as (g, a, b) are the file's rows viewed as (g, b, a).
    shuffle: tuple[int, int, int] | None = None
    #: Added to every element, in float32, or like the converter in float16 if ``dtype`` is F16.
    addend: float = 0.0
    values: tuple[float, ...] | RopeScaling = ()
    #: A key of `ggml.BLOCKS`, and the offset in the tensor data; set when all tensors are known.
    kind: str = "F32"
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return ggml.nbytes(self.kind, self.shape)

    @property
    def encoding(self) -> Encoding:
        """The parts' encoding in the file; see `shardmerge.codecs.ggml`."""
        settings: dict[str, Any] = {"through": self.dtype}
        if self.shuffle:
            settings["shuffle"] = self.shuffle
        if self.addend:
            settings["addend"] = self.addend
        return Encoding(f"ggml-{self.kind}", tuple(settings.items()))

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_nbytes(self) -> int:
        return ggml.nbytes(self.kind, (self.columns,))

    @property
    def group(self) -> int:
        """A tile must have a multiple of so many rows, which change places with each other; a vector is one row."""
        return self.shuffle[1] * self.shuffle[2] if self.shuffle and len(self.shape) > 1 else 1


@dataclass(frozen=True, slots=True)
class Layout:
    """The tensors in the file's order, and problems."""

    tensors: tuple[OutputTensor, ...]
    #: Stored tensors that the file leaves out on purpose: nothing may update them.
    dropped: tuple[str, ...]
    problems: tuple[str, ...]

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors, with padding."""
        return padded(self.tensors[-1].offset + self.tensors[-1].nbytes) if self.tensors else 0


def lay_out(model: Model, shards: Sequence[Sequence[Stored]], quantization: str) -> Layout:
    """Lay out the file of a merged model.

    ``shards`` are the tensors of the checkpoint's files, in the order of their names; ``quantization`` is a key of
    `ggml.BLOCKS`.
    """
    maker = _Maker(model)
    drafts = [OutputTensor(name, (count,), values=values) for name, count, values in generated(model)]
    for shard in shards:
        for stored in sorted(shard, key=lambda tensor: tensor.name):
            drafts += maker.take(stored)
    maker.finish(drafts)
    tied = all(draft.name != "output.weight" for draft in drafts)
    tensors: list[OutputTensor] = []
    offset = 0
    for draft in drafts:
        tensors.append(dataclasses.replace(draft, kind=_type_of(draft, quantization, tied), offset=offset))
        offset += padded(tensors[-1].nbytes)
    return Layout(tuple(tensors), tuple(maker.dropped), tuple(maker.problems))


def _type_of(draft: OutputTensor, quantization: str, tied: bool) -> str:
    """The converter's rules: vectors, norms and routers stay exact; rows that are not whole blocks become F16."""
    exact = draft.name.endswith(("_norm.weight", "ffn_gate_inp.weight")) or not draft.name.endswith(".weight")
    if exact or len(draft.shape) <= 1:
        return "F32"
    head = "token_embd.weight" if tied else "output.weight"
    kind = _HEAD_TYPES.get(quantization, quantization) if draft.name == head else quantization
    return kind if ggml.fits(kind, draft.shape) else "F16"


class _Maker:
    """Takes stored tensors one by one and returns the output tensors that each completes."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._architecture = model.architecture
        self._seen: set[str] = set()
        #: Layer → experts' tensors by (projection, expert).
        self._experts: dict[int, dict[tuple[str, int], Stored]] = {}
        self.problems: list[str] = []
        self.dropped: list[str] = []

    def take(self, stored: Stored) -> list[OutputTensor]:
        name = stored.name
        if name.endswith(_UNUSED) or (self._architecture.multimodal and any(sense in name for sense in _OTHER_SENSES)):
            self.dropped.append(name)
            return []
        if stored.dtype not in FLOAT_DTYPES:
            self.problems.append(f"{name}: it is stored as {stored.dtype}; expected one of {', '.join(FLOAT_DTYPES)}")
            return []
        plain = name.replace("language_model.", "") if self._architecture.multimodal else name
        if self._architecture.multimodal and not plain.startswith(("model.", "lm_head.")):
            plain = f"model.{plain}"
        stem, _, suffix = plain.rpartition(".")
        if stem == "lm_head" and not self._architecture.has_head:
            self.problems.append(
                f"{name}: llama.cpp's {self._architecture.hf_class} has no output head of its own: it uses the "
                "embedding's weights (tied: peft keeps them tied)"
            )
            return []
        if plain in [f"{known}.weight" for known in self._architecture.model]:
            return self._one(stored, f"{self._architecture.model[stem]}.weight", stem)
        if found := _LAYER.fullmatch(plain):
            return self._of_layer(stored, int(found[1]), found[2], suffix)
        return self._left_over(stored)

    def _left_over(self, stored: Stored) -> list[OutputTensor]:
        self.problems.append(f"{stored.name}: {self._architecture.hf_class} has no such weight in GGUF")
        return []

    def _of_layer(self, stored: Stored, layer: int, rest: str, suffix: str) -> list[OutputTensor]:
        if layer >= self._model.layers:
            self.problems.append(f"{stored.name}: config.json says that there are {self._model.layers} layers")
            return []
        stem = rest.removesuffix(f".{suffix}")
        if suffix == "bias" and stem in self._architecture.layer and stem not in self._model.biases:
            self.problems.append(
                f"{stored.name}: by its config.json {self._architecture.hf_class} has no such bias, so transformers "
                "leaves it out, and llama.cpp would add it"
            )
            return []
        if suffix in ("weight", "bias") and (target := self._architecture.layer.get(stem)) is not None:
            return self._one(stored, f"blk.{layer}.{target}.{suffix}", stem)
        experts = self._architecture.experts
        if experts and rest.startswith(experts.prefix + "."):
            inner = rest.removeprefix(experts.prefix + ".")
            if experts.fused and inner.removesuffix(".weight") in ("gate_up_proj", "down_proj"):
                return self._fused_experts(stored, layer, inner.removesuffix(".weight"))
            if found := re.fullmatch(r"(\d+)\.(\w+)\.weight", inner):
                return self._expert(stored, layer, int(found[1]), found[2])
        return self._left_over(stored)

    def _one(self, stored: Stored, name: str, stem: str) -> list[OutputTensor]:
        """An output tensor that is one stored tensor."""
        model = self._model
        shape, shuffle = stored.shape, None
        if name in self._seen:
            self.problems.append(f"{stored.name}: another stored tensor already becomes {name}")
            return []
        self._seen.add(name)
        if name == "token_embd.weight":
            shape = self._embedding_shape(stored)
        dimensions = 1 if name.endswith(("_norm.weight", ".bias")) else 2
        if len(stored.shape) != dimensions or not all(stored.shape):
            self.problems.append(f"{stored.name}: its shape is {list(stored.shape)}; expected {dimensions} dimensions")
            return []
        if stem in self._architecture.permuted:
            heads = model.kv_heads if stem.endswith("k_proj") else model.heads
            if shape[0] % (2 * heads):
                self.problems.append(f"{stored.name}: {shape[0]} rows are not pairs in {heads} heads")
                return []
            shuffle = (heads, 2, shape[0] // heads // 2)
        is_norm = stem.endswith("norm") and name.endswith(".weight")
        addend = 1.0 if is_norm and self._architecture.shifts_norms else 0.0
        parts = (Part(stored.name, RowRange(0, math.prod(shape[:-1]))),)
        return [OutputTensor(name, shape, parts, stored.dtype, shuffle, addend)]

    def _embedding_shape(self, stored: Stored) -> tuple[int, ...]:
        rows, *rest = stored.shape or (0,)
        if self._architecture.name == "gemma3" and rows > self._model.vocab_size:
            rows = self._model.vocab_size  # like the converter, without rows that have no token
        if rows != self._model.vocab_size:
            self.problems.append(
                f"{stored.name}: it has {rows} rows; config.json's vocab_size is {self._model.vocab_size}"
            )
        return (rows, *rest)

    def _expert(self, stored: Stored, layer: int, expert: int, projection: str) -> list[OutputTensor]:
        experts, number = self._architecture.experts, self._model.experts
        assert experts and number
        if projection not in experts.stacks or expert >= number or len(stored.shape) != 2:
            return self._left_over(stored)
        found = self._experts.setdefault(layer, {})
        found[projection, expert] = stored
        if len(found) < number * len(experts.stacks):
            return []
        del self._experts[layer]
        return [
            draft
            for kind, target in experts.stacks.items()
            for draft in self._stack([found[kind, index] for index in range(number)], f"blk.{layer}.{target}.weight")
        ]

    def _stack(self, members: Sequence[Stored], name: str) -> list[OutputTensor]:
        shapes, dtypes = {member.shape for member in members}, {member.dtype for member in members}
        if len(shapes) > 1 or len(dtypes) > 1 or name in self._seen:
            self.problems.append(f"{members[0].name}: the experts of this layer have different shapes or dtypes")
            return []
        self._seen.add(name)
        parts = tuple(Part(member.name, RowRange(0, member.shape[0])) for member in members)
        return [OutputTensor(name, (len(members), *members[0].shape), parts, members[0].dtype)]

    def _fused_experts(self, stored: Stored, layer: int, projection: str) -> list[OutputTensor]:
        """(E, 2 f, d) → gate and up, (E, f, d) each; (E, d, f) → down."""
        experts, number = self._architecture.experts, self._model.experts
        assert experts
        halves = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
        if len(stored.shape) != 3 or stored.shape[0] != number or stored.shape[1] % len(halves):
            self.problems.append(
                f"{stored.name}: its shape is {list(stored.shape)}; expected {number} experts' matrices"
            )
            return []
        rows = stored.shape[1] // len(halves)
        drafts = []
        for half, kind in enumerate(halves):
            name = f"blk.{layer}.{experts.stacks[kind]}.weight"
            self._seen.add(name)
            starts = [expert * stored.shape[1] + half * rows for expert in range(number)]
            parts = tuple(Part(stored.name, RowRange(start, start + rows)) for start in starts)
            drafts.append(OutputTensor(name, (number, rows, stored.shape[2]), parts, stored.dtype))
        return drafts

    def finish(self, drafts: Sequence[OutputTensor]) -> None:
        """Report missing tensors, after all stored ones were taken."""
        architecture, experts = self._architecture, self._architecture.experts
        required = [f"{name}.weight" for name in architecture.model.values() if name != "output"]
        stacks = list(experts.stacks.values()) if experts else []
        for layer in range(self._model.layers):
            required += [f"blk.{layer}.{name}.weight" for name in (*architecture.layer.values(), *stacks)]
        complete = self._seen | {draft.name for draft in drafts}
        missing = [name for name in required if name not in complete]
        if missing and not self.problems:
            self.problems.append(
                f"the base lacks the weights of {len(missing)} tensors that llama.cpp needs for "
                f"{architecture.hf_class}: {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}"
            )
