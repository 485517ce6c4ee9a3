"""The bytes before the tensor data, as the ``gguf`` package reads and writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFWriter

from shardmerge.codecs.ggml import BLOCKS, nbytes
from shardmerge.gguf.formats import FILE_TYPES, QUANTIZATIONS, TYPE_CODES, KeyValue
from shardmerge.gguf.layout import OutputTensor
from shardmerge.gguf.writer import encode_header

VALUES = [
    KeyValue("general.architecture", "str", "llama"),
    KeyValue("a.count", "u32", 4_000_000_000),
    KeyValue("a.number", "f32", 0.1),
    KeyValue("a.below", "i32", -7),
    KeyValue("a.yes", "bool", True),
    KeyValue("a.text", "str", "blank  é 🚀\n"),
    KeyValue("a.tokens", "str", ("a", b"\xff\xfe", "")),
    KeyValue("a.scores", "f32", (0.5, -1000.0)),
    KeyValue("a.types", "i32", (1, 3)),
]


def _tensors() -> list[OutputTensor]:
    return [
        OutputTensor("one.weight", (3, 64), kind="Q8_0"),
        OutputTensor("two.weight", (5,), offset=224),
        OutputTensor("three.weight", (2, 3, 4), kind="BF16", offset=256),
    ]


def test_the_package_reads_what_was_written(tmp_path: Path) -> None:
    head = encode_header(VALUES, _tensors())
    assert len(head) % 32 == 0
    file = tmp_path / "file.gguf"
    file.write_bytes(head + bytes(256 + 64))
    reader = GGUFReader(file)
    assert reader.data_offset == len(head)
    assert reader.fields["a.count"].contents() == 4_000_000_000
    assert reader.fields["a.number"].contents() == pytest.approx(0.1)
    assert reader.fields["a.below"].contents() == -7
    assert reader.fields["a.yes"].contents() is True
    assert reader.fields["a.text"].contents() == "blank  é 🚀\n"
    assert reader.fields["a.scores"].contents() == [0.5, -1000.0]
    tokens = reader.fields["a.tokens"]
    assert [bytes(tokens.parts[index]) for index in tokens.data] == [b"a", b"\xff\xfe", b""]
    found = [
        (tensor.name, tensor.tensor_type.name, list(tensor.shape), tensor.data_offset) for tensor in reader.tensors
    ]
    assert found == [
        ("one.weight", "Q8_0", [64, 3], len(head)),
        ("two.weight", "F32", [5], len(head) + 224),
        ("three.weight", "BF16", [4, 3, 2], len(head) + 256),
    ]


def test_the_package_writes_the_same_bytes(tmp_path: Path) -> None:
    import numpy as np

    file = tmp_path / "file.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_uint32("a.count", 4_000_000_000)
    writer.add_float32("a.number", 0.1)
    writer.add_int32("a.below", -7)
    writer.add_bool("a.yes", True)
    writer.add_string("a.text", "blank  é 🚀\n")
    writer.add_array("a.tokens", ["a", b"\xff\xfe", ""])
    writer.add_array("a.scores", [0.5, -1000.0])
    writer.add_array("a.types", [1, 3])
    writer.add_tensor("one.weight", np.zeros((3, 64), np.float32))
    writer.add_tensor("two.weight", np.zeros(5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = [OutputTensor("one.weight", (3, 64)), OutputTensor("two.weight", (5,), offset=768)]
    assert file.read_bytes() == encode_header(VALUES, tensors) + bytes(768 + 32)


def test_types_are_those_of_the_package() -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

    assert BLOCKS.keys() == TYPE_CODES.keys() == FILE_TYPES.keys()
    for name, code in TYPE_CODES.items():
        assert GGMLQuantizationType[name] == code
        assert GGML_QUANT_SIZES[GGMLQuantizationType[name]] == BLOCKS[name]
        assert LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"] == FILE_TYPES[name]
    assert set(QUANTIZATIONS) == {"f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"}


@pytest.mark.parametrize(
    ("values", "tensors", "message"),
    [
        ([VALUES[0], VALUES[0]], [], "the key 'general.architecture' occurs twice"),
        ([], [_tensors()[0]] * 2, "the tensor 'one.weight' occurs twice"),
        ([KeyValue("a", "u32", -1)], [], "a: a value is not a valid u32"),
        ([KeyValue("a", "u32", (1, 1 << 32))], [], "a: a value is not a valid u32"),
    ],
)
def test_what_cannot_be_written(values: list[KeyValue], tensors: list[OutputTensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_header(values, tensors)


def test_no_rows_of_half_a_block() -> None:
    with pytest.raises(ValueError, match="Q4_0 holds rows of a multiple of 32"):
        nbytes("Q4_0", (2, 33))
    assert nbytes("F16", ()) == 2
