"""Objects that are kept as a few bytes and made anew by each look."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import pytest

from shardmerge.spec.notices import Warned
from shardmerge.spec.packed import PackedMapping, PackedSequence, moved, pack, unpack
from shardmerge.spec.tensors import TensorRef
from shardmerge.spec.updates import Region, Settings, Update


@dataclass(frozen=True, slots=True)
class Empty:
    """It has no field."""


@dataclass(frozen=True, slots=True)
class One(Settings):
    """It has one."""

    value: object


@dataclass
class Counted:
    """A field of it is made when it is, and is no argument."""

    names: list[str]


def update(number: int) -> Update:
    module = f"model.layers.{number}.mlp.up_proj"
    factor = TensorRef(f"{module}.lora_A.weight", "/adapter", "F32", (2, 8), 64 * number, 64, strides=(1, 2))
    region = Region(f"{module}.weight", 8, shuffle=(1, 2, 4))
    settings = One(("a", None, 1.5))
    return Update(
        0, "lora", module, region.tensor, (("A", factor),), 0.5, 2, (8, 8), region, experts=number, settings=settings
    )


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        2**70,
        0.1,
        "ä\n",
        b"\0",
        (),
        [1, (2, [3])],
        {"a": {1, 2}, "b": frozenset("c")},
        Empty(),
        One(One(())),
    ],
)
def test_a_value_comes_back(value: object) -> None:
    found = unpack(pack(value))
    assert found == value
    assert type(found) is type(value)


def test_dataclasses_come_back_whole() -> None:
    assert unpack(pack(update(3))) == update(3)
    assert unpack(pack(Counted(["a"]))) == Counted(["a"])
    assert moved(lambda: [update(1), update(2)]) == [update(1), update(2)]


def test_a_class_that_is_not_a_dataclass_comes_back() -> None:
    found = unpack(pack(Warned("careful")))
    assert (found, type(found)) == ("careful", Warned)


def test_what_is_the_same_object_stays_the_same() -> None:
    region = Region("a", 1)
    one, other = unpack(pack((region, region)))
    assert one is other


def test_what_cannot_be_pickled_is_refused() -> None:
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        pack(lambda: None)


def test_a_packed_sequence_is_the_tuple() -> None:
    items = tuple(update(number) for number in range(5))
    packed = PackedSequence(items)
    assert len(packed) == 5
    assert tuple(packed) == items
    assert tuple(packed) == items, "it can be gone through again"
    assert packed[1] == items[1]
    assert packed[-1] == items[-1]
    assert packed[1:3] == items[1:3]
    assert packed == items
    assert packed == PackedSequence(list(items))
    assert packed != items[:4]
    assert packed != list(items)
    assert hash(packed) == hash(items)
    assert repr(packed) == repr(items)
    assert items[2] in packed
    assert tuple(reversed(packed)) == items[::-1]
    with pytest.raises(IndexError):
        packed[5]


def test_each_look_makes_objects_of_its_own() -> None:
    packed = PackedSequence([Counted(["a"])])
    packed[0].names.append("b")
    assert packed[0] == Counted(["a"])
    assert packed[0] is not packed[0]


def test_a_packed_mapping_is_the_dictionary() -> None:
    items = {f"t{number}": update(number) for number in (2, 0, 1)}
    packed = PackedMapping(items)
    assert len(packed) == 3
    assert dict(packed) == items
    assert list(packed) == list(items), "in the same order"
    assert dict(packed.items()) == items
    assert list(packed.values()) == list(items.values())
    assert packed["t1"] == items["t1"]
    assert packed == items
    assert "t3" not in packed
    assert packed.get("t3") is None
    assert repr(packed) == repr(items)
    with pytest.raises(KeyError):
        packed["t3"]


def test_packed_again_it_is_the_same() -> None:
    """Plans with packed shards are sent to other processes."""
    packed = PackedSequence([update(1)])
    assert pickle.loads(pickle.dumps(packed)) == packed
    mapping = PackedMapping({"a": update(1)})
    assert pickle.loads(pickle.dumps(mapping)) == mapping


def test_names_that_differ_in_numbers_take_little() -> None:
    """Bytes for each target; as objects one takes over a thousand."""
    packed = PackedSequence([update(number) for number in range(2_000)])
    assert len(pickle.dumps(packed)) < 100 * len(packed)
