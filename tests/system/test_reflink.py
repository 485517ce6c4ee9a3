"""What a merge does not write, as the file system shares the base's blocks: the bytes are the same.

The file system is pretended, by an ioctl that copies or refuses; and it is a real btrfs and a real XFS, in an image,
where one can be made and mounted.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import shardmerge
from shardmerge import OutputError
from shardmerge.destinations import shard_writer as writer_module
from shardmerge.errors import ChangedError
from shardmerge.file_formats import safetensors_header
from shardmerge.sources.inline import inline_file
from shardmerge.sources.source import open_reader
from shardmerge.spec.plans import ShardPlan, TensorPlan
from shardmerge.spec.tensors import PAGE, TensorInfo, TensorRef
from shardmerge.system import reflink
from tests.support.builders import shard_writer, untimed
from tests.support.peft_oracle import merge_to, random, write_adapter, write_base

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="FICLONERANGE is Linux'")
MB = 1 << 20
SIZE = 40 * PAGE + 77
DATA = Random(1).randbytes(SIZE)


@dataclass
class Pretended:
    """FICLONERANGE by copying, or refused: where the file system is asked for the first time, and later on."""

    code: int = 0
    asked: int = 0
    before: Callable[[], None] = lambda: None
    #: Offset in the source, length, offset in the output.
    calls: list[tuple[int, int, int]] = field(default_factory=list)

    def ioctl(self, descriptor: int, request: int, argument: bytes) -> int:
        assert request == 0x4020940D and len(argument) == 32
        source, source_offset, size, offset = struct.unpack("=qQQQ", argument)
        if not size:
            assert source == descriptor and os.fstat(descriptor).st_size == 0
            if self.asked:
                raise OSError(self.asked, os.strerror(self.asked))
            return 0
        self.before()
        self.calls.append((source_offset, size, offset))
        assert not (source_offset | size | offset) % PAGE
        if self.code:
            raise OSError(self.code, os.strerror(self.code))
        data = os.pread(source, size, source_offset)
        assert len(data) == size == os.pwrite(descriptor, data, offset)
        return 0


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    pretended = Pretended()
    monkeypatch.setattr(fcntl, "ioctl", pretended.ioctl)
    # Whether the tests' own file system has direct I/O does not matter here.
    monkeypatch.setattr(writer_module, "open_direct", os.open)
    return pretended


@dataclass(frozen=True)
class Verbatim:
    """A file with bytes of which a shard is made, as they are, from ``offset`` on."""

    path: Path
    offset: int
    data: bytes

    @property
    def shard(self) -> ShardPlan:
        out = TensorInfo("U8", (len(self.data),), (0, len(self.data)))
        source = TensorRef("w", str(self.path), out.dtype, out.shape, self.offset, len(self.data))
        head = len(safetensors_header.encode((), {"w": out}))
        return ShardPlan("model.safetensors", (), (TensorPlan(source, out),), head, len(self.data))

    def expected(self) -> bytes:
        shard = self.shard
        return safetensors_header.encode((), {"w": shard.tensors[0].out}, shard.header_bytes) + self.data


def verbatim(folder: Path, shift: int = 0, data: bytes = DATA) -> Verbatim:
    """Bytes that lie ``shift`` bytes away from where they lie in the output within a page."""
    head = Verbatim(folder, 0, data).shard.header_bytes
    path = folder / "base"
    path.write_bytes(b"\xaa" * (head + shift) + data)
    return Verbatim(path, head + shift, data)


def write(target: Path, of: Verbatim, sizes: list[int], shared: Callable[[int], bool] = lambda number: True) -> bytes:
    """Write a shard in blocks of these sizes, the last with the rest; those that are ``shared`` have a source."""
    shard, data = of.shard, of.data
    memory = memoryview(bytearray(len(data) + 3 * PAGE))
    descriptor = os.open(of.path, os.O_RDONLY)
    try:
        with shard_writer(target, shard) as writer:
            done = number = 0
            while done < len(data):
                size = min(sizes[number] if number < len(sizes) else len(data), len(data) - done)
                position = (shard.header_bytes + done) % PAGE
                memory[position : position + size] = data[done : done + size]
                source = (descriptor, of.offset + done) if shared(number) else None
                writer.write_block(memory, position, done, size, source)
                done, number = done + size, number + 1
            writer.commit()
    finally:
        os.close(descriptor)
    assert writer.checksums.hex()["xxh3_128"] == xxhash.xxh3_128_hexdigest(of.expected())
    return target.read_bytes()


# --- the writer -------------------------------------------------------------------------------------------------------


def test_any_blocks(tmp_path: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reflink, "LEAST", PAGE)
    blocks = st.lists(st.tuples(st.integers(1, 4 * PAGE), st.booleans()), max_size=12)

    @untimed
    @given(blocks, st.integers(0, SIZE), st.sampled_from([0, 0, PAGE, 1]))
    def check(blocks: list[tuple[int, bool]], size: int, shift: int) -> None:
        of = verbatim(tmp_path, shift, DATA[:size])
        sizes = [size for size, _ in blocks]
        assert write(tmp_path / "s", of, sizes, lambda n: n >= len(blocks) or blocks[n][1]) == of.expected()

    check()
    assert pretended.calls


def test_whole_pages_are_shared_and_the_ends_are_written(
    tmp_path: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = verbatim(tmp_path, 3 * PAGE)
    written, real = [], os.pwrite

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        if not isinstance(data, bytes):  # which the pretended ioctl writes
            written.append((offset, len(data)))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert write(tmp_path / "s", of, [20 * PAGE - of.shard.header_bytes]) == of.expected()
    last = len(of.expected()) // PAGE * PAGE
    assert pretended.calls == [(4 * PAGE, 19 * PAGE, PAGE), (23 * PAGE, last - 20 * PAGE, 20 * PAGE)]
    assert written == [(0, PAGE), (last, len(of.expected()) - last)]


def test_only_bytes_at_the_same_place_within_a_page_can_be_shared(tmp_path: Path, pretended: Pretended) -> None:
    of = verbatim(tmp_path, 8)
    assert write(tmp_path / "s", of, [30 * PAGE]) == of.expected()
    assert pretended.calls == []


def test_a_few_bytes_are_written(tmp_path: Path, pretended: Pretended) -> None:
    of = verbatim(tmp_path)
    assert write(tmp_path / "s", of, [reflink.LEAST // 2] * 10) == of.expected()
    assert pretended.calls == []


def test_what_is_in_no_file_is_written(tmp_path: Path, pretended: Pretended) -> None:
    reader = open_reader(inline_file(DATA))
    of = verbatim(tmp_path)
    with shard_writer(tmp_path / "s", of.shard) as writer:
        memory = memoryview(bytearray(SIZE + 3 * PAGE))
        at = of.shard.header_bytes
        memory[at : at + SIZE] = DATA
        writer.write_block(memory, at, 0, SIZE, (reader.fileno(), at))
        writer.commit()
    assert (tmp_path / "s").read_bytes() == of.expected()
    assert pretended.calls == []


REFUSALS = ("EOPNOTSUPP", "EXDEV", "EINVAL", "ETXTBSY", "ENOTTY", "EPERM", "EACCES", "EISDIR", "EBADF", "EIO")


@pytest.mark.parametrize("code", REFUSALS)
def test_a_source_that_is_refused_is_tried_once(tmp_path: Path, code: str, pretended: Pretended) -> None:
    pretended.code = getattr(errno, code)
    of = verbatim(tmp_path)
    assert write(tmp_path / "s", of, [20 * PAGE]) == of.expected()
    assert len(pretended.calls) == 1


@pytest.mark.parametrize("code", ["EOPNOTSUPP", "ENOTTY", "EINVAL", "EIO"])
def test_a_file_system_without_shared_blocks_is_asked_once(tmp_path: Path, code: str, pretended: Pretended) -> None:
    pretended.asked = getattr(errno, code)
    of = verbatim(tmp_path)
    with shard_writer(tmp_path / "s", of.shard) as writer:
        assert not writer.shares
    assert write(tmp_path / "s", of, [20 * PAGE]) == of.expected()
    assert pretended.calls == []


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT"])
def test_where_there_is_no_room_for_sharing_the_next_range_is_tried(
    tmp_path: Path, code: str, pretended: Pretended
) -> None:
    pretended.code = getattr(errno, code)
    of = verbatim(tmp_path)
    assert write(tmp_path / "s", of, [20 * PAGE]) == of.expected()
    assert len(pretended.calls) == 2


@pytest.mark.parametrize("code", ["ENOSPC", "EIO"])
def test_a_full_or_broken_disk_is_told_and_nothing_stays(
    tmp_path: Path, code: str, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended.code = getattr(errno, code)

    def pwrite(descriptor: int, data: memoryview, offset: int) -> int:
        raise OSError(pretended.code, os.strerror(pretended.code))

    monkeypatch.setattr(os, "pwrite", pwrite)
    of = verbatim(tmp_path)
    with pytest.raises(OutputError, match=re.escape(os.strerror(pretended.code))):
        write(tmp_path / "s", of, [])
    assert len(pretended.calls) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# --- whole merges -----------------------------------------------------------------------------------------------------

TARGETS = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


def tensors() -> dict[str, Tensor]:
    wide = {f"model.layers.{layer}.mlp.up_proj.weight": random(512, 1024, seed=layer) for layer in range(2)}
    merged = {f"{target}.weight": random(120, 1024, seed=8 + layer) for layer, target in enumerate(TARGETS)}
    odd = {
        "model.norm.weight": random(1027, seed=20, dtype=torch.bfloat16),
        "lm_head.weight": random(700, 1024, seed=21),
    }
    return wide | merged | odd


def make(folder: Path) -> tuple[Path, Path]:
    factors = random(2, 1024, seed=30), random(120, 2, seed=31)
    base = write_base(folder / "base", [tensors()])
    return base, write_adapter(folder / "adapter", dict.fromkeys(TARGETS, factors))


def weights(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", ["same", "float16"])
def test_a_merge_has_the_same_bytes(tmp_path: Path, dtype: str, pretended: Pretended) -> None:
    base, adapter = make(tmp_path)
    merge_to(tmp_path / "shared", base, adapter, dtype=dtype)
    calls, pretended.asked = list(pretended.calls), errno.EOPNOTSUPP
    merge_to(tmp_path / "written", base, adapter, dtype=dtype)
    assert pretended.calls == calls
    assert weights(tmp_path / "shared") == weights(tmp_path / "written")
    assert shardmerge.verify(tmp_path / "shared").raise_for_status().ok
    if dtype != "same":
        assert calls == []
        return
    # Of three large runs no more than their ends are written, though each takes several blocks.
    untouched = sum(value.nbytes for name, value in tensors().items() if "down_proj" not in name)
    assert sum(size for _, size, _ in calls) >= untouched - 3 * (reflink.LEAST + PAGE)
    ends = {offset + size for _, size, offset in calls}
    assert len(calls) > 6 and sum(offset not in ends for _, _, offset in calls) == 3


def test_a_base_that_changes_while_it_is_shared_stops_the_merge(tmp_path: Path, pretended: Pretended) -> None:
    base, adapter = make(tmp_path)

    def change() -> None:
        with open(base / "model.safetensors", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"!")

    pretended.before = change
    with pytest.raises(ChangedError, match="written again"):
        merge_to(tmp_path / "out", base, adapter)
    assert not (tmp_path / "out" / "model.safetensors").exists()


# --- real file systems ------------------------------------------------------------------------------------------------

MAKERS = {"xfs": ("mkfs.xfs", "-q", "-m", "reflink=1"), "btrfs": ("mkfs.btrfs", "-q")}


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{command[0]}: {(done.stderr or done.stdout).strip()}")


@pytest.fixture(params=MAKERS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """An empty file system of 320 MB."""
    kind = request.param
    for tool in (MAKERS[kind][0], "mount", "umount", "filefrag"):
        if not shutil.which(tool):
            pytest.skip(f"needs {tool}")
    if os.geteuid():
        pytest.skip("only root can mount an image")
    image, place = tmp_path / "image", tmp_path / "disk"
    place.mkdir()
    with open(image, "wb") as file:
        file.truncate(320 * MB)
    _run(*MAKERS[kind], str(image))
    _run("mount", "-t", kind, "-o", "loop", str(image), str(place))
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def used(disk: Path) -> int:
    os.sync()
    status = os.statvfs(disk)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def shared_bytes(path: Path) -> int:
    """Of a file, what another file has, too."""
    listed = subprocess.run(["filefrag", "-v", path], capture_output=True, text=True, check=True).stdout
    return sum(int(pages) * PAGE for pages in re.findall(r"^ *\d+: .*: +(\d+): .*\bshared\b", listed, re.MULTILINE))


def test_a_merge_shares_what_it_does_not_change(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = make(disk)  # nothing of which is on the disk itself yet
    before = used(disk)
    merge_to(disk / "shared", base, adapter)
    grown = used(disk) - before
    size = len(weights(disk / "shared"))
    touched = sum(value.nbytes for name, value in tensors().items() if "down_proj" in name)
    assert shared_bytes(disk / "shared" / "model.safetensors") >= size - touched - 2 * reflink.LEAST
    assert grown < touched + MB < size / 2
    monkeypatch.setattr(reflink, "can_share", lambda descriptor: False)
    merge_to(disk / "written", base, adapter)
    assert shared_bytes(disk / "written" / "model.safetensors") == 0
    assert weights(disk / "shared") == weights(disk / "written")
    assert shardmerge.verify(disk / "shared").raise_for_status().ok


def test_a_base_on_another_file_system_is_copied(disk: Path, tmp_path: Path) -> None:
    base, adapter = make(tmp_path)
    merge_to(disk / "out", base, adapter)
    merge_to(tmp_path / "out", base, adapter)
    assert weights(disk / "out") == weights(tmp_path / "out")
    assert shared_bytes(disk / "out" / "model.safetensors") == 0


def test_a_disk_that_is_nearly_full(disk: Path) -> None:
    """XFS then shares only a part, or nothing: the rest is written."""
    of = verbatim(disk, 0, Random(2).randbytes(40 * MB))
    os.sync()
    with open(disk / "filler", "wb") as file, suppress(OSError):
        while os.statvfs(disk).f_bavail * PAGE > 60 * MB:
            file.write(bytes(8 * MB))
            os.fsync(file.fileno())
    assert write(disk / "s", of, [4 * MB] * 10) == of.expected()


def test_the_base_may_go_and_may_change(disk: Path) -> None:
    of = verbatim(disk)
    write(disk / "s", of, [])
    with open(of.path, "r+b") as file:
        file.seek(of.offset + 10 * PAGE)
        file.write(b"?" * 3 * PAGE)
        os.fsync(file.fileno())
    assert (disk / "s").read_bytes() == of.expected()
    of.path.unlink()
    os.sync()
    assert (disk / "s").read_bytes() == of.expected()
