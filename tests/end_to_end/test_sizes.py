"""What a stranger's files can be as large as: merged or refused within a little memory and time.

Each runs in a process of its own, whose most memory is measured, helpers included. Time is bounded in seconds of the
processor, which do not depend on what else the machine does.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from shardmerge.file_formats.safetensors_header import encode
from shardmerge.spec.tensors import TensorInfo
from tests.support.builders import ROOT, Place, make_place, peft_config, slow_but

#: What a small VM has for a plan.
MOST_BYTES, MOST_SECONDS = 300_000_000, 10

#: Runs a command, and says what it and its children took: bytes, and seconds of the processor.
_MEASURED = """
import os, sys
from shardmerge.cli.main import main
from shardmerge.system.memory_use import peak_memory
leave = os._exit

def measured(code):
    times = os.times()
    print("took", peak_memory(), round(sum(times[:4])), file=sys.stderr, flush=True)
    leave(code)

os._exit = measured
main()
"""


@dataclass(frozen=True)
class Large:
    """``make`` makes a place's files large; ``code`` and ``said`` are how it ends."""

    make: Callable[[Place], Any]
    code: int = 0
    said: tuple[str, ...] = ()
    output: Mapping[str, Any] = field(default_factory=dict)
    command: str = "plan"


def measure(place: Place, large: Large) -> None:
    made = large.make(place)
    config = place.config_file(**(made if isinstance(made, dict) else {}), output={"path": "out", **large.output})
    arguments: dict[str, list[str | Path]] = {}
    arguments |= {"plan": [config], "inspect": [place.adapter], "init": [place.adapter, "-o", "-"]}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, large.command, *map(str, arguments[large.command])],
        cwd=place.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    assert done.returncode == large.code, done.stderr[-3000:]
    for part in large.said:
        assert part in done.stderr
    assert len(done.stderr) + len(done.stdout) < 20_000
    took = re.search(r"took (\d+) (\d+)", done.stderr)
    assert took is not None
    assert int(took[1]) < MOST_BYTES
    assert int(took[2]) < MOST_SECONDS


def sparse(path: Path, size: int, start: bytes = b"{") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(start)
    os.truncate(path, size)


def write_header(path: Path, names: Iterator[str]) -> None:
    """A file of tensors of one number each, without their data."""
    tensors = {name: TensorInfo("F32", (1,), (4 * number, 4 * number + 4)) for number, name in enumerate(names)}
    head = encode((), tensors)
    path.write_bytes(head)
    os.truncate(path, len(head) + 4 * len(tensors))


# --- files beside the weights -----------------------------------------------------------------------------------------


def two_tokenizers(place: Place) -> None:
    for folder in (place.base, place.adapter):
        sparse(folder / "tokenizer.json", 600_000_000)


def two_tokenizers_that_are_parsed(place: Place) -> None:
    for folder in (place.base, place.adapter):
        text = '{"model": {"vocab": [%s' % ("[]," * 12_000_000) + folder.name
        (folder / "tokenizer.json").write_text(text)
        (folder / "tokenizer_config.json").write_text("{}")
    (place.base / "vocab.json").write_text("{}")


def tokenizer(name: str) -> Callable[[Place], None]:
    return lambda place: sparse(place.base / name, 2_000_000_000)


def config_json(value: str) -> Callable[[Place], None]:
    def make(place: Place) -> None:
        text = (place.base / "config.json").read_text().rstrip().removesuffix("}")
        (place.base / "config.json").write_text(f'{text}, "x": {value}}}')

    return make


def adapter_config(changes: Callable[[], dict[str, Any]]) -> Callable[[Place], None]:
    def make(place: Place) -> None:
        (place.adapter / "adapter_config.json").write_text(json.dumps(peft_config(**changes())))

    return make


def index(names: int) -> Callable[[Place], None]:
    def make(place: Place) -> None:
        path = place.base / "model.safetensors.index.json"
        found = json.loads(path.read_text())
        found["weight_map"] |= {
            f"model.layers.{number}.w": "model-00001-of-00002.safetensors" for number in range(names)
        }
        path.write_text(json.dumps(found))

    return make


def adapters(count: int) -> Callable[[Place], dict[str, Any]]:
    return lambda place: {"adapters": ["a"] * count}


def files(folder: str, count: int) -> Callable[[Place], None]:
    def make(place: Place) -> None:
        for number in range(count):
            (place.folder / folder / f"tokenizer_{number}.json").touch()

    return make


def adapter_tensors(count: int) -> Callable[[Place], None]:
    """Pairs of factors, of modules of as many names."""

    def make(place: Place) -> None:
        names = (f"base_model.model.m{number // 2}.lora_{'AB'[number % 2]}.weight" for number in range(count))
        head = encode((), {name: TensorInfo("F32", (1, 1), (4 * n, 4 * n + 4)) for n, name in enumerate(names)})
        (place.adapter / "adapter_model.safetensors").write_bytes(head)
        os.truncate(place.adapter / "adapter_model.safetensors", len(head) + 4 * count)

    return make


QUICK: Mapping[str, Large] = {
    "two-tokenizers": Large(two_tokenizers),
    "gguf-tokenizer.json": Large(tokenizer("tokenizer.json"), 3, ("is 2,000,000,000 bytes long",), {"format": "gguf"}),
    "gguf-tokenizer.model": Large(tokenizer("tokenizer.model"), 3, ("may have 50,000,000 bytes",), {"format": "gguf"}),
    "config-lists": Large(config_json("[" + "[]," * 3_000_000 + "[]]"), 4, ("config.json would take about", "200 MB")),
    "index-of-700-thousand": Large(index(700_000), 4, ("index.json would take about", "the limit is 200 MB")),
    "adapters": Large(adapters(9_000), 2, ("9,000 adapters; at most 256 are merged at once",)),
    "many-settings": Large(
        adapter_config(lambda: {f"k{n}": 1 for n in range(300_000)}), 4, ("300,0", "settings; expected 5,000 at most")
    ),
    "files-of-an-adapter": Large(files("adapter", 20_000), 0),
}


@pytest.mark.parametrize("large", slow_but(QUICK.values(), *[*QUICK.values()][:5:2]), ids=QUICK)
def test_large_files(tmp_path: Path, large: Large) -> None:
    measure(make_place(tmp_path), large)


def many_targets() -> dict[str, Any]:
    return {"target_modules": [str(n) for n in range(900_000)]}


SLOW: Mapping[str, Large] = {
    "tensors-that-no-adapter-has": Large(adapter_tensors(499_000), 4, ("the header names over 250,000 tensors",)),
    "tensors-of-modules-that-no-model-has": Large(adapter_tensors(100_000), 3, ("none of the 50000 weights",)),
    "two-tokenizers-parsed": Large(two_tokenizers_that_are_parsed),
    "config-objects": Large(config_json("[" + '{"a":1},' * 1_000_000 + "1]"), 4, ("config.json would take about",)),
    "config-numbers": Large(config_json("[" + "1000," * 1_000_000 + "1]")),
    "targets": Large(
        adapter_config(lambda: {"target_modules": ["q_proj", "v_proj", "down_proj", *map(str, range(900_000))]})
    ),
    "rank-patterns": Large(
        adapter_config(lambda: {"rank_pattern": {f"x{n}": 4 for n in range(100_000)}}), 3, ("100,000 regular",)
    ),
    "index-of-1.5-million": Large(index(1_500_000), 4, ("is over 60,000,000 bytes long",)),
    "index-of-300-thousand": Large(index(300_000), 4, ("names 300000 tensors that are not in the file",)),
    "inspect": Large(adapter_config(many_targets), command="inspect"),
    "init": Large(adapter_config(many_targets), command="init"),
    "slow-patterns": Large(
        adapter_config(lambda: {"target_modules": "|".join(f"(a+)+{n}.{{1,99}}" for n in range(9_999))}), 3
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("large", SLOW.values(), ids=SLOW)
def test_other_large_files(tmp_path: Path, large: Large) -> None:
    measure(make_place(tmp_path), large)
