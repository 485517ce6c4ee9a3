"""One matched update at a time, with its factors, to hold a family to what `adapters.methods.base` promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import shardmerge
from shardmerge.adapters.methods.base import Family
from shardmerge.adapters.registry import FAMILIES
from shardmerge.spec.tensors import RowRange, TensorRef, even_rows
from shardmerge.spec.updates import Update, Window
from tests.support.device_cases import config_of
from tests.support.peft_oracle import random

_KINDS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def read(ref: TensorRef) -> Tensor:
    """A tensor from the bytes that a header points to, with none of the package's readers."""
    with Path(ref.uri).open("rb") as file:
        file.seek(ref.offset)
        data = bytearray(file.read(ref.nbytes))
    flat = torch.frombuffer(data, dtype=_KINDS[ref.dtype])
    return flat.view(ref.shape) if ref.strides is None else flat.as_strided(ref.shape, ref.strides)


@dataclass
class Given:
    """`Factors` of one update in ``dtype``; ``zeros`` are the roles of those that are all zero.

    If ``in_parts``, windows are parts of the matrix, and what the plan counts in parts must not be read whole.
    """

    update: Update
    dtype: torch.dtype
    zeros: frozenset[str] = frozenset()
    in_parts: bool = False
    built: dict[str, Tensor] = field(default_factory=dict)
    in_prepass: bool = False

    def _read(self, role: str) -> Tensor:
        tensor = read(self.update.factor(role))
        return torch.zeros_like(tensor) if role in self.zeros else tensor

    def _made(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor.long()

    @property
    def _family(self) -> Family:
        return FAMILIES[self.update.family]

    @property
    def _partial(self) -> frozenset[str]:
        """Roles of which the plan counts a tile's part only."""
        family = self._family
        return (family.by_columns if self.update.by_columns else family.by_rows) | family.streamed

    def whole(self, role: str) -> Tensor:
        if self.in_parts and not self.update.experts:
            assert role not in self._partial, f"{self.update.family} reads {role} whole, but declares it read in parts"
        return self._made(self._read(role))

    def as_stored(self, role: str) -> Tensor:
        assert role in self._family.as_stored, role
        return self._read(role)

    def rows(self, role: str, rows: RowRange) -> Tensor:
        return self._made(self._read(role)[rows.start : rows.stop])

    def columns(self, role: str, columns: RowRange) -> Tensor:
        return self._made(self._read(role).flatten(1)[:, columns.start : columns.stop])

    def kept(self, name: str, build: Callable[[], Tensor]) -> Tensor:
        if name not in self.built:
            assert self._family.builds or self.in_prepass, f"{self.update.family} builds {name}, undeclared"
            self.built[name] = build()
        return self.built[name]

    @property
    def kept_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.built.values())


@dataclass(frozen=True)
class Subject:
    """An update, and W as the family sees it: its matrix, or one expert's."""

    update: Update
    weight: Tensor

    @property
    def family(self) -> Family:
        return FAMILIES[self.update.family]

    @property
    def whole(self) -> list[Window]:
        return [Window(RowRange(0, self.update.rows), RowRange(0, self.update.columns))]

    def windows(self, parts: int) -> list[Window]:
        """Even tiles in so many parts, of whole groups and at least 16 rows; of columns where tiles hold those."""
        unit = 1 if self.update.by_columns else self.family.row_unit(self.update)
        size = self.update.columns if self.update.by_columns else self.update.rows
        parts = max(1, min(parts, size // max(16, unit)))
        spans = [RowRange(part.start * unit, part.stop * unit) for part in even_rows(size // unit, parts)]
        (everything,) = self.whole
        if self.update.by_columns:
            return [Window(everything.rows, span) for span in spans]
        return [Window(span, everything.columns) for span in spans]

    def applied(self, given: Given, windows: list[Window] | None = None, update: Update | None = None) -> Tensor:
        """W' in the dtype of the factors, window by window; what no window reaches stays W."""
        result = self.weight.to(given.dtype, copy=True)
        update, windows = update or self.update, windows or self.whole
        if self.family.needs_prepass(update):
            given.in_prepass = True
            for window in windows:
                tile = _tile(result, window).clone()
                self.family.prepass(tile, given, update, window, torch.empty_like(tile))
        given.in_prepass = False
        for window in windows:
            tile = _tile(result, window).clone()
            self.family.apply(tile, given, update, window, torch.empty_like(tile))
            _tile(result, window).copy_(tile)
        return result


def _tile(matrix: Tensor, window: Window) -> Tensor:
    return matrix[window.rows.start : window.rows.stop, window.columns.start : window.columns.stop]


@cache
def subjects(name: str) -> tuple[Subject, ...]:
    """The first update of every family and parameter in a case of `device_cases`."""
    plan = shardmerge.plan(config_of(name, Path("/nowhere/out")))
    return tuple(first_of_each((tensor.source, update) for tensor, update in plan.updates()))


def first_of_each(updates: Iterator[tuple[TensorRef, Update]]) -> Iterator[Subject]:
    seen = set()
    for source, update in updates:
        key = update.family, update.parameter, update.by_columns
        if key in seen or update.region.shuffle or update.region.start or update.region.stored_start:
            continue
        seen.add(key)
        fits = source.shape == (update.shape[::-1] if update.by_columns else update.shape)
        weight = read(source).float() if fits and not update.experts else random(update.rows, update.columns, seed=3)
        if fits and not update.experts:
            weight = weight.t() if update.by_columns else weight
        yield Subject(update, weight.reshape(update.rows, update.columns).contiguous())
