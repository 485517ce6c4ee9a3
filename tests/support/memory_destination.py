"""A destination in this process' memory: what a merge needs of one, without a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from shardmerge.destinations import contents
from shardmerge.destinations.record import RECORD_NAME
from shardmerge.destinations.shard_writer import head_of
from shardmerge.errors import OutputError, ResumeError
from shardmerge.spec.plans import Fingerprint, MergePlan, ShardPlan, digest_of
from shardmerge.spec.receipts import Fidelity, Receipt
from shardmerge.system.checksums import Checksums

SCHEME = "memory"


@dataclass
class Bucket:
    """What a name holds: unfinished work, and the files of the finished model."""

    locked: bool = False
    digest: str = ""
    sha256: bool = False
    shards: dict[str, bytes] = field(default_factory=dict)
    receipts: dict[str, Receipt] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    #: Every shard whose writing was begun.
    written: list[str] = field(default_factory=list)


#: All there is, by location.
BUCKETS: dict[str, Bucket] = {}


class MemoryWriter:
    """See `destination.Writer`. What it says of places in memory and in the file is asserted."""

    shares = False

    def __init__(self, bucket: Bucket, shard: ShardPlan) -> None:
        self._bucket, self._shard = bucket, shard
        self._data = bytearray(head_of(shard))

    def write_block(
        self, memory: memoryview, position: int, offset: int, size: int, source: tuple[int, int] | None = None
    ) -> None:
        start = self._shard.header_bytes + offset
        assert start >= len(self._data), "blocks come in order"
        assert position % 4096 == start % 4096
        self._data += bytes(start - len(self._data)) + memory[position : position + size]

    def commit(self, active: Sequence[int] = (), fidelity: Mapping[str, Fidelity] | None = None) -> Receipt:
        self._data += bytes(self._shard.nbytes - len(self._data))
        checksums = Checksums(self._bucket.sha256)
        checksums.update(bytes(self._data))
        name = self._shard.name
        receipt = Receipt(name, len(self._data), checksums.hex(), tuple(active), fidelity or {})
        self._bucket.shards[name] = bytes(self._data)
        self._bucket.receipts[name] = receipt
        return receipt


@dataclass(frozen=True)
class MemoryHandle:
    """Pickled, it finds the bucket by its name, in this process only."""

    location: str

    @contextmanager
    def writer(self, shard: ShardPlan) -> Iterator[MemoryWriter]:
        bucket = BUCKETS[self.location]
        bucket.written.append(shard.name)
        yield MemoryWriter(bucket, shard)


class MemoryDestination:
    """See `destination.Destination`."""

    def __init__(self, location: str, overwrite: bool) -> None:
        self.location, self.overwrite = location, overwrite
        self._plan: MergePlan | None = None

    @property
    def _bucket(self) -> Bucket:
        return BUCKETS.setdefault(self.location, Bucket())

    def problems(self, plan: MergePlan | None = None) -> list[str]:
        bucket = BUCKETS.get(self.location)
        refused = bucket is not None and bucket.files and not self.overwrite and not bucket.digest
        return [f"output.path {self.location} already holds a finished merge"] if refused else []

    def __enter__(self) -> MemoryDestination:
        if self._bucket.locked:
            raise ResumeError(f"{self.location}: another merge works on it")
        self._bucket.locked = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bucket.locked = False
        if not self._bucket.digest and not self._bucket.files:
            del BUCKETS[self.location]

    def begin(self, plan: MergePlan, fingerprint: Fingerprint) -> dict[str, Receipt]:
        digest, bucket = digest_of(fingerprint), self._bucket
        if bucket.digest not in ("", digest) and not self.overwrite:
            raise ResumeError(f"{self.location}: holds unfinished work on something else")
        if bucket.files and not bucket.digest and not self.overwrite:
            raise ResumeError(f"{self.location}: other work was finished here")
        if bucket.digest != digest:
            bucket.shards, bucket.receipts = {}, {}
        bucket.digest, bucket.sha256, self._plan = digest, plan.sha256, plan
        return {name: receipt for name, receipt in bucket.receipts.items() if name in bucket.shards}

    def check(self, receipt: Receipt, advance: Callable[[int], None]) -> Receipt | None:
        data, checksums = self._bucket.shards[receipt.shard], Checksums(self._bucket.sha256)
        checksums.update(data)
        advance(len(data))
        if checksums.hex()["xxh3_128"] != receipt.checksums["xxh3_128"]:
            return None
        return Receipt(receipt.shard, len(data), checksums.hex(), receipt.active_adapters, receipt.fidelity)

    @property
    def handle(self) -> MemoryHandle:
        return MemoryHandle(self.location)

    def finish(self, record: Mapping[str, Any]) -> None:
        plan, bucket = self._plan, self._bucket
        assert plan is not None
        files, others = {}, {}
        for aux in plan.aux:
            checksums = Checksums(plan.sha256)
            files[aux.name] = b"".join(contents.aux_chunks(aux, checksums))
            others[aux.name] = contents.entry(aux.nbytes, checksums)
        if plan.index_name is not None:
            files[plan.index_name] = contents.index_of(plan)
            others[plan.index_name] = contents.entry_of(files[plan.index_name], plan.sha256)
        files |= {RECORD_NAME: b"".join(contents.record_of(record, others)), **bucket.shards}
        if missing := {*contents.files_of(plan)} - {*files}:
            raise OutputError(f"{self.location}: {', '.join(missing)} was finished, and is no longer there")
        bucket.files = {name: files[name] for name in contents.files_of(plan)}
        bucket.digest, bucket.shards, bucket.receipts = "", {}, {}

    def abort(self) -> None:
        self._bucket.digest, self._bucket.shards, self._bucket.receipts = "", {}, {}

    @property
    def is_resumable(self) -> bool:
        return bool(self._bucket.digest)

    @property
    def holds_model(self) -> bool:
        return bool(self._bucket.files)

    def standing(self) -> str:
        return "The model that was there before is still whole" if self.holds_model else "The output is not a model yet"
