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
from shardmerge.execution.jobs import Job, jobs
from shardmerge.sources import local
from shardmerge.spec.plans import ShardPlan, TensorPlan
from shardmerge.spec.tensors import BUFFER_SLACK, DTYPE_BITS, PAGE, TensorInfo
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
BUFFER = 4 * PAGE


def shard_of(*tensors: TensorPlan, header_bytes: int = 80) -> ShardPlan:
    return ShardPlan("s", (), tensors, header_bytes, sum(tensor.out.nbytes for tensor in tensors))


def assert_fits(job: Job, header_bytes: int) -> None:
    """Whole pages around what is read, encoded and written are within a buffer, and pages are those of the files."""
    assert job.write_at == (header_bytes + job.write_offset) % PAGE
    for place, size in ((job.read_at, job.read_bytes), (job.write_at, job.write_bytes)):
        assert place >= 0 and -(-(place + size) // PAGE) * PAGE <= BUFFER + BUFFER_SLACK


@untimed
@given(st.integers(1, 900), st.integers(1, 40), FLOATS, FLOATS, st.integers(0, 10**6), st.integers(0, 10**6))
def test_tiles(rows: int, columns: int, source: str, out: str, read_offset: int, write_offset: int) -> None:
    read_item, write_item = (DTYPE_BITS[dtype] // 8 for dtype in (source, out))
    ref = dataclasses.replace(refs_of({"w": (rows, columns)}, source)["w"], offset=read_offset)
    size = rows * columns * write_item
    tensor = TensorPlan(ref, TensorInfo(out, (rows, columns), (write_offset, write_offset + size)), tiles=rows)
    read, written = read_offset, write_offset
    for job in jobs(shard_of(tensor), BUFFER):
        assert (job.read_offset, job.write_offset) == (read, written)
        read, written = read + job.read_bytes, written + job.write_bytes
        assert_fits(job, 80)
        assert job.read_at % read_item == 0 and job.encode_at % write_item == 0
        if read_offset % read_item == 0:
            assert job.read_at % PAGE == job.read_offset % PAGE
        assert 0 <= job.encode_at - job.write_at < 8
        assert -(-(job.encode_at + job.write_bytes) // PAGE) * PAGE <= BUFFER + BUFFER_SLACK
    assert (read, written) == (read_offset + ref.nbytes, write_offset + size)


@untimed
@given(st.integers(1, 10**5), st.integers(0, 10**6), st.integers(0, 10**6))
def test_bytes_that_travel_as_they_are(size: int, read_offset: int, write_offset: int) -> None:
    ref = dataclasses.replace(refs_of({"w": (size,)}, "U8")["w"], offset=read_offset)
    tensor = TensorPlan(ref, TensorInfo("U8", (size,), (write_offset, write_offset + size)))
    done = 0
    for job in jobs(shard_of(tensor, header_bytes=1000), BUFFER):
        assert (job.read_offset, job.write_offset) == (read_offset + done, write_offset + done)
        assert job.read_bytes == job.write_bytes and job.tensor is None
        assert_fits(job, 1000)
        assert job.read_at == job.read_offset % PAGE
        done += job.read_bytes
        assert done == size or (1000 + write_offset + done) % PAGE == 0  # whole pages of the output stay whole
    assert done == size


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
