"""Files that are not what their names promise: the message says what they are, whoever reads them."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shardmerge
from shardmerge.file_formats.recognise import HEAD_BYTES, what_is
from tests.support.builders import llama_tensors, make_place, peft_tensors


def saved(legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save({"x": torch.ones(2)}, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


#: Of the real tools, or as the servers answer.
FILES: dict[str, tuple[bytes, str]] = {
    "git lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:"
        b"4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n",
        "Git LFS pointer",
    ),
    "xet": (b"# xet version 0\nfilesize = 1234\nhash = 'abc'\n", "pointer"),
    "html": (b"<!DOCTYPE html>\n<html class=''>\n<head><title>Hugging Face</title></head>" + b" " * 600, "HTML page"),
    "html without a doctype": (b"\n <html><body>502 Bad Gateway</body></html>\r\n", "HTML page"),
    "s3": (b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>', "XML"),
    "an answer": (b"Entry not found", "server's answer, 'Entry not found'"),
    "an answer in JSON": (b'{"error":"Invalid credentials in Authorization header"}', "server's answer"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(50), "GGUF"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(600), "HDF5"),
    "gzip": (gzip.compress(b"x" * 100), "gzip"),
    "zeros": (bytes(4096), "download is incomplete"),
}


@pytest.mark.parametrize(("content", "said"), FILES.values(), ids=FILES)
@pytest.mark.parametrize(
    "file", ["base/model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_model.bin"]
)
def test_weights_that_are_something_else(tmp_path: Path, content: bytes, said: str, file: str) -> None:
    place = make_place(tmp_path, shards=1)
    if file.endswith(".bin"):
        (place.adapter / "adapter_model.safetensors").unlink()
    (tmp_path / file).write_bytes(content)
    with pytest.raises(shardmerge.ShardmergeError) as raised:
        shardmerge.plan(place.config())
    assert f"{tmp_path / file}: it " in str(raised.value)
    assert said in str(raised.value)
    assert raised.value.exit_code == 4


@pytest.mark.parametrize("name", ["git lfs", "xet", "html", "s3"])
@pytest.mark.parametrize(
    "file", ["base/config.json", "base/model.safetensors.index.json", "adapter/adapter_config.json"]
)
def test_json_that_is_something_else(tmp_path: Path, name: str, file: str) -> None:
    place = make_place(tmp_path)
    (tmp_path / file).write_bytes(FILES[name][0])
    with pytest.raises(shardmerge.FormatError, match=FILES[name][1]):
        shardmerge.plan(place.config())


def test_a_pickle_by_the_name_of_safetensors(tmp_path: Path) -> None:
    place = make_place(tmp_path, shards=1)
    for content, said in ((saved(), "zip archive"), (saved(legacy=True), "before PyTorch 1.6")):
        (place.base / "model.safetensors").write_bytes(content)
        with pytest.raises(shardmerge.FormatError, match=said):
            shardmerge.plan(place.config())


def test_safetensors_by_the_name_of_a_pickle(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    (place.adapter / "adapter_model.safetensors").rename(place.adapter / "adapter_model.bin")
    with pytest.raises(shardmerge.FormatError, match=r"it is a safetensors file; give it the ending \.safetensors"):
        shardmerge.plan(place.config())


def test_what_is_right_is_nothing_else(tmp_path: Path) -> None:
    """No head of real weights is taken for another file."""
    for number, tensors in enumerate((llama_tensors(), peft_tensors())):
        save_file(tensors, tmp_path / str(number))
        assert what_is((tmp_path / str(number)).read_bytes()[:HEAD_BYTES]) is None
    assert what_is(b"") is None
    assert what_is(b'{"model_type": "llama"}') is None
