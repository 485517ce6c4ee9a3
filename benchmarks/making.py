"""Write checkpoints and adapters of real shapes as streams: made anywhere, without the model in memory.

Weights are bf16 with a standard deviation of 0.02, taken from one block of random values at random places; norms are
ones. Both folders load with transformers and PEFT. A finished shape is used again.

    python -m benchmarks.making tinyllama --rank 64
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from benchmarks.shapes import BF16_BYTES, DEFAULT_RANK, SHAPES, Shape, Tensor, nbytes, total_bytes

MARKER = "complete.json"
STD = 0.02
_BLOCK_VALUES = 1 << 20
_CHUNK_BYTES = 1 << 19


@dataclass(frozen=True, slots=True)
class Made:
    """Where a shape lies."""

    base: Path
    adapter: Path

    def files(self) -> list[Path]:
        return sorted(path for folder in (self.base, self.adapter) for path in folder.iterdir())

    def base_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.base.iterdir())


def default_work() -> Path:
    return Path(tempfile.gettempdir()) / "shardmerge-bench"


def place(shape: Shape, work: Path) -> Made:
    """Where `ensure` puts a shape. Its adapters of all ranks lie beside one base."""
    folder = work / shape.name
    return Made(folder / "base", folder / ("adapter" if shape.rank == DEFAULT_RANK else f"adapter-rank{shape.rank}"))


def is_made(shape: Shape, work: Path) -> bool:
    """Whether the base is there, with its adapter of the default rank."""
    marker = work / shape.name / MARKER
    return marker.is_file() and marker.read_text() == _stamp(shape)


def _stamp(shape: Shape) -> str:
    return json.dumps(dataclasses.asdict(shape.with_rank(DEFAULT_RANK)))


def ensure(shape: Shape, work: Path) -> Made:
    """Make a shape under ``work``, as far as it is not there already."""
    if not is_made(shape, work):
        plain = shape.with_rank(DEFAULT_RANK)
        made = place(plain, work)
        folder = made.base.parent
        if folder.exists():
            shutil.rmtree(folder)
        made.base.mkdir(parents=True)
        values = Values(shape.name)
        _write_base(plain, made.base, values)
        _write_adapter(plain, made.adapter, values)
        (folder / MARKER).write_text(_stamp(shape))
    made = place(shape, work)
    if not made.adapter.exists():
        unfinished = made.adapter.with_name(made.adapter.name + ".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        _write_adapter(shape, unfinished, Values(made.adapter.name))
        unfinished.rename(made.adapter)
    return made


class Values:
    """Random bf16 values, cheap: every chunk is a piece of one block."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)
        floats = array("f", (self._random.gauss(0.0, STD) for _ in range(_BLOCK_VALUES))).tobytes()
        block = bytearray(_BLOCK_VALUES * BF16_BYTES)
        # The upper two bytes of a little-endian float32 are a bf16.
        block[0::2], block[1::2] = floats[2::4], floats[3::4]
        self._block = memoryview(bytes(block))
        self._ones = b"\x80\x3f" * (_CHUNK_BYTES // BF16_BYTES)

    def chunks(self, tensor: Tensor) -> Iterator[bytes | memoryview]:
        name, shape = tensor
        left = nbytes(shape)
        while left:
            size = min(left, _CHUNK_BYTES)
            start = self._random.randrange(0, len(self._block) - size + 1, BF16_BYTES)
            yield self._ones[:size] if name.endswith("norm.weight") else self._block[start : start + size]
            left -= size


def _write_adapter(shape: Shape, folder: Path, values: Values) -> None:
    folder.mkdir()
    _write_file(folder / "adapter_model.safetensors", list(shape.adapter_tensors()), values)
    _write_json(folder / "adapter_config.json", shape.adapter_config())


def _write_base(shape: Shape, folder: Path, values: Values) -> None:
    shards = _split(list(shape.base_tensors()), shape.shards)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        _write_file(folder / name, tensors, values)
    if len(shards) > 1:
        weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor, _ in tensors}
        index = {"metadata": {"total_size": sum(map(total_bytes, shards))}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", shape.config())


def _split(tensors: list[Tensor], count: int) -> list[list[Tensor]]:
    """Shards of about the same size, in the order of the tensors."""
    total = total_bytes(tensors)
    shards: list[list[Tensor]] = [[] for _ in range(count)]
    start = 0
    for tensor in tensors:
        shards[start * count // total].append(tensor)
        start += nbytes(tensor[1])
    return shards


def _write_file(path: Path, tensors: list[Tensor], values: Values) -> None:
    """One safetensors file, its tensors sorted by name as the library sorts them."""
    tensors = sorted(tensors)
    with open(path, "wb") as file:
        file.write(_header(tensors))
        _write_all(file, (chunk for tensor in tensors for chunk in values.chunks(tensor)))


def _write_all(file: BinaryIO, chunks: Iterable[bytes | memoryview]) -> None:
    for chunk in chunks:
        file.write(chunk)


def _header(tensors: list[Tensor]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + nbytes(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def add_work_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", type=Path, default=default_work(), help="folder for bases, adapters and outputs")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.making", description="Make a base and an adapter.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--rank", type=int, default=DEFAULT_RANK)
    add_work_option(parser)
    options = parser.parse_args()
    made = ensure(SHAPES[options.shape].with_rank(options.rank), options.work)
    print(f"{made.base}\n{made.adapter}")


if __name__ == "__main__":
    main()
