"""safetensors headers: a test per refusal, round trips, and agreement with the safetensors library."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors import deserialize as untyped_deserialize
from safetensors.torch import save_file

from shardmerge.errors import FormatError
from shardmerge.file_formats import header_json
from shardmerge.file_formats.header_json import MAX_ENTRY
from shardmerge.file_formats.safetensors_header import (
    FIRST_READ,
    MAX_HEADER_BYTES,
    decode,
    encode,
    read_header,
    validate,
)
from shardmerge.spec.tensors import DTYPE_BITS, TensorInfo, tensor_nbytes
from tests.support.builders import ROOT, llama_tensors, slow_but, untimed
from tests.support.headers import ONE, REFUSED, WHERE, entry, f32, parse, raw_file

deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = untyped_deserialize


@pytest.mark.parametrize(("raw", "parts"), REFUSED.values(), ids=REFUSED)
def test_refusal_names_file_and_fault(raw: bytes, parts: list[str]) -> None:
    with pytest.raises(FormatError) as refusal:
        parse(raw)
    message = str(refusal.value)
    assert message.startswith(f"{WHERE}: ")
    for part in parts:
        assert part in message
    message.encode()  # it can be printed


def test_refusal_of_a_monstrous_shape_is_quick_and_short() -> None:
    raw = raw_file({"a": entry(shape=[1 << 62] * 50_000)}, b"x")
    with pytest.raises(FormatError) as refusal:
        parse(raw)
    assert len(str(refusal.value)) < 10_000


def test_length_at_the_limit_is_not_what_is_refused() -> None:
    with pytest.raises(FormatError, match="the header ends at byte 100000008"):
        parse(MAX_HEADER_BYTES.to_bytes(8, "little") + b"{}")


# --- round trips ------------------------------------------------------------------------------------------------------

NAMES = st.text(min_size=1, max_size=20).filter(lambda name: name != "__metadata__" and name.isprintable())
METADATA = st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3)


@st.composite
def tensor_lists(draw: st.DrawFn) -> dict[str, TensorInfo]:
    """Tensors of any dtype, one after the other, of zero or more elements."""
    tensors: dict[str, TensorInfo] = {}
    end = 0
    for name in draw(st.lists(NAMES, max_size=6, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
        if math.prod(shape) * DTYPE_BITS[dtype] % 8:
            shape = (*shape, 8)
        start, end = end, end + tensor_nbytes(dtype, shape)
        tensors[name] = TensorInfo(dtype, shape, (start, end))
    return tensors


def data_bytes(tensors: dict[str, TensorInfo]) -> int:
    return max((info.data_offsets[1] for info in tensors.values()), default=0)


@untimed
@given(METADATA, tensor_lists())
def test_round_trip(metadata: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    head = encode(tuple(metadata.items()), tensors)
    found_metadata, found, data_start = parse(head + bytes(data_bytes(tensors)))
    assert dict(found_metadata) == metadata
    assert found == tensors
    assert data_start == len(head)
    assert data_start % 8 == 0
    offsets = [info.data_offsets for info in found.values()]
    assert offsets == sorted(offsets)


@untimed
@given(METADATA, tensor_lists())
def test_library_reads_what_we_encode(metadata: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    data = bytes(range(256)) * (data_bytes(tensors) // 256 + 1)
    raw = encode(tuple(metadata.items()), tensors) + data[: data_bytes(tensors)]
    found = {name: (one["dtype"], tuple(one["shape"]), bytes(one["data"])) for name, one in deserialize(raw)}
    assert found == {name: (info.dtype, info.shape, data[slice(*info.data_offsets)]) for name, info in tensors.items()}


def test_header_longer_than_the_first_read_takes_two_reads_and_no_data(tmp_path: Path) -> None:
    tensors = {f"layer.{number}.weight": torch.full((3,), float(number)) for number in range(2000)}
    save_file(tensors, tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    reads: list[tuple[int, int]] = []

    def read(offset: int, size: int) -> bytes:
        reads.append((offset, size))
        return raw[offset : offset + size]

    _, found, data_start = read_header(read, len(raw), WHERE)
    assert data_start > FIRST_READ
    assert reads == [(0, FIRST_READ), (FIRST_READ, data_start - FIRST_READ)]
    assert found.keys() == tensors.keys()


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool],
    ids=str,
)
def test_reads_what_the_library_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in llama_tensors(layers=1).items()}
    tensors |= {"empty": torch.empty(0, 3, dtype=dtype), "scalar": torch.ones((), dtype=dtype)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", "ключ": "значение"})
    raw = (tmp_path / "x.safetensors").read_bytes()
    metadata, found, data_start = parse(raw)
    assert dict(metadata) == {"format": "pt", "ключ": "значение"}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        start, stop = found[name].data_offsets
        assert found[name].shape == tuple(tensor.shape)
        stored = raw[data_start + start : data_start + stop]
        assert stored == bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


# --- what is not well formed ------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(sorted(DTYPE_BITS)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F4", "U8"]) | JSON,
        "shape": st.lists(st.integers()) | JSON,
        "data_offsets": st.tuples(st.integers(), st.integers()) | JSON,
    }
)


def only_format_errors(raw: bytes) -> None:
    try:
        parse(raw)
    except FormatError as error:
        assert str(error).startswith(WHERE)


@untimed
@given(st.binary(max_size=64))
def test_random_bytes(raw: bytes) -> None:
    only_format_errors(raw)


@untimed
@given(st.dictionaries(st.text(max_size=3), JSON | ENTRIES, max_size=3), st.binary(max_size=8))
def test_random_entries(entries: dict[str, Any], data: bytes) -> None:
    only_format_errors(raw_file(entries, data))


@untimed
@given(tensor_lists(), st.data())
def test_mutated_files(tensors: dict[str, TensorInfo], data: st.DataObject) -> None:
    raw = bytearray(encode((("format", "pt"),), tensors) + bytes(data_bytes(tensors)))
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(raw) - 1))
        raw[where : where + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        if not raw:
            break
    only_format_errors(bytes(raw))


@untimed
@given(tensor_lists().filter(bool), st.data())
def test_library_agrees_on_which_layouts_are_valid(tensors: dict[str, TensorInfo], data: st.DataObject) -> None:
    """A shape or an offset is off by a little, or the data has another length."""
    size = data_bytes(tensors)
    name = data.draw(st.sampled_from(sorted(tensors)))
    info = tensors[name]
    change = data.draw(st.sampled_from([-8, -1, 0, 0, 1, 8]))
    start, stop = info.data_offsets
    altered = data.draw(
        st.sampled_from(
            [
                TensorInfo(info.dtype, (*info.shape, 2), info.data_offsets),
                TensorInfo(info.dtype, info.shape, (max(0, start + change), stop)),
                TensorInfo(info.dtype, info.shape, (start, max(0, stop + change))),
                TensorInfo("F64", info.shape, info.data_offsets),
                info,
            ]
        )
    )
    raw = encode((), {**tensors, name: altered}) + bytes(max(0, size + data.draw(st.sampled_from([0, 0, 0, -1, 1]))))
    assert accepts(raw) == library_accepts(raw)


def accepts(raw: bytes) -> bool:
    try:
        parse(raw)
    except FormatError:
        return False
    return True


def library_accepts(raw: bytes) -> bool:
    try:
        deserialize(raw)
    except SafetensorError:
        return False
    return True


# --- headers that are long --------------------------------------------------------------------------------------------

#: What long headers are decoded by, made so small that a short one goes through every seam of it.
SMALL = {"_PART": 5, "MAX_ENTRY": 300, "MAX_METADATA": 400}


def verdict(text: bytes) -> Any:
    try:
        return decode(text, WHERE)
    except FormatError:
        return None


@untimed
@given(METADATA, tensor_lists(), st.sampled_from([None, 1]), st.booleans(), st.data())
def test_long_and_short_headers_are_decoded_alike(
    metadata: dict[str, str], tensors: dict[str, TensorInfo], indent: int | None, escaped: bool, data: st.DataObject
) -> None:
    """Whole or damaged: what is said is the same, or both are refused."""
    entries: dict[str, Any] = {name: f32([*info.shape], *info.data_offsets) for name, info in tensors.items()}
    whole = json.dumps({"__metadata__": metadata, **entries}, indent=indent, ensure_ascii=escaped).encode() + b" \n "
    raw = bytearray(whole)
    for _ in range(data.draw(st.integers(0, 2))):
        where = data.draw(st.integers(0, len(raw) - 1))
        raw[where : where + data.draw(st.integers(0, 3))] = data.draw(st.sampled_from([b"", b"}", b'"', b",", b"\xff"]))
    expected = verdict(bytes(raw))
    assert expected is not None or raw != whole
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(header_json, name, value)
        patch.setattr(header_json, "_entries", header_json._entries_of_many)
        assert verdict(bytes(raw)) == expected


@pytest.mark.parametrize("fault", REFUSED)
def test_what_is_refused_is_refused_of_long_headers(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(header_json, "_entries", header_json._entries_of_many)
    test_refusal_names_file_and_fault(REFUSED[fault][0], [])


def test_what_long_headers_say_of_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it stops being JSON, counted from the beginning and not from the part that was read last."""
    one = b'"%03d":' + json.dumps(ONE).encode()
    text = b"{" + b",".join(one % number for number in range(50)) + b"]"
    for name, value in SMALL.items():
        monkeypatch.setattr(header_json, name, value)
    with pytest.raises(FormatError, match=rf"is not JSON: expecting ',': char {len(text) - 1}$"):
        decode(text, WHERE)


@pytest.mark.parametrize("before", [b"", b'"__metadata__":{"x":"' + b"y" * MAX_ENTRY + b'"},'], ids=["", "metadata"])
@pytest.mark.parametrize("over", [0, 1])
def test_the_length_of_an_entry(before: bytes, over: int) -> None:
    """Counted from the name's first quotation mark; the same where the header is longer."""
    entry = b'"a":{"dtype":"U8","shape":[],"data_offsets":[0,1],"x":"'
    entry += b"z" * (MAX_ENTRY - len(entry) - 2 + over) + b'"}'
    text = b"{" + before + entry + b"," + b'"c":' + json.dumps(ONE).encode() + b"}"
    if over:
        with pytest.raises(FormatError, match="an entry of over 2,000,000 characters"):
            decode(text, WHERE)
    else:
        assert list(decode(text, WHERE)[1]) == ["a", "c"]


def test_the_number_of_tensors() -> None:
    tensors = {f"{number}": TensorInfo("U8", (1,), (number, number + 1)) for number in range(7)}
    text = encode((), tensors)[8:]
    assert len(decode(text, "x", 7)[1]) == 7
    with pytest.raises(FormatError, match="names over 6 tensors"):
        decode(text, "x", 6)


_LONG = 99_000_000
_NOTHING = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
_TOO_LONG = "an entry of over 2,000,000 characters"


def filled(start: bytes, unit: bytes, end: bytes) -> Callable[[], bytes]:
    return lambda: start + unit * ((_LONG - len(start) - len(end)) // len(unit)) + end


def of_tensors(count: int, letters: int) -> Callable[[], bytes]:
    return lambda: b"{" + b",".join(b'"%0*d":' % (letters, n) + _NOTHING for n in range(count)) + b"}"


MONSTERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "lists in lists": (filled(b'{"a":', b"[", b""), "is not JSON"),
    "objects in objects": (filled(b'{"a":', b'{"a":', b""), "is not JSON"),
    "one name": (filled(b'{"', b"a", b'":' + _NOTHING + b"}"), _TOO_LONG),
    "one name of wide letters": (filled('{"\U0001f600'.encode(), b"a", b'":' + _NOTHING + b"}"), _TOO_LONG),
    "a shape": (filled(b'{"a":{"dtype":"F32","shape":[', b"0,", b'0],"data_offsets":[0,0]}}'), _TOO_LONG),
    "a huge integer": (filled(b'{"a":{"shape":[', b"9", b"]}}"), "the header"),
    "huge integers": (filled(b'{"a":{"shape":[', b"9" * 4000 + b",", b"0]}}"), _TOO_LONG),
    "a name again and again": (filled(b"{", b'"a":' + _NOTHING + b",", b'"b":0}'), "names 'a' twice"),
    "a key again and again": (filled(b'{"a":{', b'"dtype":"F32",', b'"x":0}}'), _TOO_LONG),
    "objects of wide letters": (filled('{"a":{"\U0001f600":['.encode(), b'{"":0},', b"0]}}"), _TOO_LONG),
    "lists of metadata": (filled(b'{"__metadata__":{"a":[', b"[],", b"0]}}"), "an entry of over 10,000,000 characters"),
    "objects of metadata": (filled(b'{"__metadata__":{"a":[', b'{"":""},', b"0]}}"), "an entry of over 10,000,000"),
    "wide metadata": (filled('{"__metadata__":{"a":"\U0001f600'.encode(), b"b", b'"}}'), "an entry of over 10,000,000"),
    "spaces": (filled(b"{}", b" ", b""), "0 tensors"),
    "spaces before the end": (filled(b"{", b" ", b"}"), "is not JSON"),
    "1.6 million tensors": (of_tensors(1_600_000, 7), "names over 500,000 tensors"),
    "500,000 tensors": (of_tensors(500_000, 140), "500000 tensors"),
}
#: In the ordinary suite, one of each kind.
_QUICK = ("lists in lists", "one name of wide letters", "a key again and again", "wide metadata")

_READS = """
import os, sys
from shardmerge.errors import FormatError
from shardmerge.file_formats.safetensors_header import read_header

def resident(what):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(what))

file = os.open(sys.argv[1], os.O_RDONLY)
before = resident("VmRSS")
try:
    said = f"{len(read_header(lambda at, size: os.pread(file, size, at), os.fstat(file).st_size, 'x')[1])} tensors"
except FormatError as error:
    said = str(error)
print(resident("VmHWM") - before, said)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is measured as Linux tells it")
@pytest.mark.parametrize("name", slow_but(MONSTERS, *_QUICK))
def test_memory_of_a_header_of_100_mb(tmp_path: Path, name: str) -> None:
    """Less than four times its length, whatever it says; the header itself twice while it is read is in that."""
    make, expected = MONSTERS[name]
    text = make()
    assert 0.9 * MAX_HEADER_BYTES < len(text) <= MAX_HEADER_BYTES
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text)
    done = subprocess.run(
        [sys.executable, "-c", _READS, str(tmp_path / "x")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    memory, _, said = done.stdout.partition(" ")
    assert expected in said
    assert int(memory) < 4 * len(text)
    (tmp_path / "x").unlink()


def test_validate_orders_by_data() -> None:
    tensors = {"b": TensorInfo("U8", (2,), (1, 3)), "a": TensorInfo("U8", (1,), (0, 1))}
    assert list(validate(tensors, 3, WHERE)) == ["a", "b"]
