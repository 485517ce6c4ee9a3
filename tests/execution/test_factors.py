"""Factors are read when they are asked for, once where they are kept, and of those that go by rows only the rows."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shardmerge.errors import NonFiniteError
from shardmerge.execution import factors as factors_module
from shardmerge.execution.devices import Device
from shardmerge.execution.factors import LazyFactors, UpdateFactors
from shardmerge.file_formats.adapter_opening import open_adapter
from shardmerge.file_formats.torch_pickle import read_pickled
from shardmerge.sources.local import LocalReader, LocalSource
from shardmerge.sources.source import Reader
from shardmerge.spec.tensors import ALIGNMENT, RowRange, SourceFile, TensorRef, even_rows
from shardmerge.spec.updates import Update
from tests.support.builders import update_of
from tests.support.peft_oracle import random, write_adapter

OUT, IN, RANK = 70, 23, 4
A, B = random(RANK, IN, seed=1), random(OUT, RANK, seed=2)
A2, B2 = random(RANK, IN, seed=3), random(OUT, RANK, seed=4)
#: A dtype of the file, and how its numbers compare with those that were put into it.
STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CPU = Device()


@dataclass
class CountingReader(Reader):
    """A reader that notes what it was asked for."""

    inner: Reader
    reads: list[tuple[int, int]] = field(default_factory=list)

    def read_into(self, offset: int, view: memoryview) -> None:
        self.reads.append((offset, len(view)))
        self.inner.read_into(offset, view)

    def read_block(self, memory: memoryview, position: int, offset: int, size: int) -> None:
        self.inner.read_block(memory, position, offset, size)

    def fileno(self) -> int:
        return self.inner.fileno()

    def check(self) -> None:
        self.inner.check()

    def close(self) -> None:
        self.inner.close()


class Opened:
    """An adapter file of two targets, seen through one `CountingReader`."""

    def __init__(self, path: Path, refs: list[tuple[TensorRef, TensorRef]]) -> None:
        status = path.stat()
        self.reader = CountingReader(LocalReader(SourceFile(str(path), status.st_size, status.st_mtime_ns)))
        self.uris: list[str] = []
        self.loader = LazyFactors(self._get, CPU)
        self.updates = [
            update_of(f"module{number}.weight", (OUT, IN), (("A", a), ("B", b)), adapter=number)
            for number, (a, b) in enumerate(refs)
        ]

    def of(self, update: Update, dtype: torch.dtype = torch.float32) -> UpdateFactors:
        """The factors of the only update of a target."""
        return self.loader.begin([update], [dtype])[id(update)]

    def _get(self, uri: str) -> Reader:
        self.uris.append(uri)
        return self.reader

    def taken(self) -> list[tuple[int, int]]:
        reads, self.reader.reads = self.reader.reads, []
        return reads


def open_safetensors(folder: Path, stored: torch.dtype) -> Opened:
    modules = {"module0": (A.to(stored), B.to(stored)), "module1": (A2.to(stored), B2.to(stored))}
    path, tensors = adapter_file(folder, modules)
    return Opened(path, [_pair(tensors, name) for name in modules])


def adapter_file(folder: Path, modules: dict[str, tuple[Tensor, Tensor]]) -> tuple[Path, Mapping[str, TensorRef]]:
    write_adapter(folder / "adapter", modules)
    adapter = open_adapter(LocalSource(str(folder / "adapter")))
    return Path(adapter.file.uri), adapter.tensors


def _pair(tensors: Mapping[str, TensorRef], module: str) -> tuple[TensorRef, TensorRef]:
    prefix = f"base_model.model.{module}.lora_"
    return tensors[f"{prefix}A.weight"], tensors[f"{prefix}B.weight"]


def open_one(folder: Path, b: Tensor) -> Opened:
    path, tensors = adapter_file(folder, {"module0": (A, b)})
    return Opened(path, [_pair(tensors, "module0")])


def open_pickle(folder: Path, stored: torch.dtype, layout: str) -> Opened:
    """``transposed``: A (in, r) and B (r, out) as pure PyTorch has them; ``views``: parts of one wider storage."""
    path = folder / "a.pt"
    tensors: dict[str, Tensor] = {}
    for number, (a, b) in enumerate([(A, B), (A2, B2)]):
        for role, tensor in (("A", a.to(stored)), ("B", b.to(stored))):
            if layout == "transposed":
                tensor = tensor.T.contiguous()
            if layout == "views":
                wide = torch.full((tensor.shape[0] * 2, tensor.shape[1] * 3), 9.0, dtype=stored)
                wide[1::2, 2::3] = tensor
                tensor = wide[1::2, 2::3]
            tensors[f"module{number}.{role}"] = tensor
    torch.save(tensors, path)
    refs = read_pickled(path, str(path))
    pairs = [(refs[f"module{number}.A"], refs[f"module{number}.B"]) for number in range(2)]
    if layout == "transposed":
        pairs = [(a.transposed(), b.transposed()) for a, b in pairs]
    return Opened(path, pairs)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Factors count as large ones, of which only what is needed is read."""
    monkeypatch.setattr(factors_module, "KEPT_WHOLE_BYTES", 0)


@pytest.fixture(params=list(STORED))
def stored(request: pytest.FixtureRequest) -> torch.dtype:
    return STORED[request.param]


# --- dense files ------------------------------------------------------------------------------------------------------


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    opened = open_safetensors(tmp_path, torch.float32)
    opened.loader.active.clear()
    opened.of(opened.updates[0])
    assert opened.uris == [] and opened.taken() == []


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("tiles", [1, 3, 4, OUT])
def test_of_b_only_the_rows_of_a_tile_are_read(tiles: int, stored: torch.dtype, tmp_path: Path) -> None:
    opened = open_safetensors(tmp_path, stored)
    update = opened.updates[0]
    ref, row = update.factor("B"), RANK * stored.itemsize
    for rows in even_rows(OUT, tiles):
        found = opened.of(update).rows("B", rows)
        assert torch.equal(found, B.to(stored).float()[rows.start : rows.stop])
        assert opened.taken() == [(ref.offset + rows.start * row, len(rows) * row)]


@pytest.mark.parametrize("tiles", [1, 3, 4, OUT])
def test_a_small_b_is_read_once(tiles: int, stored: torch.dtype, tmp_path: Path) -> None:
    opened = open_safetensors(tmp_path, stored)
    update = opened.updates[0]
    for rows in even_rows(OUT, tiles):
        found = opened.of(update).rows("B", rows)
        assert torch.equal(found, B.to(stored).float()[rows.start : rows.stop])
        assert found.data_ptr() % ALIGNMENT == 0
    ref = update.factor("B")
    assert opened.taken() == [(ref.offset, ref.nbytes)]


def test_a_is_read_once_a_target(stored: torch.dtype, tmp_path: Path) -> None:
    opened = open_safetensors(tmp_path, stored)
    for number, wanted in enumerate((A, A2)):
        update = opened.updates[number]
        for _ in range(5):
            assert torch.equal(opened.of(update).whole("A"), wanted.to(stored).float())
        ref = update.factor("A")
        assert opened.taken() == [(ref.offset, ref.nbytes)]


def test_both_adapters_of_one_target_keep_their_a(tmp_path: Path) -> None:
    opened = open_safetensors(tmp_path, torch.float32)
    first, second = opened.updates
    second = update_of(first.target, (OUT, IN), second.factors, adapter=1)
    of = opened.loader.begin([first, second], [torch.float32] * 2)
    for _ in range(4):
        assert torch.equal(of[id(first)].whole("A"), A)
        assert torch.equal(of[id(second)].whole("A"), A2)
    assert len(opened.taken()) == 2


def test_nothing_is_kept_after_the_target_has_changed(tmp_path: Path) -> None:
    opened = open_safetensors(tmp_path, torch.float32)
    first, second = opened.updates
    kept = weakref.ref(opened.of(first).whole("A"))
    rows = weakref.ref(opened.of(first).rows("B", RowRange(0, 20)))
    gc.collect()
    assert kept() is not None and rows() is None
    opened.of(second)
    gc.collect()
    assert kept() is None
    opened.taken()
    opened.of(first).whole("A")
    assert len(opened.taken()) == 1


def test_what_the_next_target_needs_too_is_kept(tmp_path: Path) -> None:
    opened = open_safetensors(tmp_path, torch.float32)
    first, second = opened.updates
    sibling = update_of("sibling.weight", (OUT, IN), first.factors)
    assert torch.equal(opened.of(first).whole("A"), A) and torch.equal(opened.of(sibling).whole("A"), A)
    assert len(opened.taken()) == 1
    opened.of(second)
    assert torch.equal(opened.of(first).whole("A"), A)
    assert len(opened.taken()) == 1


def test_another_compute_dtype_reads_again(tmp_path: Path) -> None:
    opened = open_safetensors(tmp_path, torch.float32)
    for dtype in (torch.float32, torch.float64):
        assert opened.of(opened.updates[0], dtype).whole("A").dtype == dtype


@pytest.mark.parametrize(("room", "reads"), [(A.nbytes + B.nbytes, 4), (B.nbytes, 6), (0, 8)])
def test_factors_as_stored_stay_while_there_is_room(room: int, reads: int, stored: torch.dtype, tmp_path: Path) -> None:
    """Targets take turns, as experts of a layer do. Where only one B has room, both A are read again."""
    opened = open_safetensors(tmp_path, stored)
    opened.loader = LazyFactors(opened._get, CPU, room * stored.itemsize // 4)
    for _ in range(2):
        for update, a, b in zip(opened.updates, (A, A2), (B, B2), strict=True):
            factors = opened.of(update)
            for role, wanted in (("A", a), ("B", b)):
                for _ in range(2):
                    found = factors.as_stored(role)
                    assert found.dtype == stored and torch.equal(found, wanted.to(stored))
    assert len(opened.taken()) == reads


def test_a_factor_as_stored_is_checked_and_tells_that_it_acts(tmp_path: Path) -> None:
    opened = open_safetensors(tmp_path, torch.float32)
    opened.of(opened.updates[0]).as_stored("B")
    assert opened.loader.active == {0}
    b = B.clone()
    b[47, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"lora_B\.weight holds nan at \[47, 3\]"):
        bad = open_one(tmp_path / "bad", b)
        bad.of(bad.updates[0]).as_stored("B")


@pytest.mark.parametrize("compute", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_factors_come_in_the_compute_dtype(compute: torch.dtype, stored: torch.dtype, tmp_path: Path) -> None:
    opened = open_safetensors(tmp_path, stored)
    factors = opened.of(opened.updates[0], compute)
    for found, wanted in ((factors.whole("A"), A), (factors.rows("B", RowRange(3, 60)), B[3:60])):
        assert found.dtype == compute and found.is_contiguous()
        assert torch.equal(found, wanted.to(stored).to(compute))


# --- files whose rows lie apart ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["transposed", "views"])
@pytest.mark.parametrize("tiles", [1, 3, OUT])
def test_a_strided_factor_is_read_once_and_given_by_rows(
    tiles: int, layout: str, stored: torch.dtype, tmp_path: Path
) -> None:
    opened = open_pickle(tmp_path, stored, layout)
    for number, (a, b) in enumerate([(A, B), (A2, B2)]):
        update = opened.updates[number]
        for rows in even_rows(OUT, tiles):
            factors = opened.of(update)
            found = factors.rows("B", rows)
            assert found.is_contiguous() and torch.equal(found, b.to(stored).float()[rows.start : rows.stop])
            assert torch.equal(factors.whole("A"), a.to(stored).float())
        expected = {(ref.offset, ref.nbytes) for _, ref in update.factors}
        reads = opened.taken()
        assert len(reads) == 2 and set(reads) == expected


@pytest.mark.parametrize("layout", ["transposed", "views"])
def test_of_a_strided_factor_nothing_is_kept_after_the_target_has_changed(layout: str, tmp_path: Path) -> None:
    opened = open_pickle(tmp_path, torch.float32, layout)
    first, second = opened.updates
    opened.of(first).rows("B", RowRange(0, 20))
    opened.taken()
    opened.of(second)
    opened.of(first).rows("B", RowRange(20, 40))
    assert len(opened.taken()) == 1


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_the_row_of_a_bad_value_counts_from_the_start_of_the_factor(value: float, tmp_path: Path) -> None:
    b = B.clone()
    b[47, 3] = value
    opened = open_one(tmp_path, b)
    factors = opened.of(opened.updates[0])
    factors.rows("B", RowRange(0, 47))
    factors.rows("B", RowRange(48, OUT))
    with pytest.raises(NonFiniteError, match=rf"lora_B\.weight holds {value} at \[47, 3\]"):
        factors.rows("B", RowRange(40, 60))


def test_an_adapter_is_active_when_a_small_b_is_not_zero_somewhere(tmp_path: Path) -> None:
    b = torch.zeros(OUT, RANK)
    opened = open_one(tmp_path, b)
    opened.of(opened.updates[0]).rows("B", RowRange(0, 50))
    assert opened.loader.active == set()
    b[50, 1] = -1e-30
    opened = open_one(tmp_path / "other", b)
    opened.of(opened.updates[0]).rows("B", RowRange(0, 50))
    assert opened.loader.active == {0}


@pytest.mark.usefixtures("large")
def test_an_adapter_is_active_when_some_row_of_b_that_was_read_is_not_zero(tmp_path: Path) -> None:
    b = torch.zeros(OUT, RANK)
    b[50, 1] = -1e-30
    opened = open_one(tmp_path, b)
    loader, update = opened.loader, opened.updates[0]
    loader.active.clear()
    opened.of(update).whole("A")
    opened.of(update).rows("B", RowRange(0, 50))
    assert loader.active == set()
    opened.of(update).rows("B", RowRange(50, 60))
    assert loader.active == {0}
    loader.active.clear()
    assert loader.active == set()
