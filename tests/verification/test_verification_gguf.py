"""`shardmerge verify` of a GGUF file: it passes what a merge writes, and finds what is something else.

Files are changed and their recorded checksums made to agree, so that only what is in them can tell.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, quants
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import shardmerge
from shardmerge import Progress, VerifyReport
from shardmerge.codecs import ggml_blocks
from shardmerge.codecs.ggml_blocks import quantize_into
from shardmerge.errors import FormatError
from shardmerge.sources.local import LocalSource
from shardmerge.spec.tensors import Encoding, TensorInfo
from shardmerge.verification.decoders import rounded
from shardmerge.verification.findings import Findings
from shardmerge.verification.gguf import check_places
from shardmerge.verification.gguf_blocks import compare
from shardmerge.verification.gguf_header import GgufHeader, read_header
from shardmerge.verification.reading import Files
from tests.support.builders import growth_of_verify, read_tensors, write_json
from tests.support.command_line import invoke, invoke_json
from tests.support.gguf_merges import GgufModels, as_gguf, config, write_adapter
from tests.support.gguf_zoo import KINDS
from tests.support.tampering import change_record, forge_checksums, wrong

QUANTIZATIONS = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1")
BLOCKS = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
QUICK = {
    ("llama-spm", "q8_0"),
    ("llama3-rope", "f16"),
    ("gemma2", "q4_0"),
    ("gemma2-f16", "f32"),
    ("mixtral", "q5_1"),
    ("phi3-long", "q4_1"),
    ("qwen3", "bf16"),
    ("gemma3-multimodal", "q5_0"),
}
Tensors = dict[str, ReaderTensor]
Change = Callable[[bytearray, Tensors], None]


def merged(gguf_models: GgufModels, kind: str, quantization: str, folder: Path, **options: Any) -> Path:
    base, adapter = gguf_models(kind)
    return as_gguf(base, adapter, folder / "Model", quantization, **options)


def of_all(kind: str, quantization: str) -> Any:
    marks = [] if (kind, quantization) in QUICK else [pytest.mark.slow]
    return pytest.param(kind, quantization, marks=marks, id=f"{kind}-{quantization}")


@pytest.mark.parametrize(("kind", "quantization"), [of_all(kind, of) for kind in KINDS for of in QUANTIZATIONS])
def test_what_a_merge_writes_is_proved(kind: str, quantization: str, gguf_models: GgufModels, tmp_path: Path) -> None:
    file = merged(gguf_models, kind, quantization, tmp_path)
    for rows in (16, None):
        report = shardmerge.verify(file.parent, rows=rows).raise_for_status()
        assert report.complete and not report.notes and report.format == "gguf"
        assert report.touched and report.untouched and report.touched + report.untouched == report.tensors
        assert report.worst <= 1 and report.rows <= report.all_rows
    assert report.rows == report.all_rows
    if quantization == "q8_0":
        assert report.worst > 0.9  # half a step is the bound, and of many numbers some are nearly that far off


# --- what is changed --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def finished(gguf_models: GgufModels, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A merge that is made once and only copied."""
    return cache(
        lambda kind, quantization: merged(gguf_models, kind, quantization, tmp_path_factory.mktemp("finished"))
    )


@pytest.fixture
def changed(finished: Callable[[str, str], Path], tmp_path: Path) -> Any:
    """Copy a merge, change the file, and make the record agree with it: the report."""

    def change(kind: str, quantization: str, how: Change, **options: Any) -> VerifyReport:
        original = finished(kind, quantization)
        file = shutil.copytree(original.parent, tmp_path / "Model") / original.name
        content = bytearray(file.read_bytes())
        how(content, {tensor.name: tensor for tensor in GGUFReader(file).tensors})
        assert content != file.read_bytes()
        file.write_bytes(content)
        forge_checksums(file.parent)
        report = wrong(file.parent, **options)
        assert "checksums" not in report.counts
        return report

    return change


def place(tensor: ReaderTensor, row: int = 0) -> slice:
    """Bytes of a row."""
    width = tensor.n_bytes // int(np.prod(tensor.shape[1:]))
    return slice(tensor.data_offset + row * width, tensor.data_offset + (row + 1) * width)


def reorder(content: bytearray, tensor: ReaderTensor, order: list[int], each: int = 1) -> None:
    """Rows, or runs of ``each`` rows, in another order."""
    runs = [slice(place(tensor, at * each).start, place(tensor, (at + 1) * each - 1).stop) for at in range(len(order))]
    before = [content[run] for run in runs]
    for run, source in zip(runs, order, strict=True):
        content[run] = before[source]


def swap_rows(name: str, content: bytearray, tensors: Tensors) -> None:
    reorder(content, tensors[name], [1, 0])


def double_scale(name: str, content: bytearray, tensors: Tensors) -> None:
    at = place(tensors[name]).start
    struct.pack_into("<e", content, at, 2 * struct.unpack_from("<e", content, at)[0])


def flip(name: str, byte: int, bit: int, content: bytearray, tensors: Tensors) -> None:
    content[place(tensors[name]).start + byte] ^= 1 << bit


Q, DOWN, UP, EMBEDDING = "blk.0.attn_q.weight", "blk.1.ffn_down.weight", "blk.0.ffn_up.weight", "token_embd.weight"


def some(*rows: tuple[Any, ...]) -> list[Any]:
    """A test's rows, of which every third is in the ordinary suite."""
    return [pytest.param(*row, marks=pytest.mark.slow if number % 3 else ()) for number, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("kind", "quantization", "name", "how"),
    some(
        *(("llama-spm", of, Q, partial(swap_rows, Q)) for of in ("f32", "q8_0", "q4_0")),
        ("qwen3", "bf16", DOWN, partial(swap_rows, DOWN)),
        *(("qwen3", of.lower(), UP, partial(double_scale, UP)) for of in BLOCKS),
        ("qwen3", "f16", UP, partial(flip, UP, 1, 6)),
        ("qwen3", "q8_0", UP, partial(flip, UP, 5, 7)),
        ("qwen3", "q4_0", UP, partial(flip, UP, 5, 7)),
        ("qwen3", "q4_1", UP, partial(flip, UP, 6, 3)),
        ("qwen3", "q5_0", UP, partial(flip, UP, 3, 2)),
        ("qwen3", "q5_1", UP, partial(flip, UP, 3, 6)),  # the sign of a minimum
        # Rows that no adapter touches, and of vectors, where every number counts, the last bit.
        ("llama-spm", "q4_1", EMBEDDING, partial(swap_rows, EMBEDDING)),
        ("llama-spm", "q8_0", EMBEDDING, partial(flip, EMBEDDING, 2 + 31, 6)),
        ("llama-spm", "q8_0", "blk.1.attn_norm.weight", partial(flip, "blk.1.attn_norm.weight", 4 * 17, 0)),
        ("llama3-rope", "q8_0", "blk.0.attn_q.bias", partial(flip, "blk.0.attn_q.bias", 4 * 9 + 2, 0)),
        ("llama3-rope", "q8_0", "rope_freqs.weight", partial(flip, "rope_freqs.weight", 4 * 7, 0)),
        ("phi3-long", "q8_0", "rope_factors_long.weight", partial(flip, "rope_factors_long.weight", 0, 0)),
    ),
)
def test_other_numbers(kind: str, quantization: str, name: str, how: Change, changed: Any) -> None:
    report = changed(kind, quantization, how)
    touched = name.endswith(("_q.weight", "_down.weight", "_up.weight"))
    assert set(report.counts) == {"touched" if touched else "untouched"}
    (problem,) = report.problems
    assert problem.tensor == name and (problem.row or 0) in (0, 1, 7, 9, 17)
    assert problem.error is not None and problem.allowed is not None and problem.error > problem.allowed


def test_rows_of_heads_as_the_base_has_them(changed: Any) -> None:
    """4 heads of 16 rows, which llama.cpp has in pairs."""
    order = [head + half + 2 * pair for head in range(0, 64, 16) for half in (0, 1) for pair in range(8)]
    report = changed("llama-spm", "q8_0", lambda content, tensors: reorder(content, tensors[Q], order))
    assert [problem.tensor for problem in report.problems] == [Q]


def test_experts_in_another_order(changed: Any) -> None:
    name = "blk.1.ffn_gate_exps.weight"
    rows = KINDS["mixtral"].settings["num_local_experts"]
    order = [1, 0, *range(2, rows)]
    report = changed("mixtral", "q4_0", lambda content, tensors: reorder(content, tensors[name], order, each=80))
    assert {problem.tensor for problem in report.problems} == {name} and report.counts["touched"] == 2


def test_gate_and_up_in_another_order(changed: Any) -> None:
    report = changed("phi3", "q8_0", lambda content, tensors: reorder(content, tensors[UP], [1, 0], each=80))
    assert [problem.tensor for problem in report.problems] == [UP]


def test_a_norm_without_its_one(changed: Any) -> None:
    name = "blk.0.post_ffw_norm.weight"

    def subtract(content: bytearray, tensors: Tensors) -> None:
        at = tensors[name].data_offset
        values = np.frombuffer(content[at : at + 256], dtype="<f4") - np.float32(1)
        content[at : at + 256] = values.tobytes()

    assert [problem.tensor for problem in changed("gemma3", "q8_0", subtract).problems] == [name]


@pytest.mark.parametrize("quantization", ["f16", "q8_0", "q4_0", "q5_1"])
def test_another_scaling_of_the_adapter(quantization: str, gguf_models: GgufModels, tmp_path: Path) -> None:
    base, adapter = gguf_models("qwen2-yarn")
    file = as_gguf(base, adapter, tmp_path / "Model", quantization)
    settings = config(base, adapter, tmp_path / "other" / "Model", format="gguf", quantization=quantization)
    settings["adapters"] = [{"path": str(adapter), "weight": 1.5}]
    shardmerge.merge(settings)
    shutil.copy(tmp_path / "other" / "Model" / file.name, file)
    forge_checksums(file.parent)
    report = wrong(file.parent)
    assert set(report.counts) == {"touched"} and report.counts["touched"] == report.touched


def test_a_row_that_is_not_in_the_sample(changed: Any, tmp_path: Path) -> None:
    """`--all` finds it."""

    def change(content: bytearray, tensors: Tensors) -> None:
        flip_row(content, tensors, 200)

    with pytest.raises(pytest.fail.Exception):  # nothing is found
        changed("llama-spm", "q8_0", change, rows=2)
    assert wrong(tmp_path / "Model", rows=None).problems[0].row == 200


def flip_row(content: bytearray, tensors: Tensors, row: int) -> None:
    content[place(tensors[EMBEDDING], row).start + 9] ^= 1 << 6


def test_a_row_that_only_the_checksum_tells(gguf_models: GgufModels, tmp_path: Path) -> None:
    """Then every row is looked at."""
    file = merged(gguf_models, "llama-spm", "q8_0", tmp_path)
    content = bytearray(file.read_bytes())
    flip_row(content, {tensor.name: tensor for tensor in GGUFReader(file).tensors}, 200)
    file.write_bytes(content)
    report = wrong(file.parent, rows=2)
    assert [problem.kind for problem in report.problems] == ["checksums", "untouched"]
    assert report.problems[1].row == 200


# --- a merge that is wrong itself -------------------------------------------------------------------------------------


def unturned(encoding: Encoding, tile: torch.Tensor, space: torch.Tensor) -> torch.Tensor:
    return tile.to(torch.float32) + float(encoding.setting("addend", 0.0))


def unshifted(encoding: Encoding, tile: torch.Tensor, space: torch.Tensor) -> torch.Tensor:
    return tile.to(torch.float32)


@pytest.mark.parametrize(
    ("kind", "arrange", "tensor"),
    [("llama-spm", unturned, "blk.0.attn_k.weight"), ("gemma2", unshifted, "output_norm.weight")],
)
def test_a_merge_that_forgets_what_the_format_asks_for(
    kind: str, arrange: Any, tensor: str, gguf_models: GgufModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ggml_blocks, "arrange", arrange)
    file = merged(gguf_models, kind, "q8_0", tmp_path)
    assert tensor in {problem.tensor for problem in wrong(file.parent).problems}


@pytest.mark.parametrize("quantization", ["q8_0", "q4_0", "q5_0", "q4_1", "q5_1"])
def test_a_quantiser_that_is_a_hundredth_off(
    quantization: str, gguf_models: GgufModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(out: torch.Tensor, tile: torch.Tensor, kind: str, scratch: torch.Tensor) -> None:
        quantize_into(out, tile * 1.01, kind, scratch)

    monkeypatch.setattr(ggml_blocks, "quantize_into", off)
    file = merged(gguf_models, "qwen2-yarn", quantization, tmp_path)
    report = wrong(file.parent)
    assert sum(report.counts.values()) == report.tensors


# --- the header -------------------------------------------------------------------------------------------------------


def after(content: bytearray, name: str) -> int:
    """Where what follows a name begins, in the header."""
    needle = struct.pack("<Q", len(name)) + name.encode()
    assert content.count(needle) == 1
    return content.index(needle) + len(needle)


def put(name: str, at: int, layout: str, value: Any, content: bytearray, _: Tensors) -> None:
    struct.pack_into(layout, content, after(content, name) + at, value)


def swap_names(content: bytearray, _: Tensors) -> None:
    one, other = (after(content, f"blk.0.attn_{which}.weight") - 8 for which in "kv")
    content[one], content[other] = content[other], content[one]


def fill_padding(content: bytearray, tensors: Tensors) -> None:
    start = min(tensor.data_offset for tensor in tensors.values())
    assert not any(content[start - 2 : start])
    content[start - 1] = 1


@pytest.mark.parametrize(
    ("how", "text"),
    some(
        (partial(put, "llama.block_count", 4, "<I", 3), "llama.block_count is 3, but there are tensors of 2 layers"),
        (partial(put, "llama.block_count", 4, "<I", 3), "config.json says num_hidden_layers 2"),
        (partial(put, "llama.attention.head_count", 4, "<I", 8), "the key-values make it"),
        (partial(put, "llama.attention.head_count_kv", 4, "<I", 4), "llama.attention.head_count_kv is 4, expected 2"),
        (partial(put, "llama.rope.freq_base", 4, "<f", 5e5), "llama.rope.freq_base is 500000.0, expected 10000.0"),
        (partial(put, "general.architecture", 12, "3s", b"abc"), "there is no abcma.block_count"),
        (partial(put, "general.file_type", -4, "4s", b"tyqe"), "there is no general.file_type"),
        (partial(put, "tokenizer.ggml.tokens", 4 + 12 + 8, "1s", b"x"), "tokenizer.ggml.tokens is 384 items"),
        (partial(put, Q, 4, "<Q", 32), "blk.0.attn_q.weight is Q8_0 [64, 32]"),
        (partial(put, Q, 20, "<I", 3), "blk.0.attn_q.weight is Q4_1"),
        (partial(put, Q, 20, "<I", 99), "is of type 99"),
        (partial(put, Q, 24, "<Q", 0), "begins at 0 of the data"),
        (partial(put, Q, -1, "1s", b"x"), "blk.0.attn_q.weight is missing"),
        (swap_names, "blk.0.attn_k.weight is"),
        (fill_padding, "the padding before its data is not zero"),
        (lambda content, _: content.extend(bytes(32)), "its tensors end at byte"),
        (lambda content, _: content.__delitem__(slice(-32, None)), "its tensors end at byte"),
        (lambda content, _: content.__setitem__(0, 0), "it is not a GGUF file"),
        (lambda content, _: content.__setitem__(4, 2), "GGUF version 2"),
    ),
)
def test_another_header(how: Change, text: str, changed: Any) -> None:
    report = changed("llama-spm", "q8_0", how)
    assert any(text in problem.text and problem.kind == "structure" for problem in report.problems), report.problems


def test_tensors_lie_one_after_the_other(tmp_path: Path) -> None:
    """Of 8 and of 12 numbers in float32, so that 16 bytes are missing to 32 behind the second."""

    def told(data: bytes, first: int = 0, second: int = 32) -> list[str]:
        path = tmp_path / "it"
        path.write_bytes(data)
        infos = {
            "one": TensorInfo("F32", (8,), (first, first + 32)),
            "two": TensorInfo("F32", (12,), (second, second + 48)),
        }
        file = LocalSource(str(tmp_path)).stat("it")
        findings = Findings("it", 0)
        check_places("it", file, GgufHeader({}, infos, 32, 64), Files([file]), findings)
        return [problem.text for problem in findings.problems]

    right = bytes(64) + b"\1" * 80 + bytes(16)
    assert told(right) == []
    assert told(right[:-1] + b"\1") == ["it: the padding after two is not zero"]
    assert told(right[:-16]) == ["it: its tensors end at byte 160, the file at 144"]
    assert told(right, second=0) == ["it: two begins at 0 of the data, where 32 is expected"]
    assert told(right, second=64) == ["it: two begins at 64 of the data, where 32 is expected"]


def test_a_header_is_read_as_the_gguf_package_reads_it(gguf_models: GgufModels, tmp_path: Path) -> None:
    for kind, quantization in (("mixtral", "q5_0"), ("gemma3", "bf16")):
        file = merged(gguf_models, kind, quantization, tmp_path / kind)
        content, reader = file.read_bytes(), GGUFReader(file)
        header = parse(content)
        assert header.data_start == reader.data_offset and header.values.keys() == {
            name for name in reader.fields if not name.startswith("GGUF.")
        }
        for tensor in reader.tensors:
            info = header.tensors[tensor.name]
            assert (info.dtype, list(info.shape)) == (tensor.tensor_type.name, tensor.shape[::-1].tolist())
            assert header.data_start + info.data_offsets[0] == tensor.data_offset and info.nbytes == tensor.n_bytes
        for key, (_, value) in header.values.items():
            if isinstance(value, (int, float, str)):
                assert value == reader.fields[key].contents()


def parse(content: bytes) -> Any:
    return read_header(lambda offset, size: content[offset : offset + size], len(content), "it")


def test_a_hostile_header(gguf_models: GgufModels, tmp_path: Path) -> None:
    """No byte of it leads to anything but a refusal or a header, and no count is believed."""
    file = merged(gguf_models, "llama-spm", "q8_0", tmp_path)
    content = file.read_bytes()
    end = parse(content).data_start
    chooser = random.Random(0)
    for stop in (0, 3, 4, 23, *(chooser.randrange(end) for _ in range(40))):
        with pytest.raises(FormatError):
            parse(content[:stop])
    refused = 0
    for _ in range(300):
        other = bytearray(content)
        other[chooser.choice((chooser.randrange(end), chooser.randrange(600)))] ^= 1 << chooser.randrange(8)
        try:
            parse(bytes(other))
        except FormatError:
            refused += 1
    assert refused > 50
    for absurd in (
        struct.pack("<4sIQQ", b"GGUF", 3, 1 << 60, 0),
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1 << 60),
        struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 4, 1 << 60),
        struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 8, 1 << 24) + bytes(8),
        struct.pack("<4sIQQQ1sIIQ", b"GGUF", 3, 0, 1, 1, b"k", 9, 9, 1),
        struct.pack("<4sIQQQ1sIQ", b"GGUF", 3, 0, 1, 1, b"k", 8, 1 << 60),
        struct.pack("<4sIQQQ1sI4QIQ", b"GGUF", 3, 1, 0, 1, b"t", 4, *[1 << 63] * 4, 0, 0),
        struct.pack("<4sIQQQ1sI1QIQ", b"GGUF", 3, 1, 0, 1, b"t", 1, 33, 8, 0),
        struct.pack("<4sIQQQ1sI1QIQ", b"GGUF", 3, 1, 0, 1, b"t", 1, 0, 0, 0),
        struct.pack("<4sIQQQ17sII", b"GGUF", 3, 0, 1, 17, b"general.alignment", 4, 0),
    ):
        with pytest.raises(FormatError):
            parse(absurd)


# --- what is not at hand ----------------------------------------------------------------------------------------------


def test_base_or_adapter_is_gone(gguf_models: GgufModels, tmp_path: Path) -> None:
    base, adapter = (shutil.copytree(of, tmp_path / of.name) for of in gguf_models("llama-spm"))
    file = as_gguf(base, adapter, tmp_path / "Model", "q4_0")
    adapter.rename(tmp_path / "elsewhere")
    report = shardmerge.verify(file.parent).raise_for_status(partial=True)
    assert report.ok and not report.complete and (report.untouched, report.touched) == (7, 0)
    assert shardmerge.verify(file.parent, adapters=[str(tmp_path / "elsewhere")]).raise_for_status().complete
    base.rename(tmp_path / "other")
    report = shardmerge.verify(file.parent).raise_for_status(partial=True)
    assert report.ok and not report.complete and (report.untouched, report.checksums, report.tensors) == (0, 1, 21)
    content = bytearray(file.read_bytes())
    put("llama.block_count", 4, "<I", 3, content, {})
    file.write_bytes(content)
    forge_checksums(file.parent)
    assert set(wrong(file.parent).counts) == {"structure"}


def test_without_the_adapter_the_rest_is_compared(changed: Any, tmp_path: Path) -> None:
    def change(content: bytearray, tensors: Tensors) -> None:
        swap_rows(EMBEDDING, content, tensors)
        swap_rows(Q, content, tensors)

    report = changed("llama-spm", "q4_0", change)
    assert {problem.tensor for problem in report.problems} == {EMBEDDING, Q}
    report = wrong(tmp_path / "Model", adapters=[str(tmp_path / "gone")])
    assert {problem.tensor for problem in report.problems} == {EMBEDDING}


def test_the_folder_may_move(gguf_models: GgufModels, tmp_path: Path) -> None:
    file = merged(gguf_models, "llama-spm", "q8_0", tmp_path)
    moved = file.parent.rename(tmp_path / "elsewhere")
    report = shardmerge.verify(moved).raise_for_status()
    assert report.complete and not report.notes


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "float16"},
        {"dtype": "bfloat16", "rounding": "stochastic", "seed": 3},
        {"dtype": "float16", "rounding": "stochastic"},
    ],
    ids=str,
)
@pytest.mark.parametrize(("kind", "quantization"), [("gemma2-f16", "q8_0"), ("llama3-rope", "f16")])
def test_other_dtypes_in_between(
    kind: str, quantization: str, options: dict[str, Any], gguf_models: GgufModels, tmp_path: Path
) -> None:
    file = merged(gguf_models, kind, quantization, tmp_path, **options)
    report = shardmerge.verify(file.parent, rows=None).raise_for_status()
    assert report.complete and not report.notes


def test_an_export_and_the_command_line(
    gguf_models: GgufModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = gguf_models("llama-spm")
    output = tmp_path / "Model"
    invoke(monkeypatch, "export", base, "--format", "gguf", "--quantization", "q5_0", "-o", output)
    report = invoke_json(monkeypatch, "verify", output)
    assert report["complete"] and report["format"] == "gguf" and report["touched"] == 0
    file = output / "Model-q5_0.gguf"
    content = bytearray(file.read_bytes())
    tensors = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    file.write_bytes(content[:-1])
    assert "1 problem" not in invoke(monkeypatch, "verify", output, code=6).output
    swap_rows(Q, content, tensors)
    file.write_bytes(content)
    assert f"{Q}, row 0" in invoke(monkeypatch, "verify", output, code=6).output
    forge_checksums(output)
    report = invoke_json(monkeypatch, "verify", output, "--all", code=6)
    assert report["problems"][0]["tensor"] == Q
    file.unlink()
    assert "is missing" in invoke(monkeypatch, "verify", output, code=6).output


def test_a_record_of_several_files(gguf_models: GgufModels, tmp_path: Path) -> None:
    file = merged(gguf_models, "llama-spm", "q8_0", tmp_path)
    change_record(file.parent, lambda record: record["shards"].update({"other.gguf": record["shards"][file.name]}))
    assert any("a GGUF file is one" in problem.text for problem in wrong(file.parent).problems)


@pytest.mark.parametrize(
    "method",
    [
        peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "k_proj"], init_lora_weights=False),
        # Whole matrices are looked at, or groups of rows, which the file has apart.
        peft.OSFConfig(target_modules=["q_proj", "down_proj"]),
        peft.MissConfig(r=16, target_modules=["q_proj", "down_proj"], init_weights="bat"),
    ],
    ids=lambda method: method.peft_type.value,
)
def test_other_methods(method: Any, gguf_models: GgufModels, tmp_path: Path) -> None:
    base, _ = gguf_models("llama-spm")
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), method)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    file = as_gguf(base, tmp_path / "adapter", tmp_path / "Model", "q8_0")
    for rows in (5, None):
        report = shardmerge.verify(file.parent, rows=rows).raise_for_status()
        assert report.complete and not report.notes and report.touched == 4


def test_progress(gguf_models: GgufModels, tmp_path: Path) -> None:
    file = merged(gguf_models, "mixtral", "q4_0", tmp_path)
    seen: list[Progress] = []
    shardmerge.verify(file.parent, progress=seen.append).raise_for_status()
    assert seen[0].done == 0 and seen[-1].done == seen[-1].total
    assert [of.done for of in seen] == sorted(of.done for of in seen)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(gguf_models: GgufModels, tmp_path: Path) -> None:
    source, adapter = gguf_models("llama-spm")
    base, wide = tmp_path / "base", 1024
    shutil.copytree(source, base, ignore=shutil.ignore_patterns("*.safetensors*"))
    settings = json.loads((base / "config.json").read_text())
    write_json(base / "config.json", {**settings, "hidden_size": wide, "intermediate_size": 8 * wide, "head_dim": 256})
    sizes = {64: wide, 80: 8 * wide, 32: wide // 2}
    tensors = {
        name: torch.randn([sizes.get(size, size) for size in tensor.shape], dtype=torch.float16)
        for name, tensor in read_tensors(source).items()
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    large = as_gguf(base, write_adapter(base, tmp_path / "adapter"), tmp_path / "Model", "q8_0")
    small = as_gguf(source, adapter, tmp_path / "small" / "Model", "q8_0")
    grown, size = growth_of_verify(small.parent, large.parent, "*.gguf")
    assert size > 55 << 20 and grown < 24 << 20


# --- blocks -----------------------------------------------------------------------------------------------------------


def hard_rows() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Numbers that quantisers find hard: zeros, ties, constants, outliers, the smallest and the largest."""
    made = np.random.default_rng(5)
    rows = made.normal(size=(40, 64)).astype(np.float32)
    rows[0] = 0
    rows[1, :32] = 0.25
    rows[2] *= 1e-9  # d is 0 in float16
    rows[3] *= 1e-6  # d is not a normal number there
    rows[4] *= 4e3
    rows[5, 7] = 1e4
    rows[6] = np.abs(rows[6])
    rows[7] = -np.abs(rows[7])
    rows[8, 3], rows[8, 9] = 7.5, -7.5
    rows[9] = np.arange(64, dtype=np.float32) - 31.5
    rows[10] = np.arange(64, dtype=np.float32) % 16
    rows[11] *= 1e-30
    rows[12, :] = -0.0
    rows[13, 5] = -0.0
    return rows


def problems_of(data: np.ndarray[Any, Any], kind: str, values: np.ndarray[Any, Any]) -> list[str]:
    exact = torch.from_numpy(values).double()
    found = compare(torch.from_numpy(data.copy()), kind, exact, exact)
    return [of.what for of in found if not bool(((of.least <= of.found) & (of.found <= of.largest)).all())]


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_are_what_the_gguf_package_makes_and_reads(kind: str) -> None:
    values = hard_rows()
    data = quants.quantize(values, GGMLQuantizationType[kind])
    assert problems_of(data, kind, values) == []
    exact = torch.from_numpy(values).double()
    (found,) = (of.found for of in compare(torch.from_numpy(data), kind, exact, exact) if of.what == "value")
    np.testing.assert_allclose(found.numpy(), quants.dequantize(data, GGMLQuantizationType[kind]), rtol=1e-6)


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_bit_of_a_block_counts(kind: str) -> None:
    """Each bit of d and m is found, and of levels all but such as go from one side of a tie to the other."""
    values = np.random.default_rng(1).normal(size=(1, 32)).astype(np.float32)
    data = quants.quantize(values, GGMLQuantizationType[kind])
    scales = 4 if kind.endswith("1") else 2
    missed = []
    for bit in range(8 * data.size):
        other = data.copy()
        other[0, bit // 8] ^= 1 << bit % 8
        if not problems_of(other, kind, values):
            missed.append(bit)
    assert all(bit >= 8 * scales for bit in missed) and len(missed) <= 6
    # Only the lowest bits of levels: those next to the other level of a tie.
    assert all(bit % (8 if kind == "Q8_0" else 4) == 0 for bit in missed)


def test_rounding_is_that_of_torch() -> None:
    torch.manual_seed(0)
    values = torch.cat([torch.randn(4096), torch.randn(4096) * 1e-6, torch.tensor([0.0, 65504.0, 2.0**-24, 2.0**-25])])
    for code, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        assert torch.equal(rounded(values.double(), code), values.to(dtype).double())
        down, up = rounded(values.double(), code, -1), rounded(values.double(), code, 1)
        assert bool(((down <= values) & (values <= up)).all()) and bool((up > down).any())
        for end in (down, up):
            assert torch.equal(end.to(dtype).double(), end)
