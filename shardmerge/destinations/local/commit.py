"""Finished shards become a model, in an order in which no crash leaves what looks like one and is none."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shardmerge.destinations import contents
from shardmerge.destinations.record import RECORD_NAME
from shardmerge.errors import OutputError
from shardmerge.spec.plans import AuxFile, MergePlan, ShardPlan
from shardmerge.system import durable
from shardmerge.system.checksums import Checksums
from shardmerge.system.directory import Directory, Entry


@dataclass(frozen=True)
class Commit:
    """Moves shards from the ``stage`` into the ``output`` and writes the files beside them.

    Run again after a crash, it carries on where it stopped. Until its last step ``from_pretrained`` finds no weights.
    """

    plan: MergePlan
    stage: Entry
    output: Directory

    def run(self, record: Mapping[str, Any]) -> None:
        """Put in place what makes the output a model last: the index, or the only shard."""
        plan = self.plan
        *first, last = plan.shards
        for shard in first:
            self._place(shard)
        others = {aux.name: self._copy(aux) for aux in plan.aux}
        if plan.index_name is None:
            self._write(RECORD_NAME, contents.record_of(record, others))
            self._place(last)
        else:
            self._place(last)
            index = contents.index_of(plan)
            others[plan.index_name] = contents.entry_of(index, plan.sha256)
            self._write(RECORD_NAME, contents.record_of(record, others))
            self._write(plan.index_name, [index])

    def _place(self, shard: ShardPlan) -> None:
        staged, place = self.stage / shard.name, self.output / shard.name
        if staged.file_status() is not None:
            durable.rename(staged, place)
            return
        # An earlier run has moved it, and was perhaps killed before it did this.
        durable.fsync_directory(self.output.here)
        if (status := place.file_status()) is None or status.st_size != shard.nbytes:
            raise OutputError(f"{staged}: was finished, and is no longer there")

    def _copy(self, aux: AuxFile) -> dict[str, Any]:
        """Write a file beside the shards; what the record says of it."""
        target, checksums = self.output / aux.name, Checksums(self.plan.sha256)
        durable.make_folder(target.parent)
        durable.write_file(target, contents.aux_chunks(aux, checksums))
        return contents.entry(aux.nbytes, checksums)

    def _write(self, name: str, content: Iterable[bytes]) -> None:
        durable.write_file(self.output / name, content)
