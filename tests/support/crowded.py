"""A place with every kind of file that a merge reads or copies, and what may stand where one of them is expected."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
import torch
from safetensors.torch import save_file

from tests.support.builders import AUX_FILES, Place, make_place, shard_names, write_index

FIRST, SECOND = shard_names(2)
#: Beside what `write_base` makes: tokenizers of every kind, code, manifests, a folder, templates.
BESIDE_BASE: Mapping[str, str] = {
    "added_tokens.json": "{}",
    "additional_chat_templates/tool.jinja": "tool",
    "chat_template.json": '{"chat_template": ""}',
    "code/ops.py": "raise RuntimeError\n",
    "merges.txt": "#version\n",
    "modules.json": "[]",
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "spiece.model": "pieces",
    "tokenizer.model": "pieces",
    "vocab.json": "{}",
    "vocab.txt": "a\n",
}
BESIDE_ADAPTER: Mapping[str, str] = {
    "README.md": "# adapter\n",
    "added_tokens.json": "{}",
    "additional_chat_templates/tool.jinja": "tool",
    "chat_template.jinja": "{{ messages }}",
    "special_tokens_map.json": "{}",
    "tokenizer.json": '{"model": {"type": "BPE", "vocab": {}}}',
    "tokenizer.model": "pieces",
    "tokenizer_config.json": '{"model_max_length": 32}',
    "vocab.json": "{}",
}
#: Which are read as weights, and so may be links to anywhere.
WEIGHTS = (
    f"base/{FIRST}",
    f"base/{SECOND}",
    "base/mtp.safetensors",
    "adapter/adapter_model-00001-of-00002.safetensors",
    "adapter/adapter_model-00002-of-00002.safetensors",
)
#: Everything else.
SMALL = (
    *(f"base/{name}" for name in sorted({*AUX_FILES, *BESIDE_BASE})),
    "base/config.json",
    "base/model.safetensors.index.json",
    *(f"adapter/{name}" for name in BESIDE_ADAPTER),
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors.index.json",
)
#: A row for each way in which a file is read or copied. The others go the same ways.
_QUICK = frozenset(
    {
        *("base/LICENSE", "base/code/ops.py", "base/additional_chat_templates/tool.jinja", "base/tokenizer.json"),
        *("base/config.json", "base/model.safetensors.index.json", f"base/{FIRST}", "base/mtp.safetensors"),
        *("base/modules.json", "base/tokenizer_config.json", "base/vocab.txt"),
        *("adapter/README.md", "adapter/additional_chat_templates/tool.jinja", "adapter/tokenizer.json"),
        *("adapter/adapter_config.json", "adapter/adapter_model.safetensors.index.json"),
        "adapter/adapter_model-00001-of-00002.safetensors",
    }
)
EVERY_FILE = [
    pytest.param(name, marks=[] if name in _QUICK else [pytest.mark.slow]) for name in sorted({*WEIGHTS, *SMALL})
]
#: The names under which files are looked for: a folder that is called so is not the file's absence.
LOOKED_FOR = tuple(
    name for name in (*WEIGHTS, *SMALL) if name.endswith((".json", ".safetensors", ".jinja", ".model", ".txt"))
)


def make_crowded(folder: Path) -> Place:
    """A place that merges: a base in two shards and an adapter in two, and all of the files above."""
    place = make_place(folder)
    for parent, files in ((place.base, BESIDE_BASE), (place.adapter, BESIDE_ADAPTER)):
        for name, text in files.items():
            (parent / name).parent.mkdir(parents=True, exist_ok=True)
            (parent / name).write_text(text)
    save_file({"mtp.weight": torch.ones(2)}, place.base / "mtp.safetensors")
    _divide(place.adapter)
    return place


def _divide(adapter: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    names = shard_names(2, "adapter_model")
    weight_map = {tensor: names[number % 2] for number, tensor in enumerate(sorted(tensors))}
    for name in names:
        save_file({tensor: tensors[tensor] for tensor, of in weight_map.items() if of == name}, adapter / name)
    write_index(adapter, weight_map, "adapter_model")


# --- what may stand in a file's stead ---------------------------------------------------------------------------------


def link_out(path: Path) -> None:
    """A link to a file of the same content, outside of base and adapter."""
    secret = path.parents[1 if path.parent.name in ("base", "adapter") else 2] / "elsewhere" / path.name
    secret.parent.mkdir(exist_ok=True)
    path.rename(secret)
    path.symlink_to(secret)


def link_in(path: Path) -> None:
    """A link to a hidden file of the same content beside it, by a way that goes up and down again."""
    path.rename(path.with_name(f".{path.name}"))
    path.symlink_to(f"../{path.parent.name}/.{path.name}")


def listening(path: Path) -> None:
    """A socket, made where its path is short enough and moved."""
    path.unlink()
    here = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    before = os.getcwd()
    try:
        os.fchdir(here)
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)
        os.close(here)


def instead(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """Take the file away and put something else there."""

    def harm(path: Path) -> None:
        path.unlink()
        make(path)

    return harm


@contextmanager
def no_waiting(seconds: int = 60) -> Iterator[None]:
    """Fail where something waits or reads for ever: no row takes a hundredth of that."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def harmed(path: Path, harm: Callable[[Path], object]) -> Iterator[None]:
    """``harm`` done to a file, and undone."""
    content = path.read_bytes()
    harm(path)
    try:
        yield
    finally:
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink()
        path.write_bytes(content)
