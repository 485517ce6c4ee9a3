"""Checkpoints and adapters of real shapes, written as streams: made anywhere, without the model in memory.

Weights are bf16 with a standard deviation of 0.02, taken from one block of random values at random places; norms are
ones. Both folders load with transformers and PEFT. A finished shape is used again.

    python -m benchmarks.shapes tinyllama
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MARKER = "complete.json"
STD = 0.02
ALPHA = 32
_BLOCK_VALUES = 1 << 20
_CHUNK_BYTES = 1 << 19
_BF16_BYTES = 2

#: A tensor's name and shape.
Tensor = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama: untied, bf16, with an adapter on all of its linear layers."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    shards: int = 1
    rank: int = 16

    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one layer, each as (out, in)."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }

    def base_tensors(self) -> Iterator[Tensor]:
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            for module, shape in self.linears().items():
                yield f"{prefix}{module}.weight", shape
            yield f"{prefix}input_layernorm.weight", (self.hidden,)
            yield f"{prefix}post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    def adapter_tensors(self) -> Iterator[Tensor]:
        for layer in range(self.layers):
            for module, (out, into) in self.linears().items():
                prefix = f"base_model.model.model.layers.{layer}.{module}"
                yield f"{prefix}.lora_A.weight", (self.rank, into)
                yield f"{prefix}.lora_B.weight", (out, self.rank)

    def config(self) -> dict[str, object]:
        """config.json of the base."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-05,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }

    def adapter_config(self) -> dict[str, object]:
        """adapter_config.json."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": ALPHA,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
            "target_modules": sorted(module.rpartition(".")[2] for module in self.linears()),
        }


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", layers=2, hidden=256, ffn=512, heads=4, kv_heads=2, vocab=1000, shards=2),
        Shape("tinyllama", layers=22, hidden=2048, ffn=5632, heads=32, kv_heads=4, vocab=32000),
        Shape("llama3-8b", layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, vocab=128256, shards=4),
        # 63 small tensors a shard: what counts is how many headers there are.
        Shape("index-1000", layers=1000, hidden=16, ffn=16, heads=2, kv_heads=1, vocab=64, shards=1000, rank=16),
        Shape("index-1000-wide", layers=7000, hidden=16, ffn=16, heads=2, kv_heads=1, vocab=64, shards=1000, rank=16),
    )
}


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
    """Where `ensure` puts a shape."""
    return Made(work / shape.name / "base", work / shape.name / "adapter")


def ensure(shape: Shape, work: Path) -> Made:
    """Make a shape under ``work``, unless it is there already."""
    made = place(shape, work)
    folder = made.base.parent
    stamp = json.dumps(dataclasses.asdict(shape))
    marker = folder / MARKER
    if marker.is_file() and marker.read_text() == stamp:
        return made
    if folder.exists():
        shutil.rmtree(folder)
    made.base.mkdir(parents=True)
    made.adapter.mkdir()
    values = Values(shape.name)
    _write_base(shape, made.base, values)
    _write_file(made.adapter / "adapter_model.safetensors", list(shape.adapter_tensors()), values)
    _write_json(made.adapter / "adapter_config.json", shape.adapter_config())
    marker.write_text(stamp)
    return made


class Values:
    """Random bf16 values, cheap: every chunk is a piece of one block."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)
        floats = array("f", (self._random.gauss(0.0, STD) for _ in range(_BLOCK_VALUES))).tobytes()
        block = bytearray(_BLOCK_VALUES * _BF16_BYTES)
        # The upper two bytes of a little-endian float32 are a bf16.
        block[0::2], block[1::2] = floats[2::4], floats[3::4]
        self._block = memoryview(bytes(block))
        self._ones = b"\x80\x3f" * (_CHUNK_BYTES // _BF16_BYTES)

    def chunks(self, tensor: Tensor) -> Iterator[bytes | memoryview]:
        name, shape = tensor
        left = _nbytes(shape)
        while left:
            size = min(left, _CHUNK_BYTES)
            start = self._random.randrange(0, len(self._block) - size + 1, _BF16_BYTES)
            yield self._ones[:size] if name.endswith("norm.weight") else self._block[start : start + size]
            left -= size


def _nbytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _BF16_BYTES


def _write_base(shape: Shape, folder: Path, values: Values) -> None:
    shards = _split(list(shape.base_tensors()), shape.shards)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        _write_file(folder / name, tensors, values)
    if len(shards) > 1:
        weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor, _ in tensors}
        total = sum(_nbytes(shape) for tensors in shards for _, shape in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", shape.config())


def _split(tensors: list[Tensor], count: int) -> list[list[Tensor]]:
    """Shards of about the same size, in the order of the tensors."""
    total = sum(_nbytes(shape) for _, shape in tensors)
    shards: list[list[Tensor]] = [[] for _ in range(count)]
    start = 0
    for tensor in tensors:
        shards[start * count // total].append(tensor)
        start += _nbytes(tensor[1])
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
        start, end = end, end + _nbytes(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def add_work_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", type=Path, default=default_work(), help="folder for bases, adapters and outputs")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a base and an adapter of a real shape.")
    parser.add_argument("shape", choices=SHAPES)
    add_work_option(parser)
    options = parser.parse_args()
    made = ensure(SHAPES[options.shape], options.work)
    print(f"{made.base}\n{made.adapter}")


if __name__ == "__main__":
    main()
