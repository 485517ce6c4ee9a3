"""Pickled tensors: read by offsets, never run, and refused where they are more than a flat dictionary of floats."""

from __future__ import annotations

import collections
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from shardmerge.errors import FormatError, SourceError
from shardmerge.file_formats import torch_pickle
from shardmerge.file_formats.adapter_opening import open_adapter
from shardmerge.file_formats.torch_pickle import read_pickled
from shardmerge.sources.source import open_source
from shardmerge.spec.tensors import DTYPE_BITS, TensorRef
from tests.support.builders import peft_tensors, run_python, untimed, write_peft, write_pure

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


def read(path: Path) -> dict[str, TensorRef]:
    return read_pickled(path, str(path))


def by_offset(ref: TensorRef) -> Tensor:
    """The tensor from the file's bytes alone, as a merge reads it."""
    raw = Path(ref.uri).read_bytes()[ref.offset : ref.offset + ref.nbytes]
    assert len(raw) == ref.nbytes
    flat = torch.frombuffer(bytearray(raw), dtype=DTYPES[ref.dtype]) if raw else torch.empty(0, dtype=DTYPES[ref.dtype])
    if ref.strides is None:
        return flat.view(ref.shape)
    return flat.as_strided(ref.shape, ref.strides)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape).to(dtype)


BIG = numbers(6, 8)
SHARED = numbers(40)

STATES: dict[str, dict[str, Tensor]] = {
    "contiguous": {"a": numbers(3, 4), "b": numbers(5)},
    "transposed": {"a": numbers(3, 4).T, "b": numbers(2, 3, 4).permute(2, 0, 1)},
    "rows of a larger one": {"a": BIG[2:4]},
    "columns of a larger one": {"a": BIG[:, 3:5]},
    "every second": {"a": BIG[::2, ::3]},
    "column as a vector": {"a": BIG[:, 3]},
    "shared storage": {"a": SHARED[:12].view(3, 4), "b": SHARED[12:24].view(4, 3), "c": SHARED[5:15]},
    "the same one twice": {"a": BIG, "b": BIG},
    "the same one transposed": {"a": BIG, "b": BIG.T},
    "expanded": {"a": numbers(3, 1).expand(3, 4)},
    "parameters": {"a": nn.Parameter(numbers(3, 4)), "b": nn.Parameter(numbers(3, 4).T)},
    "scalar": {"a": torch.tensor(7.0)},
    "empty": {"a": torch.empty(0, 4), "b": numbers(2)},
    "sizes of one": {"a": numbers(1, 4).T, "b": numbers(4, 1), "c": BIG[:1, :1]},
    **{
        f"{code}": {"a": numbers(3, 4, dtype=dtype), "b": numbers(3, 4, dtype=dtype).T}
        for code, dtype in DTYPES.items()
    },
    "mixed dtypes": {code: numbers(2, 3, dtype=dtype) for code, dtype in DTYPES.items()},
    "odd names": {"": numbers(1), "ключ.weight": numbers(2), "a/b \\": numbers(3)},
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_values_by_offset_are_those_of_torch(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = write_pure(tmp_path / "x.pt", state)
    refs = read(path)
    loaded = torch.load(path, weights_only=True)
    assert list(refs) == list(loaded)
    for name, expected in loaded.items():
        ref = refs[name]
        assert ref.name == name
        assert DTYPES[ref.dtype] == expected.dtype
        assert ref.shape == tuple(expected.shape)
        assert torch.equal(by_offset(ref), expected.detach())


def test_dense_tensors_have_no_strides_and_no_more_bytes_than_they_need(tmp_path: Path) -> None:
    refs = read(write_pure(tmp_path / "x.pt", {"dense": BIG[2:4], "view": BIG[:, 3:5]}))
    assert refs["dense"].strides is None
    assert refs["dense"].nbytes == 2 * 8 * DTYPE_BITS["F32"] // 8
    assert refs["view"].strides == (8, 1)
    assert refs["view"].nbytes == (5 * 8 + 2) * 4


def test_values_are_not_looked_at(tmp_path: Path) -> None:
    path = write_pure(tmp_path / "x.pt", {"a": numbers(1000)})
    before = read(path)
    raw = bytearray(path.read_bytes())
    ref = before["a"]
    raw[ref.offset : ref.offset + ref.nbytes] = b"\xff" * ref.nbytes  # NaN
    path.write_bytes(raw)
    assert read(path) == before


def test_ordered_dictionary_of_a_module(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    state = module.state_dict()
    assert isinstance(state, collections.OrderedDict)
    torch.save(state, tmp_path / "x.pt")
    refs = read(tmp_path / "x.pt")
    assert {name: torch.equal(by_offset(ref), state[name]) for name, ref in refs.items()} == dict.fromkeys(state, True)


def test_bin_of_a_peft_adapter(tmp_path: Path) -> None:
    tensors = peft_tensors(dtype=torch.bfloat16)
    adapter = open_adapter(open_source(str(write_peft(tmp_path, tensors, pickled=True))))
    for name, expected in tensors.items():
        assert torch.equal(by_offset(adapter.tensors[name]), expected)


# --- what is refused --------------------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(FormatError) as raised:
        read(path)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert "weights_only=False" not in message  # torch's own advice, and the last thing to do
    return message


class Touch:
    """Unpickled, it runs a command."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a tensor"])
def test_code_is_not_run(tmp_path: Path, beside: bool) -> None:
    witness, path = tmp_path / "witness", tmp_path / "x.pt"
    torch.save({"a": numbers(2), "b": Touch(witness)} if beside else Touch(witness), path)
    assert "more than tensors, so it was not loaded" in refusal(path)
    assert not witness.exists()
    torch.load(path, weights_only=False)
    assert witness.exists(), "the file does run code where it is allowed to"


def test_code_in_a_bare_pickle_is_not_run(tmp_path: Path) -> None:
    witness, path = tmp_path / "witness", tmp_path / "x.pt"
    path.write_bytes(pickle.dumps(Touch(witness)))
    assert "not a zip archive" in refusal(path)
    assert not witness.exists()


def test_legacy_format(tmp_path: Path) -> None:
    torch.save({"a": numbers(2)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    message = refusal(tmp_path / "x.pt")
    assert "is not a zip archive of torch.save (PyTorch 1.6 or later)" in message
    assert "save it again" in message


@pytest.mark.parametrize(
    "value",
    [[numbers(2)], numbers(2), 7, None, "text", (numbers(2),)],
    ids=["list", "tensor", "number", "none", "text", "tuple"],
)
def test_no_dictionary(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "x.pt")
    message = refusal(tmp_path / "x.pt")
    assert "expected a dictionary of tensors" in message


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("rank", 8, "'rank' is a int"),
        ("state_dict", {"a": numbers(2)}, "'state_dict' is a dict"),
        ("name", "lora", "'name' is a str"),
        ("nothing", None, "'nothing' is a NoneType"),
        (7, numbers(2), "7 is a "),
    ],
    ids=["number", "nested", "text", "none", "key that is not text"],
)
def test_entry_that_is_no_tensor(tmp_path: Path, key: Any, value: object, found: str) -> None:
    torch.save({"a": numbers(2), key: value}, tmp_path / "x.pt")
    message = refusal(tmp_path / "x.pt")
    assert found in message
    assert "flat dictionary of tensors" in message


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2J", "a\x9b", "a\u202eb", "a\u2028b"])
def test_name_that_cannot_be_shown(tmp_path: Path, name: str) -> None:
    torch.save({name: numbers(2)}, tmp_path / "x.pt")
    message = refusal(tmp_path / "x.pt")
    assert f"the name {name!r} has characters that cannot be shown" in message and message.isprintable()


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_tensor_that_is_no_float(tmp_path: Path, dtype: torch.dtype) -> None:
    path = write_pure(tmp_path / "x.pt", {"steps": torch.ones(3, dtype=dtype)})
    message = refusal(path)
    assert "'steps'" in message
    assert str(dtype) in message
    assert "expected dense floats" in message


def test_sparse_tensor(tmp_path: Path) -> None:
    assert "x.pt" in refusal(write_pure(tmp_path / "x.pt", {"sparse": torch.eye(3).to_sparse()}))


def test_object_of_another_library(tmp_path: Path) -> None:
    torch.save({"a": numpy.float64(1.0)}, tmp_path / "x.pt")
    refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("keep", [0, 1, 3, 100, -1, -22, -100, 0.5], ids=str)
def test_truncated(tmp_path: Path, keep: float) -> None:
    path = write_pure(tmp_path / "x.pt")
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if isinstance(keep, float) else keep if keep >= 0 else size + keep)
    assert "or it was cut" in refusal(path)


def rewrite(path: Path, compression: int = zipfile.ZIP_STORED, drop: str = "", **replace: bytes) -> Path:
    """The same archive written by Python's zipfile, changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            last = name.rpartition("/")[2]
            if last != drop:
                archive.writestr(name, replace.get(last.replace(".", "_"), content))
    return path


def test_compressed(tmp_path: Path) -> None:
    path = rewrite(write_pure(tmp_path / "x.pt"), zipfile.ZIP_DEFLATED)
    assert "is compressed, which torch.save never does" in refusal(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"drop": "data.pkl"},
        {"drop": "0"},
        {"data_pkl": b""},
        {"data_pkl": b"\x80\x02."},
        {"data_pkl": b"\x80\x02}q\x00X\x01"},
        {"0": b""},
        {"0": b"x"},
        {"5": bytes(16)},
    ],
    ids=lambda changes: str(changes),
)
def test_damaged_archive(tmp_path: Path, changes: dict[str, Any]) -> None:
    refusal(rewrite(write_pure(tmp_path / "x.pt"), **changes))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_protocol_that_torch_saves_in(tmp_path: Path, protocol: int) -> None:
    """torch itself loads those from 4 on only with ``weights_only=False``, which runs them; these are our own."""
    path = tmp_path / "x.pt"
    states: list[dict[str, Any]] = [
        {f"name{number}" * (number % 50 + 1): numbers(number % 3 + 1, 4) for number in range(300)},
        dict(torch.nn.Linear(3, 2).state_dict()),
        {"parameter": torch.nn.Parameter(numbers(2)), "view": numbers(4, 6).T[1:3], "half": numbers(3).half()},
        {"ä" * 300: numbers(1), "long": numbers(70_000)},
    ]
    states.append(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)).state_dict())
    for state in states:
        torch.save(state, path, pickle_protocol=protocol)
        expected = torch.load(path, weights_only=False)
        found = read(path)
        assert list(found) == list(expected)
        assert all(torch.equal(by_offset(ref), expected[name]) for name, ref in found.items())


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_code_in_every_protocol_is_not_run(tmp_path: Path, protocol: int) -> None:
    witness = tmp_path / "witness"
    path = tmp_path / "x.pt"
    torch.save({"a": Touch(witness), "b": numbers(2)}, path, pickle_protocol=protocol)
    message = refusal(path)
    assert "could run code" in message and ("posix.system" in message or "os.system" in message)
    assert not witness.exists()


_BOMBS = {
    "dictionaries": b"}" * 15_000_000,
    "lists": b"]" * 15_000_000,
    "tuples": b"N" + b"\x85" * 15_000_000,
    "marks": b"(" * 15_000_000,
    "numbers": b"M\xff\x7f" * 5_000_000,
    "memo": b"}" + b"\x94" * 19_900_000,
    "texts": b"\x8c\x00" * 7_500_000,
    "entries": b"}(" + b"".join(b"\x8c\x07%07dN" % number for number in range(1_400_000)) + b"u",
}


@pytest.mark.parametrize("bomb", ["dictionaries"])
def test_pickle_that_makes_too_much(tmp_path: Path, bomb: str) -> None:
    """A file of 15 MB, of which Python would make a gigabyte; the time that it takes is that of its bytes."""
    _check_bomb(tmp_path, bomb)


@pytest.mark.slow
@pytest.mark.parametrize("bomb", ["lists", "tuples", "numbers", "memo", "texts", "marks", "entries"])
def test_any_pickle_that_makes_too_much(tmp_path: Path, bomb: str) -> None:
    _check_bomb(tmp_path, bomb)


def _check_bomb(tmp_path: Path, bomb: str) -> None:
    path = rewrite(write_pure(tmp_path / "x.pt"), data_pkl=b"\x80\x04" + _BOMBS[bomb] + b".")
    code = (
        "import pathlib; from shardmerge.file_formats.torch_pickle import read_pickled\n"
        "from shardmerge.errors import FormatError; from shardmerge.system.memory_use import peak_memory\n"
        f"try: read_pickled(pathlib.Path({str(path)!r}), 'x')\n"
        "except FormatError as error: print(peak_memory(), error)"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    peak, _, message = done.stdout.partition(" ")
    assert int(peak) < 300_000_000
    assert "makes objects of over 150,000,000 bytes" in message


def test_other_byte_order(tmp_path: Path) -> None:
    path = rewrite(write_pure(tmp_path / "x.pt"), byteorder=b"big")
    assert "big-endian" in refusal(path)


def test_two_entries_of_a_name(tmp_path: Path) -> None:
    path = write_pure(tmp_path / "x.pt")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(archive.namelist()[0], b"x")
    assert "have the same name" in refusal(path)


@pytest.mark.parametrize("view", [lambda tensor: torch.conj(tensor), lambda tensor: torch.conj(tensor).imag])
def test_views_that_change_values(tmp_path: Path, view: Any) -> None:
    refusal(write_pure(tmp_path / "x.pt", {"a": view(torch.ones(3, dtype=torch.complex64))}))


@pytest.mark.parametrize(
    "text",
    [
        b"\x80\x02}X\x01\0\0\0a" + b"]s.",
        b"\x80\x02" + b"]" * 100_000 + b".",
        b"\x80\x02}(" + b"(" * 100_000 + b"t" * 100_000 + b"u.",
        b"\x80\x02}\x8b\xff\xff\xff\x7f.",
        b"\x80\x02}q\0X\x01\0\0\0ah\0s.",
        b"\x80\x02}(X\x03\0\0\0\xed\xa0\x80Nu.",
        b"\x80\x02}(\x8a\xff" + b"\x7f" * 255 + b"Nu.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_parameter\n)R.",
        b"\x80\x02ccollections\nOrderedDict\n}\x85R.",
        b"\x80\x02)Q.",
        b"R.",
        b"0.",
        b".",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_pickle_that_is_nonsense(tmp_path: Path, text: bytes) -> None:
    message = refusal(rewrite(write_pure(tmp_path / "x.pt"), data_pkl=text))
    assert len(message) < 1000


@untimed
@given(data=st.data())
def test_damaged_pickle(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """What is accepted is what torch makes of it, where torch accepts it."""
    path = write_pure(tmp_path_factory.getbasetemp() / "damaged.pt", {"a": numbers(3, 4).T, "b": numbers(5)})
    with zipfile.ZipFile(path) as archive:
        text = bytearray(archive.read("damaged/data.pkl"))
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.integers(0, len(text) - 1))
        text[where : where + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    rewrite(path, data_pkl=bytes(text))
    try:
        refs = read(path)
    except FormatError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = torch.load(path, weights_only=True)
        except Exception:
            return
    for name, ref in refs.items():
        assert torch.equal(by_offset(ref), loaded[name])


def test_torch_is_not_needed(tmp_path: Path) -> None:
    path = write_pure(tmp_path / "x.pt")
    code = (
        "import sys, pathlib; from shardmerge.file_formats.torch_pickle import read_pickled; "
        f"read_pickled(pathlib.Path({str(path)!r}), 'x')"
    )
    done = run_python("-c", f"{code}; assert 'torch' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_archive_with_a_name_that_is_no_text(tmp_path: Path) -> None:
    """Found by tools/fuzz.py: zipfile decodes the names of the directory, and lets its failure pass through."""
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/é.pkl", b"")
    raw = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(raw.replace("é".encode(), b"\xce\xce"))
    assert "not a zip archive" in refusal(tmp_path / "x.pt")


def test_archive_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refusal(tmp_path / "x.pt")


def test_pickle_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_pure(tmp_path / "x.pt")
    monkeypatch.setattr(torch_pickle, "MAX_PICKLE_BYTES", 100)
    assert "the limit is 100" in refusal(path)


def test_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        read(tmp_path / "gone.pt")
