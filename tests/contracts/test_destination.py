"""What every destination promises: a model when it is finished, something to resume before, and never a mixture.

A new one is a class and a row in `KINDS`.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import xxhash

import shardmerge
from shardmerge import NonFiniteError, OutputError, PlanError, ResumeError
from shardmerge.destinations import destination
from shardmerge.destinations.destination import Destination, open_destination
from shardmerge.errors import ChangedError
from shardmerge.execution.engine import merge_shard
from shardmerge.spec.plans import MergePlan
from tests.support.builders import contents
from tests.support.memory_destination import BUCKETS, SCHEME, MemoryDestination
from tests.support.three_shards import INDEX, RECORD, SHARDS, ThreeShards

FINGERPRINT = {"base": {"x": 1}}


@dataclass(frozen=True)
class Kind:
    """A destination, and how a test looks at what is there."""

    location: Callable[[Path], str]
    #: The files of the place, unfinished ones left out.
    files: Callable[[str], dict[str, bytes]]
    #: Flip a bit of a finished shard that waits for the others.
    damage: Callable[[str, str], None]


def _flip(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def _local_files(location: str) -> dict[str, bytes]:
    record = Path(location) / RECORD
    found = {name: data for name, data in contents(Path(location)).items() if not name.startswith(".shardmerge/")}
    return {**found, **({RECORD: record.read_bytes()} if record.exists() else {})}


def _damage_local(location: str, shard: str) -> None:
    file = Path(location) / ".shardmerge" / "stage" / shard
    file.write_bytes(_flip(file.read_bytes()))


def _damage_memory(location: str, shard: str) -> None:
    BUCKETS[location].shards[shard] = _flip(BUCKETS[location].shards[shard])


KINDS = {
    "local": Kind(lambda folder: str(folder / "deep" / "out"), _local_files, _damage_local),
    "memory": Kind(
        lambda folder: f"{SCHEME}://{folder}",
        lambda location: dict(BUCKETS[location].files) if location in BUCKETS else {},
        _damage_memory,
    ),
}


@dataclass(frozen=True)
class Case:
    kind: Kind
    models: ThreeShards
    location: str

    def config(self, adapter: str = "adapter", **options: Any) -> dict[str, Any]:
        return self.models.config(self.location, adapter, **options)

    def plan(self, adapter: str = "adapter", **options: Any) -> MergePlan:
        return shardmerge.plan(self.config(adapter), **options)

    def open(self, overwrite: bool = False) -> Destination:
        return open_destination(self.location, overwrite)

    def files(self) -> dict[str, bytes]:
        return self.kind.files(self.location)

    def stop_in(self, shard: str, adapter: str = "adapter", *, overwrite: bool = False) -> None:
        """A merge that is stopped when it begins a shard."""

        def progress(now: shardmerge.Progress) -> None:
            if now.shard == shard:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            shardmerge.merge(self.config(adapter), overwrite=overwrite, progress=progress)


@pytest.fixture(params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setitem(destination.DESTINATIONS, SCHEME, MemoryDestination)
    kind = KINDS[request.param]
    return Case(kind, ThreeShards(tmp_path).make(), kind.location(tmp_path))


# --- a whole merge ----------------------------------------------------------------------------------------------------


def test_a_merge_makes_a_model(case: Case) -> None:
    plan = case.plan()
    report = shardmerge.merge(plan)
    files = case.files()
    case.models.check(files)
    assert {*report.files} == {*files} == {*SHARDS, "config.json", INDEX, RECORD}
    assert files["config.json"] == (case.models.folder / "base" / "config.json").read_bytes()
    weight_map = json.loads(files[INDEX])["weight_map"]
    assert {name: [*weight_map.values()].count(name) for name in SHARDS} == dict.fromkeys(SHARDS, 2)


def test_the_record_has_the_checksum_of_every_other_file(case: Case) -> None:
    shardmerge.merge(case.config())
    files = case.files()
    record = json.loads(files[RECORD])
    sums = {**record["shards"], **record["other_files"]}
    assert {*sums} == {*files} - {RECORD}
    for name, entry in sums.items():
        assert entry["bytes"] == len(files[name])
        assert entry["xxh3_128"] == xxhash.xxh3_128_hexdigest(files[name])


def test_the_location_is_what_a_plan_carries(case: Case) -> None:
    assert case.plan().output == case.open().location == open_destination(case.open().location, False).location


# --- stopped and resumed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 2])
def test_what_was_finished_is_resumed(number: int, case: Case) -> None:
    case.stop_in(SHARDS[number])
    assert not case.files() and not case.open().holds_model
    seen: list[shardmerge.Progress] = []
    report = shardmerge.merge(case.config(), progress=seen.append)
    assert report.shards_reused == number
    assert {now.shard for now in seen if now.doing == "merging"} == {*SHARDS[number:]}
    assert {now.shard for now in seen if now.doing == "checking"} == {*SHARDS[:number]}
    case.models.check(case.files())


def test_a_shard_that_was_not_kept_is_made_again(case: Case) -> None:
    case.stop_in(SHARDS[2])
    case.kind.damage(case.location, SHARDS[0])
    report = shardmerge.merge(case.config())
    assert report.shards_reused == 1
    assert [text for text in report.warnings if SHARDS[0] in text]
    case.models.check(case.files())


def test_other_work_is_left_alone_and_replaced_on_demand(case: Case) -> None:
    case.stop_in(SHARDS[2], "other")
    with pytest.raises(ResumeError):
        shardmerge.merge(case.config())
    assert shardmerge.merge(case.config("other")).shards_reused == 2
    before = case.files()
    with pytest.raises(PlanError, match="already holds a finished merge"):
        shardmerge.merge(case.config())
    assert case.files() == before
    assert shardmerge.merge(case.config(), overwrite=True).shards_reused == 0
    case.models.check(case.files())


def test_a_plan_that_came_too_late_replaces_nothing(case: Case) -> None:
    plan = case.plan("other")
    shardmerge.merge(case.config())
    with pytest.raises(ResumeError):
        shardmerge.merge(plan)
    case.models.check(case.files())


def test_the_model_that_is_replaced_stays_whole_meanwhile(case: Case) -> None:
    shardmerge.merge(case.config())
    before = case.files()
    case.stop_in(SHARDS[2], "other", overwrite=True)
    assert case.files() == before and case.open().holds_model


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
def test_an_error_says_what_is_there_and_that_it_can_be_resumed(overwrite: bool, case: Case) -> None:
    if overwrite:
        shardmerge.merge(case.config("other"))

    def progress(now: shardmerge.Progress) -> None:
        if now.shard == SHARDS[1]:
            raise OutputError("no space")

    standing = "The model that was there before is still whole" if overwrite else "The output is not a model yet"
    with pytest.raises(OutputError, match=rf"no space\. {standing}\. .*run the same command again to resume it"):
        shardmerge.merge(case.config(), overwrite=overwrite, progress=progress)
    assert shardmerge.merge(case.config(), overwrite=overwrite).shards_reused == 1


def test_a_source_that_changes_is_said_to_have_changed(case: Case) -> None:
    def progress(now: shardmerge.Progress) -> None:
        if now.shard == SHARDS[1]:
            os.utime(case.models.folder / "base" / SHARDS[1], ns=(1, 1))

    with pytest.raises(ChangedError, match=r"not a model yet.*is of the file as it was"):
        shardmerge.merge(case.config(), progress=progress)


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
def test_nothing_is_kept_of_a_merge_that_cannot_succeed(overwrite: bool, case: Case) -> None:
    if overwrite:
        shardmerge.merge(case.config())
    before = case.files()
    with pytest.raises(NonFiniteError, match="Nothing is left of it in"):
        shardmerge.merge(case.config("infinite"), overwrite=overwrite)
    assert case.files() == before and case.open().holds_model == overwrite
    assert shardmerge.merge(case.config(), overwrite=overwrite).shards_reused == 0


# --- the verbs, one by one --------------------------------------------------------------------------------------------


def test_one_at_a_time(case: Case) -> None:
    plan = case.plan()
    with case.open() as held:
        held.begin(plan, FINGERPRINT)
        with pytest.raises(ResumeError), case.open():
            pass
    with case.open() as again:
        assert again.begin(plan, FINGERPRINT) == {}


def test_who_leaves_without_a_beginning_leaves_no_trace(case: Case) -> None:
    with case.open() as destination:
        assert not destination.is_resumable
    assert not case.files() and not (case.models.folder / "deep").exists() and case.location not in BUCKETS


def test_a_pickled_handle_writes_what_a_later_run_finds(case: Case) -> None:
    plan = case.plan()
    with case.open() as destination:
        destination.begin(plan, FINGERPRINT)
        handle = pickle.loads(pickle.dumps(destination.handle))
        receipt = merge_shard(plan, plan.shards[1], handle)
        with handle.writer(plan.shards[0]):
            pass  # and no commit
        assert destination.is_resumable
    with case.open() as destination:
        assert destination.begin(plan, FINGERPRINT).keys() == {SHARDS[1]}
        assert destination.check(receipt, lambda count: None) == receipt


def test_writers_of_two_shards_at_a_time(case: Case) -> None:
    plan = case.plan()
    with case.open() as destination:
        destination.begin(plan, FINGERPRINT)
        with destination.handle.writer(plan.shards[0]) as first:
            second = merge_shard(plan, plan.shards[1], destination.handle)
            receipt = first.commit()  # of zeros
        assert (receipt.shard, receipt.nbytes) == (SHARDS[0], plan.shards[0].nbytes)
    with case.open() as destination:
        assert destination.begin(plan, FINGERPRINT) == {
            SHARDS[0]: destination.check(receipt, lambda count: None),
            SHARDS[1]: destination.check(second, lambda count: None),
        }


def test_abort_leaves_nothing_to_resume(case: Case) -> None:
    plan = case.plan()
    with case.open() as destination:
        destination.begin(plan, FINGERPRINT)
        merge_shard(plan, plan.shards[0], destination.handle)
        destination.abort()
    with case.open() as destination:
        assert destination.begin(plan, FINGERPRINT) == {}


def test_problems_are_of_the_place(case: Case) -> None:
    plan = case.plan()
    assert case.open().problems(plan) == case.open().problems() == []
    shardmerge.merge(plan)
    for problems in (case.open().problems(plan), case.open().problems()):
        (problem,) = problems
        assert case.location in problem and "already holds a finished merge" in problem
    assert case.open(overwrite=True).problems(plan) == []
