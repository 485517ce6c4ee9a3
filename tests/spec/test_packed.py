"""Objects as bytes: what comes out is what went in, anew each time, and small."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from shardmerge.spec.packed import PackedMapping, PackedSequence, moved, pack, unpack
from shardmerge.spec.tensors import TensorInfo, TensorRef
from tests.support.builders import refs_of


@dataclass(frozen=True, slots=True)
class One:
    value: int


@dataclass(frozen=True)
class Several:
    name: str
    inner: tuple[One, ...]
    infos: dict[str, TensorInfo]


VALUES = [
    None,
    7,
    "äö\ud800",
    (1.5, float("inf"), b"\0"),
    {"a": [1, (2, 3)], "b": {4}},
    One(3),
    Several("x", (One(1), One(2)), {"w": TensorInfo("F32", (2, 3), (0, 24))}),
    refs_of({"A": (4, 8)})["A"],
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_what_comes_out_is_what_went_in(value: object) -> None:
    assert unpack(pack(value)) == value
    assert moved(lambda: value) == value


def test_what_is_moved_is_a_copy() -> None:
    inner: list[int] = [1]
    copy = moved(lambda: [inner, inner])
    assert copy == [[1], [1]] and copy[0] is copy[1] and copy[0] is not inner


def test_an_error_of_what_makes_it_comes_through() -> None:
    def fails() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError, match="x"):
        moved(fails)


def refs() -> Iterator[TensorRef]:
    for layer in range(400):
        yield refs_of({f"model.layers.{layer}.weight": (16, 8)})[f"model.layers.{layer}.weight"]


def test_a_sequence() -> None:
    items = tuple(refs())
    packed = PackedSequence(items)
    assert len(packed) == 400 and tuple(packed) == items and packed == items and packed == PackedSequence(items)
    assert packed[3] == items[3] and packed[-1] == items[-1] and packed[2:5] == items[2:5]
    assert (
        packed != items[:-1] and packed != list(items) and hash(packed) == hash(items) and repr(packed) == repr(items)
    )
    assert items[7] in packed and next(iter(packed)) is not next(iter(packed)), "made anew each time"
    with pytest.raises(IndexError):
        packed[400]
    assert pickle.loads(pickle.dumps(packed)) == packed, "an executor takes it to another process"


def test_a_mapping() -> None:
    items = {ref.name: ref for ref in refs()}
    packed = PackedMapping(items)
    assert len(packed) == 400 and dict(packed.items()) == items and list(packed) == list(items)
    name = "model.layers.5.weight"
    assert packed[name] == items[name] and packed.get("x") is None and name in packed and packed == items
    assert repr(packed) == repr(items)
    assert dict(pickle.loads(pickle.dumps(packed)).items()) == items
    assert not PackedMapping({}) and list(PackedMapping({})) == []


def test_it_is_small() -> None:
    """A tenth of what names and shapes alone take as they are: equal targets differ in numbers only."""
    items = tuple(refs())
    assert len(pack(items)) < sum(len(repr(item)) for item in items) // 10
