"""Shards are written block by block, past the page cache where that can be had: the bytes are the same."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from shardmerge import OutputError
from shardmerge.destinations import shard_writer as writer_module
from shardmerge.destinations.shard_writer import ShardWriter
from shardmerge.file_formats import safetensors_header
from shardmerge.spec.plans import ShardPlan, TensorPlan
from shardmerge.spec.receipts import Receipt
from shardmerge.spec.tensors import PAGE, TensorInfo
from shardmerge.system.directory import Directory
from tests.support.builders import refs_of, shard_writer, untimed


def shard_of(size: int, header_bytes: int = 0) -> ShardPlan:
    """A shard of one tensor of ``size`` bytes, whose header may be padded."""
    out = TensorInfo("U8", (size,), (0, size))
    tensor = TensorPlan(refs_of({"w": (size,)}, "U8")["w"], out)
    length = len(safetensors_header.encode((), {"w": out}, header_bytes))
    return ShardPlan("model.safetensors", (), (tensor,), length, size)


def write(path: Path, shard: ShardPlan, data: bytes, sizes: list[int]) -> bytes:
    """Write a shard's data in blocks of these sizes, the last one with the rest; what the file then holds."""
    memory = mmap.mmap(-1, -(-len(data) // PAGE) * PAGE + 3 * PAGE)
    with shard_writer(path, shard) as writer, memoryview(memory) as view:
        done = 0
        while done < len(data):
            size = min(sizes.pop() if sizes else len(data), len(data) - done)
            position = (shard.header_bytes + done) % PAGE
            view[position : position + size] = data[done : done + size]
            writer.write_block(view, position, done, size)
            done += size
        writer.commit()
    memory.close()
    return path.read_bytes()


def expected(shard: ShardPlan, data: bytes) -> bytes:
    head = safetensors_header.encode(
        (), {tensor.source.name: tensor.out for tensor in shard.tensors}, shard.header_bytes
    )
    return head + data


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_any_blocks(tmp_path: Path, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not direct:
        monkeypatch.setattr(writer_module, "open_direct", lambda path, flags, dir_fd=None: -1)

    @untimed
    @given(st.integers(0, 5 * PAGE), st.integers(0, 2 * PAGE), st.lists(st.integers(1, 3 * PAGE), max_size=8))
    def check(size: int, header_bytes: int, sizes: list[int]) -> None:
        data, shard = Random(size).randbytes(size), shard_of(size, header_bytes)
        assert write(tmp_path / "s", shard, data, sizes) == expected(shard, data)

    check()


def _failing(real: Any, at: int, code: int) -> Any:
    """pwrite that is refused from its ``at``-th call on a direct descriptor on."""
    calls = [0]

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if os.get_blocking(fd) and _is_direct(fd):
            calls[0] += 1
            if calls[0] > at:
                raise OSError(code, os.strerror(code))
        written: int = real(fd, data, offset)
        return written

    return pwrite


def _is_direct(fd: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_file_system_that_promises_what_it_cannot_do(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, shard = Random(3).randbytes(5 * PAGE + 77), shard_of(5 * PAGE + 77)
    monkeypatch.setattr(os, "pwrite", _failing(os.pwrite, at, errno.EINVAL))
    assert write(tmp_path / "s", shard, data, [PAGE + 5, 2 * PAGE, 100]) == expected(shard, data)


def test_a_full_disk_is_told_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if offset >= PAGE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(OutputError, match="No space left"):
        write(tmp_path / "s", shard_of(5 * PAGE), Random(4).randbytes(5 * PAGE), [])
    assert list(tmp_path.iterdir()) == []


def test_blocks_come_in_order(tmp_path: Path) -> None:
    shard = shard_of(10)
    memory = memoryview(bytearray(2 * PAGE))
    told = pytest.raises(AssertionError, match="byte 5 of the data comes at the place of")
    with shard_writer(tmp_path / "s", shard) as writer, told:
        writer.write_block(memory, (shard.header_bytes + 5) % PAGE, 5, 5)


def test_a_file_that_another_writer_has_begun_anew_is_not_renamed(tmp_path: Path) -> None:
    """A worker whose driver was killed may be at the same shard as that of the next run."""
    shard, memory = shard_of(10), memoryview(bytearray(2 * PAGE))
    with shard_writer(tmp_path / "s", shard) as old, shard_writer(tmp_path / "s", shard) as new:
        for writer in (old, new):
            writer.write_block(memory, shard.header_bytes % PAGE, 0, 10)
        with pytest.raises(OutputError, match="another process writes the same file"):
            old.commit()
        assert not (tmp_path / "s").exists()
        new.commit()
    assert (tmp_path / "s").read_bytes() == expected(shard, bytes(10))


def test_a_receipt_comes_after_the_file(tmp_path: Path) -> None:
    kept: list[tuple[Receipt, bytes]] = []
    shard = shard_of(5)
    with Directory(tmp_path) as folder:

        def keep(receipt: Receipt) -> None:
            kept.append((receipt, (tmp_path / "s").read_bytes()))

        with ShardWriter(folder / "s", shard, True, keep) as writer:
            writer.write_block(memoryview(bytearray(2 * PAGE)), shard.header_bytes % PAGE, 0, 5)
            receipt = writer.commit((1,))
    data = expected(shard, bytes(5))
    checksums = {"xxh3_128": xxhash.xxh3_128_hexdigest(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert kept == [(receipt, data)] and receipt == Receipt("model.safetensors", len(data), checksums, (1,))
