"""Where a job's bytes lie in a buffer: as direct I/O wants them, within the buffer, and output never over input."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardmerge.destinations import shard_writer
from shardmerge.execution.jobs import Job, positions
from shardmerge.sources import local
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import BUFFER_SLACK, DTYPE_BITS, PAGE, TensorInfo, even_rows
from tests.support.builders import refs_of, untimed
from tests.support.peft_oracle import (
    Base,
    Lora,
    adapter_folder,
    assert_same_bits,
    base_folder,
    least_memory,
    make_config,
    merge_to,
    random,
    stored,
    weight_bytes,
    write_adapter,
    write_base,
)

FLOATS = st.sampled_from(["F32", "F16", "BF16"])


@untimed
@given(st.integers(1, 900), st.integers(1, 40), FLOATS, FLOATS, st.integers(0, 10**6), st.integers(0, 10**6))
def test_tiles(rows: int, columns: int, source: str, out: str, read_offset: int, write_offset: int) -> None:
    read_row, write_row = (columns * DTYPE_BITS[dtype] // 8 for dtype in (source, out))
    ref = dataclasses.replace(refs_of({"w": (rows, columns)}, source)["w"], offset=read_offset)
    tensor = TensorPlan(ref, TensorInfo(out, (rows, columns), (write_offset, write_offset + rows * write_row)))
    tiles = tuple(even_rows(rows, max(1, rows // 16)))
    job = Job("f", read_offset, rows * read_row, write_offset, rows * write_row, tensor, tiles)
    at = positions(job, data_start=80)
    buffer = max(rows * read_row, rows * write_row) + BUFFER_SLACK
    assert at.write == (80 + write_offset) % PAGE
    if read_offset % (DTYPE_BITS[source] // 8) == 0:
        assert at.read % PAGE == read_offset % PAGE
    assert at.read % (DTYPE_BITS[source] // 8) == 0 and at.work % (DTYPE_BITS[out] // 8) == 0
    assert 0 <= at.work - at.write < 8
    # Whole pages around what is read and written are within the buffer.
    for place, size in ((at.read, job.read_bytes), (at.write, job.write_bytes), (at.work, job.write_bytes)):
        assert place >= 0 and -(-(place + size) // PAGE) * PAGE <= buffer
    for tile in tiles:
        written, unread = at.work + tile.stop * write_row, at.read + tile.stop * read_row
        assert tile is tiles[-1] or written <= unread


@untimed
@given(st.integers(1, 10**5), st.integers(0, 10**6), st.integers(0, 10**6))
def test_bytes_that_travel_as_they_are(size: int, read_offset: int, write_offset: int) -> None:
    at = positions(Job("f", read_offset, size, write_offset, size), data_start=1000)
    assert at.write == (1000 + write_offset) % PAGE and at.read % PAGE == read_offset % PAGE
    assert at.read >= at.write and -(-(at.read + size) // PAGE) * PAGE <= size + BUFFER_SLACK
    if read_offset % PAGE == (1000 + write_offset) % PAGE:
        assert at.read == at.write  # nothing is moved


@pytest.fixture
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (local, shard_writer):
        monkeypatch.setattr(module, "open_direct", lambda path, flags, dir_fd=None: -1)


@pytest.mark.parametrize(
    "options", [{}, {"dtype": "float32"}, {"dtype": "float16"}, {"max_shard_size": "30kB"}], ids=str
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_same_bytes_past_the_cache_and_through_it(
    tmp_path: Path, dtype: str, options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    base = Base(dtype=dtype, hidden=72, intermediate=203, max_shard_size=40_000)
    folders = base_folder(base), adapter_folder(base, Lora())
    least = least_memory(make_config(tmp_path / "x", folders[0], folders[1:], **options))
    merge_to(tmp_path / "direct", *folders, **options)
    merge_to(tmp_path / "direct-small", *folders, **options, max_memory=least)
    request.getfixturevalue("buffered")
    merge_to(tmp_path / "buffered", *folders, **options)
    wanted = weight_bytes(tmp_path / "buffered")
    assert weight_bytes(tmp_path / "direct") == wanted == weight_bytes(tmp_path / "direct-small")


def test_tensors_that_lie_at_odd_places(tmp_path: Path) -> None:
    """safetensors does not promise that a float lies at a multiple of its size."""
    odd = {"a": torch.ones(3, dtype=torch.uint8), "z": torch.zeros(5, dtype=torch.int8)}
    tensors = {**odd, "m.weight": random(40, 24, seed=1)}
    base = write_base(tmp_path / "base", [tensors])
    file = base / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    # One space more than the library would write moves all data to odd places.
    moved = (length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :]
    adapter = write_adapter(tmp_path / "adapter", {"m": (random(4, 24, seed=2), random(40, 4, seed=3))})
    merge_to(tmp_path / "even", base, adapter)
    shutil.copytree(base, tmp_path / "odd-base")
    (tmp_path / "odd-base" / "model.safetensors").write_bytes(moved)
    merge_to(tmp_path / "odd", tmp_path / "odd-base", adapter)
    assert_same_bits(stored(tmp_path / "odd"), stored(tmp_path / "even"))
