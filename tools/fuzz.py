"""A coverage-guided fuzzer over all that reads strangers' files: nothing but a `ShardmergeError` may come of it.

::

    pip install atheris        # not a dependency: run by hand, its findings are tests
    python -m tools.fuzz header -max_total_time=120

The targets are those of `TARGETS`; what follows goes to libFuzzer. What it finds lies in ./crash-… or ./timeout-….
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardmerge.config.schema import AdapterConfig, MergeConfig
from shardmerge.errors import ShardmergeError
from shardmerge.file_formats.adapter_file import CONFIG_NAME, AdapterFile
from shardmerge.file_formats.checkpoint import open_checkpoint
from shardmerge.file_formats.checkpoint_files import read_json
from shardmerge.file_formats.safetensors_header import encode, read_header
from shardmerge.file_formats.torch_pickle import read_pickled
from shardmerge.sources.local import LocalSource
from shardmerge.spec.tensors import SourceFile, TensorInfo, TensorRef

FOLDER = Path(tempfile.mkdtemp(prefix="shardmerge-fuzz-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None))
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
SETTINGS = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "rank_pattern": {"q": 4}}


def header(data: bytes) -> None:
    """Every read lies in the file, and so does every tensor of a header that is accepted.

    JSON is given the length before it and 32 bytes behind it.
    """
    if data.startswith(b"{"):
        data = len(data).to_bytes(8, "little") + data + bytes(32)

    def read(offset: int, size: int) -> bytes:
        assert offset >= 0 and size >= 0
        return data[offset : offset + size]

    _, tensors, start = read_header(read, len(data), "fuzzed")
    for info in tensors.values():
        assert 0 <= info.data_offsets[0] <= info.data_offsets[1] <= len(data) - start


def index(data: bytes) -> None:
    (FOLDER / "model.safetensors.index.json").write_bytes(data)
    open_checkpoint(LocalSource(str(FOLDER)))


def settings(data: bytes) -> None:
    """An adapter_config.json, and what is claimed by it."""
    (FOLDER / CONFIG_NAME).write_bytes(data)
    source = LocalSource(str(FOLDER))
    config = read_json(source, CONFIG_NAME)
    shapes = {f"{MODULE}.lora_A.weight": (4, 8), f"{MODULE}.lora_B.weight": (6, 4)}
    tensors = {name: TensorRef(name, "fuzzed", "F32", shape, 0, 96) for name, shape in shapes.items()}
    adapter = AdapterFile(source, (SourceFile("fuzzed", 96),), None, config, tensors, {})
    adapter.claims(AdapterConfig(path="fuzzed"))


def pickled(data: bytes) -> None:
    """The pickle in an archive, or (if it begins so) the archive itself."""
    path = FOLDER / "fuzzed.pt"
    if data.startswith(b"PK"):
        path.write_bytes(data)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in (("data.pkl", data), ("version", b"3\n"), ("data/0", bytes(96))):
                archive.writestr(f"x/{name}", content)
    for ref in read_pickled(path, str(path)).values():
        assert 0 <= ref.offset <= ref.offset + ref.nbytes <= path.stat().st_size


def config(data: bytes) -> None:
    path = FOLDER / "config.yaml"
    path.write_bytes(data)
    MergeConfig.from_file(path)


def _pickles() -> list[bytes]:
    """What torch.save writes, made by a process of its own: nothing here needs torch, which is long to instrument."""
    path = FOLDER / "seed.pt"
    state = "{'a': torch.ones(4, 6), 'b': torch.nn.Parameter(torch.ones(3).half()), 'c': torch.ones(4, 6).T}"
    subprocess.run([sys.executable, "-c", f"import torch; torch.save({state}, {str(path)!r})"], check=True)
    with zipfile.ZipFile(path) as archive:
        inner = [archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")]
    return [*inner, path.read_bytes()]


def _header_seed() -> bytes:
    tensors = {"a": TensorInfo("F32", (2, 3), (0, 24)), "b": TensorInfo("BF16", (4,), (24, 32))}
    return encode((("format", "pt"),), tensors) + bytes(32)


def _text(value: Any) -> bytes:
    return json.dumps(value).encode()


#: What is fuzzed, and what it begins with.
TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], list[bytes]]]] = {
    "header": (header, lambda: [_header_seed(), _header_seed()[8:-32]]),
    "index": (
        index,
        lambda: [_text({"metadata": {"total_size": 32}, "weight_map": dict.fromkeys("ab", "x.safetensors")})],
    ),
    "settings": (settings, lambda: [_text(SETTINGS), _text({**SETTINGS, "target_modules": r".*\.(q|k)_proj$"})]),
    "pickled": (pickled, _pickles),
    "config": (
        config,
        lambda: [b"base: b\nadapters:\n  - path: a\n    weight: 1e-3\noutput: {path: o, max_shard_size: 5GB}\n"],
    ),
}


def main() -> None:
    atheris: Any = importlib.import_module("atheris")
    target, seeds = TARGETS[sys.argv[1]]
    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds()):
        (corpus / str(number)).write_bytes(seed)
    (FOLDER / "x.safetensors").write_bytes(_header_seed())

    def once(data: bytes) -> None:
        try:
            target(data)
        except ShardmergeError as error:
            assert str(error), "an error says something"

    # What is written in C shows no coverage, and nothing guides the fuzzer through it.
    json.scanner.make_scanner = json.scanner.py_make_scanner  # type: ignore[attr-defined]
    json.decoder.scanstring = json.decoder.py_scanstring  # type: ignore[attr-defined]
    atheris.instrument_all()
    atheris.Setup([sys.argv[0], "-timeout=60", "-rss_limit_mb=4096", *sys.argv[2:], str(corpus)], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
