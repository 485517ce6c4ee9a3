"""Everything that a stranger's files can hold: one clear error, its exit code, and nothing written.

`shardmerge run` itself is what runs, so that what is asserted is what a person sees. What is about memory and time runs
in a process of its own, with a limit on both.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import shardmerge
from shardmerge.cli.main import cli
from tests.support.builders import (
    ROOT,
    Place,
    make_place,
    peft_config,
    peft_tensors,
    shard_names,
    snapshot,
    write_json,
    write_peft,
)
from tests.support.headers import REFUSED as HEADERS

FIRST, SECOND = shard_names(2)
INDEX = "model.safetensors.index.json"
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
Q0_WEIGHT = "model.layers.0.self_attn.q_proj.weight"
LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@dataclass(frozen=True)
class Hostile:
    """``harm`` damages a place that is in order and may return a config to merge it by; ``parts`` must be said."""

    harm: Callable[[Place], Any]
    parts: tuple[str, ...]
    code: int = 4


def out(place: Place) -> dict[str, Any]:
    """Neither the output nor the folders around it are there."""
    return {"path": str(place.folder / "not" / "yet" / "merged")}


def config_of(place: Place, returned: Any) -> Path:
    if isinstance(returned, (str, bytes)):
        path = place.folder / "config.yaml"
        path.write_bytes(returned if isinstance(returned, bytes) else returned.encode())
        return path
    changes = returned if isinstance(returned, dict) else {}
    return place.config_file(**{"output": out(place), **changes})


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path / "place")


def check_message(message: str, parts: tuple[str, ...]) -> None:
    """One error and no traceback, of a length that can be read."""
    assert message.count("shardmerge: ") == 1, message
    assert "Traceback" not in message
    assert len(message) < 20_000
    for part in parts:
        assert part in message


def refused(place: Place, hostile: Hostile) -> None:
    config = config_of(place, hostile.harm(place))
    before = snapshot(place.folder)
    result = CliRunner().invoke(cli, ["run", str(config)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == hostile.code, result.output
    assert result.stdout == ""
    check_message(result.stderr, hostile.parts)
    assert snapshot(place.folder) == before


def test_place_is_in_order(place: Place) -> None:
    """What is damaged below would be merged if it were not."""
    assert CliRunner().invoke(cli, ["run", str(config_of(place, None))]).exit_code == 0


# --- headers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [f"base/{FIRST}", f"adapter/{WEIGHTS}"], ids=["base", "adapter"])
@pytest.mark.parametrize("fault", HEADERS)
def test_header(place: Place, where: str, fault: str) -> None:
    raw, _ = HEADERS[fault]

    def harm(place: Place) -> None:
        (place.folder / where).write_bytes(raw)

    refused(place, Hostile(harm, (where,)))


# --- what else a file can be ------------------------------------------------------------------------------------------


def index(**weight_map: object) -> Callable[[Place], None]:
    """The index places tensors elsewhere; ``_`` stands for lm_head.weight."""

    def harm(place: Place) -> None:
        path = place.base / INDEX
        told = json.loads(path.read_text())
        told["weight_map"] |= {name.replace("_", "lm_head.weight"): file for name, file in weight_map.items()}
        write_json(path, told)

    return harm


def text(name: str, content: str | bytes) -> Callable[[Place], None]:
    return lambda place: (place.folder / name).write_bytes(content.encode() if isinstance(content, str) else content)  # type: ignore[return-value]


def settings(**changes: Any) -> Callable[[Place], None]:
    """The adapter's config says something else."""
    return lambda place: write_json(place.adapter / SETTINGS, peft_config(**changes))  # type: ignore[return-value]


def settings_text(old: str, new: str) -> Callable[[Place], None]:
    """The adapter's config, as text, has something else in it."""

    def harm(place: Place) -> None:
        path = place.adapter / SETTINGS
        before = path.read_text()
        assert old in before
        path.write_text(before.replace(old, new))

    return harm


def cut(name: str, by: int) -> Callable[[Place], None]:
    def harm(place: Place) -> None:
        path = place.folder / name
        os.truncate(path, path.stat().st_size - by)

    return harm


def gone(name: str) -> Callable[[Place], None]:
    return lambda place: (place.folder / name).unlink()


def instead(name: str, make: Callable[[Path], Any]) -> Callable[[Place], None]:
    """Something else in place of a file."""

    def harm(place: Place) -> None:
        (place.folder / name).unlink()
        make(place.folder / name)

    return harm


def as_base(name: str, make: Callable[[Path], object]) -> Callable[[Place], dict[str, Any]]:
    """The base is something else."""

    def harm(place: Place) -> dict[str, Any]:
        make(place.folder / name)
        return {"base": str(place.folder / name)}

    return harm


def as_adapter(name: str, make: Callable[[Path], object]) -> Callable[[Place], dict[str, Any]]:
    """The adapter is something else."""

    def harm(place: Place) -> dict[str, Any]:
        make(place.folder / name)
        return {"adapters": [str(place.folder / name)]}

    return harm


def twice(place: Place) -> None:
    part = load_file(place.base / SECOND)
    save_file({**part, Q0_WEIGHT: torch.ones(32, 32)}, place.base / SECOND)


def tensors(**changes: torch.Tensor) -> Callable[[Place], None]:
    """The adapter has other tensors."""

    def harm(place: Place) -> None:
        write_peft(place.adapter, {**peft_tensors(), **changes})

    return harm


def factor(value: torch.Tensor) -> Callable[[Place], None]:
    return tensors(**{LORA_A: value})


class Runs:
    """Unpickled, it makes a folder."""

    def __init__(self, witness: str) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.witness,)


def code_in_bin(place: Place) -> None:
    (place.adapter / WEIGHTS).unlink()
    torch.save({"a": torch.ones(1), "b": Runs(str(place.folder / "witness"))}, place.adapter / "adapter_model.bin")


def code_in_pt(place: Place) -> dict[str, Any]:
    path = place.folder / "adapter.pt"
    torch.save({"a": Runs(str(place.folder / "witness"))}, path)
    return place.config(adapters=[{"path": str(path), "alpha": 8}], output=out(place))


def bare_code(place: Place) -> dict[str, Any]:
    path = place.folder / "adapter.pt"
    path.write_bytes(pickle.dumps(Runs(str(place.folder / "witness"))))
    return place.config(adapters=[{"path": str(path), "alpha": 8}], output=out(place))


def pickled_base(place: Place) -> None:
    for path in place.base.glob("*.safetensors*"):
        path.unlink()
    torch.save({"a": Runs(str(place.folder / "witness"))}, place.base / "pytorch_model.bin")


def strangely_named(folder: Path) -> None:
    folder.mkdir()
    (folder / "x\ny.safetensors").touch()


DEEP = "[" * 200_000
BIG = "9" * 100_000

HOSTILE: dict[str, Hostile] = {
    # --- the index
    "shard ../x": Hostile(
        index(_="../x.safetensors"), (INDEX, "'../x.safetensors'", "not the name of a .safetensors file")
    ),
    "shard /x": Hostile(index(_="/x.safetensors"), (INDEX, "'/x.safetensors'", "not the name of a .safetensors file")),
    "shard a/../../x": Hostile(index(_="a/../../x.safetensors"), (INDEX, "'a/../../x.safetensors'")),
    "shard ..": Hostile(index(_=".."), (INDEX, "'..'")),
    "shard with a backslash": Hostile(index(_="..\\x.safetensors"), (INDEX, "not the name of a .safetensors file")),
    "shard with a zero byte": Hostile(index(_="x\0.safetensors"), (INDEX, "not the name of a .safetensors file")),
    "shard that is a pickle": Hostile(index(_="x.bin"), (INDEX, "'x.bin'")),
    "shard that is a number": Hostile(index(_=7), (INDEX, "7, which is not the name")),
    "shard that is not there": Hostile(index(_="x.safetensors"), (INDEX, "not there", "x.safetensors")),
    "index of strange tensors": Hostile(index(ghost=FIRST), (INDEX, "'ghost'", FIRST)),
    "index of misplaced tensors": Hostile(index(_=FIRST), (INDEX, "'lm_head.weight'", FIRST)),
    "index is not JSON": Hostile(text(f"base/{INDEX}", "{"), (INDEX, "is not JSON")),
    "index is a list": Hostile(text(f"base/{INDEX}", "[]"), (INDEX, "is not a JSON object")),
    "index of nothing": Hostile(text(f"base/{INDEX}", "{}"), (INDEX, "expected", "weight_map")),
    "index of a list": Hostile(text(f"base/{INDEX}", '{"weight_map": []}'), (INDEX, "expected", "weight_map")),
    "index is deep": Hostile(text(f"base/{INDEX}", f'{{"weight_map": {DEEP}'), (INDEX, "is not JSON")),
    "index of a huge number": Hostile(
        text(f"base/{INDEX}", f'{{"metadata": {{"total_size": {BIG}}}}}'), (INDEX, "is not JSON")
    ),
    "index of infinity": Hostile(
        text(f"base/{INDEX}", '{"metadata": {"total_size": Infinity}, "weight_map": {}}'), (INDEX, "Infinity")
    ),
    "index places a tensor twice": Hostile(
        text(f"base/{INDEX}", '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'),
        (INDEX, "the key 'a' twice"),
    ),
    # --- shards
    "tensor in two shards": Hostile(twice, (Q0_WEIGHT, "stored twice", FIRST, SECOND)),
    "shard is missing": Hostile(gone(f"base/{FIRST}"), (INDEX, "not there", FIRST)),
    "shard is cut": Hostile(cut(f"base/{FIRST}", 1), (FIRST, "the file was cut")),
    "shard is cut in its header": Hostile(
        lambda place: os.truncate(place.base / FIRST, 100), (FIRST, "the header ends at byte", "cut?")
    ),
    "shard is a folder": Hostile(instead(f"base/{FIRST}", Path.mkdir), (FIRST, "is a directory"), 5),
    "shard links to itself": Hostile(
        instead(f"base/{FIRST}", lambda p: p.symlink_to(p)), (FIRST, "is a link that leads back to itself"), 5
    ),
    "shard is a device": Hostile(
        instead(f"base/{FIRST}", lambda p: p.symlink_to("/dev/zero")), (FIRST, "is a device"), 5
    ),
    "shard is a FIFO": Hostile(instead(f"base/{FIRST}", os.mkfifo), (FIRST, "is a FIFO"), 5),
    "base is pickled": Hostile(pickled_base, ("expected .safetensors files", "convert them to safetensors")),
    "base is a FIFO": Hostile(
        as_base("x.safetensors", os.mkfifo),
        ("x.safetensors", "is a FIFO; expected a regular file"),
        5,
    ),
    "base is a device": Hostile(lambda place: {"base": "/dev/zero"}, ("/dev/zero", "expected .safetensors files")),
    "base links to itself": Hostile(
        as_base("x", lambda path: path.symlink_to("x")),
        ("no such file or directory",),
        3,
    ),
    "name with a zero byte": Hostile(lambda place: {"base": "x\0y"}, ("no such file",), 3),
    "name of 10,000 letters": Hostile(lambda place: {"base": "x" * 10_000}, ("no such file",), 3),
    # --- the base's config
    "config.json is not JSON": Hostile(text("base/config.json", b"\xff{"), ("config.json", "is not JSON")),
    "config.json is deep": Hostile(text("base/config.json", f'{{"a": {DEEP}'), ("config.json", "is not JSON")),
    "config.json says it twice": Hostile(
        text("base/config.json", '{"vocab_size": 1, "vocab_size": 2}'), ("config.json", "the key 'vocab_size' twice")
    ),
    # --- the adapter's weights
    "adapter is cut": Hostile(cut(f"adapter/{WEIGHTS}", 1), (WEIGHTS, "the file was cut")),
    "adapter is a folder": Hostile(instead(f"adapter/{WEIGHTS}", Path.mkdir), (WEIGHTS, "is a directory"), 5),
    "adapter is a FIFO": Hostile(instead(f"adapter/{WEIGHTS}", os.mkfifo), (WEIGHTS, "is a FIFO"), 5),
    "code in a .bin": Hostile(code_in_bin, ("adapter_model.bin", "needs more than tensors", "not loaded")),
    "code in a .pt": Hostile(code_in_pt, ("adapter.pt", "needs more than tensors", "not loaded")),
    "code without an archive": Hostile(bare_code, ("adapter.pt", "not a zip archive")),
    "NaN": Hostile(factor(torch.full((4, 32), float("nan"))), (WEIGHTS, LORA_A, "nan")),
    "infinity": Hostile(factor(torch.full((4, 32), float("-inf"))), (WEIGHTS, LORA_A, "-inf")),
    "no elements": Hostile(factor(torch.ones(0)), (LORA_A, "is empty", "ZeRO-3"), 3),
    # --- the adapter's config
    "settings are not JSON": Hostile(text(f"adapter/{SETTINGS}", "{"), (SETTINGS, "is not JSON")),
    "settings are deep": Hostile(text(f"adapter/{SETTINGS}", f'{{"r": {DEEP}'), (SETTINGS, "is not JSON")),
    "settings with a huge number": Hostile(text(f"adapter/{SETTINGS}", f'{{"r": {BIG}}}'), (SETTINGS, "is not JSON")),
    "settings say it twice": Hostile(
        settings_text('"lora_alpha": 8', '"lora_alpha": 8, "lora_alpha": 16'), (SETTINGS, "the key 'lora_alpha' twice")
    ),
    "rank 0": Hostile(settings(r=0), ("r must be a whole number above zero, found 0",), 3),
    "rank -4": Hostile(settings(r=-4), ("r must be a whole number above zero, found -4",), 3),
    "rank 4.0": Hostile(settings(r=4.0), ("r must be a whole number above zero, found 4.0",), 3),
    "rank 10¹²": Hostile(settings(r=10**12), ("r must be a whole number above zero, found 1000000000000",), 3),
    "rank 10⁶": Hostile(settings(r=10**6), (LORA_A, "has rank 4", "says 1000000"), 3),
    "alpha NaN": Hostile(settings(lora_alpha=float("nan")), ("lora_alpha must be a finite number, found nan",), 3),
    "alpha infinity": Hostile(settings(lora_alpha=float("inf")), ("lora_alpha must be a finite number, found inf",), 3),
    "alpha 10⁴⁰⁰": Hostile(settings(lora_alpha=10**400), ("lora_alpha must be a finite number",), 3),
    "alpha of text": Hostile(settings(lora_alpha="8"), ("lora_alpha must be a finite number, found '8'",), 3),
    "rank_pattern is not a regular expression": Hostile(
        settings(rank_pattern={"(": 4}), ("rank_pattern['(']", "not a regular expression"), 3
    ),
    "target_modules is not a regular expression": Hostile(
        settings(target_modules="(((("), ("target_modules", "not a regular expression"), 3
    ),
    "settings are too long": Hostile(
        settings(base_model_name_or_path="x" * 10_000_001), (SETTINGS, "over 10,000,000 bytes long"), 4
    ),
    "settings are rather deep": Hostile(
        settings(corda_config=json.loads("[" * 150 + "]" * 150)), (SETTINGS, "objects and lists nested over 100 deep")
    ),
    "half a character": Hostile(settings(corda_config="\ud800"), (SETTINGS, "is not JSON", "surrogates")),
    "name of 2,000 letters": Hostile(
        tensors(**{"x" * 2_000: torch.ones(1)}),
        (WEIGHTS, "name has 2,000 characters; expected 1,000"),
    ),
    "name that is a command to the terminal": Hostile(
        tensors(**{"x\x1b[2J\x9b": torch.ones(1)}),
        (WEIGHTS, r"the name 'x\x1b[2J\x9b' has characters that cannot be shown"),
    ),
    "name that is two lines": Hostile(
        tensors(**{"x\nall is well": torch.ones(1)}), (r"'x\nall is well' has characters",)
    ),
    "name of a base's tensor that is two lines": Hostile(
        lambda place: save_file({"x\ny": torch.ones(1)}, place.base / FIRST), (FIRST, r"'x\ny' has characters")
    ),
    "shard with a line in its name": Hostile(index(_="x\ny.safetensors"), (INDEX, r"'x\ny.safetensors', which is no")),
    "file of weights with a line in its name": Hostile(
        as_base("folder", strangely_named),
        (r"'x\ny.safetensors' has characters",),
    ),
    "file name that is not text": Hostile(
        lambda place: open(os.fsencode(place.base) + b"/\xff.txt", "w").close(), ("is not a file name in UTF-8",), 5
    ),
    "patterns that are too many": Hostile(
        settings(rank_pattern={f"x{number}": 4 for number in range(10_001)}),
        ("10,001 regular expressions", "expected at most 10,000"),
        3,
    ),
    # --- our own config
    "tag": Hostile(lambda place: "base: !!python/object/apply:os.mkdir [x]\n", ("config.yaml", "tag"), 2),
    "key twice": Hostile(lambda place: "base: a\nbase: b\n", ("config.yaml", "the key 'base' stands twice"), 2),
    "deep": Hostile(lambda place: "[" * 5_000, ("config.yaml", "not valid YAML"), 2),
    "bomb": Hostile(
        lambda place: "\n".join(
            ["a0: &a0 [x,x,x]"] + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 60)]
        ),
        ("config.yaml", "there is no such key"),
        2,
    ),
    "number of 5,000 digits": Hostile(lambda place: f"base: 0x{'f' * 5_000}\n", ("config.yaml", "base"), 2),
    "seed of 5,000 digits": Hostile(
        lambda place: f"base: b\nadapters: a\noutput: {{path: o, seed: {'9' * 5_000}}}\n",
        ("config.yaml", "a whole number must fit into 64 bits"),
        2,
    ),
    "not UTF-8": Hostile(lambda place: b"base: \xff\n", ("config.yaml", "not valid YAML"), 2),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_run(place: Place, name: str) -> None:
    refused(place, HOSTILE[name])
    assert not (place.folder / "witness").exists()


def test_links_are_fine(place: Place) -> None:
    """The Hub's cache is made of them."""
    entry = place.folder / "hub" / "models--org--base"
    snapshot_ = entry / "snapshots" / "c0ffee"
    snapshot_.mkdir(parents=True)
    shutil.move(place.base, entry / "blobs")
    for blob in (entry / "blobs").iterdir():
        (snapshot_ / blob.name).symlink_to(Path("..", "..", "blobs", blob.name))
    place.base.symlink_to(snapshot_)
    test_place_is_in_order(place)


@pytest.mark.parametrize("name", [f"base/{SECOND}", f"adapter/{WEIGHTS}", "base/config.json"])
@pytest.mark.parametrize("harm", [Path.unlink, lambda path: os.truncate(path, 50)], ids=["gone", "cut"])
def test_files_that_change_between_plan_and_merge(place: Place, name: str, harm: Callable[[Path], object]) -> None:
    plan = shardmerge.plan(place.config(output=out(place)))
    harm(place.folder / name)
    with pytest.raises(shardmerge.SourceError, match=Path(name).name):
        shardmerge.merge(plan)
    assert not (place.folder / "not" / "yet" / "merged" / INDEX).exists()


@pytest.mark.parametrize("name", ["base", f"base/{FIRST}", f"adapter/{WEIGHTS}", f"adapter/{SETTINGS}"])
def test_no_permission(place: Place, name: str) -> None:
    (place.folder / name).chmod(0)
    if os.access(place.folder / name, os.R_OK):
        pytest.skip("root may read everything")
    try:
        result = CliRunner().invoke(cli, ["run", str(config_of(place, None))])
    finally:
        (place.folder / name).chmod(0o700)
    assert result.exit_code == 5, result.output
    check_message(result.stderr, (name, "Permission denied"))


# --- memory and time --------------------------------------------------------------------------------------------------

MEMORY = 4 << 30
SECONDS = 120


def sparse(path: Path, start: bytes, size: int) -> None:
    """A file of many zeros that takes no room."""
    path.write_bytes(start)
    os.truncate(path, size)


def header_of(length: int, text: bytes) -> bytes:
    return length.to_bytes(8, "little") + text


def long_header(text: bytes, unit: bytes, count: int) -> Callable[[Place], None]:
    """A header that repeats something, behind its beginning."""

    def harm(place: Place) -> None:
        whole = text + unit * count
        (place.base / FIRST).write_bytes(header_of(len(whole), whole))

    return harm


def bin_of(data: bytes) -> Callable[[Place], None]:
    """The adapter is an archive with this pickle."""

    def harm(place: Place) -> None:
        (place.adapter / WEIGHTS).unlink()
        with zipfile.ZipFile(place.adapter / "adapter_model.bin", "w") as archive:
            archive.writestr("x/data.pkl", data)
            archive.writestr("x/version", "3\n")

    return harm


def zip_of_a_terabyte(place: Place) -> None:
    """An archive whose directory is said to be larger than memory, in a sparse file."""
    (place.adapter / WEIGHTS).unlink()
    path = place.adapter / "adapter_model.bin"
    size = 3 << 30
    sparse(path, b"", size)
    with open(path, "ab") as file:
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 9, 9, size, 0, 0))


COSTLY: dict[str, Hostile] = {
    "a header as long as the format allows, in a sparse file": Hostile(
        lambda place: sparse(place.base / FIRST, header_of(100_000_000, b"{"), 1 << 40), (FIRST, "is not JSON")
    ),
    "a header of lists": Hostile(long_header(b'{"a":[', b"[],", 5_000_000), (FIRST, "the header")),
    "a header of names": Hostile(long_header(b'{"a":{', b'"":{},', 2_000_000), (FIRST, "the header")),
    "a header that is deep": Hostile(long_header(b'{"a":', b"[", 90_000_000), (FIRST, "is not JSON")),
    "an index in a sparse file": Hostile(
        lambda place: sparse(place.base / INDEX, b'{"', 1 << 40), (INDEX, "over 60,000,000 bytes long")
    ),
    "a config.json in a sparse file": Hostile(
        lambda place: sparse(place.base / "config.json", b"{", 1 << 40), ("config.json", "over 10,000,000 bytes long")
    ),
    "a pickle of lists": Hostile(bin_of(b"\x80\x02](" + b"]" * 1_000_000 + b"e."), ("adapter_model.bin", "a list")),
    "a pickle that is long": Hostile(bin_of(b"\x80\x02" + b"]" * 21_000_000), ("adapter_model.bin", "the limit is")),
    "a pickle of a terabyte": Hostile(
        bin_of(b"\x80\x02cbuiltins\nbytearray\n(\x8a\x06" + (1 << 40).to_bytes(6, "little") + b"tR."),
        ("adapter_model.bin", "more than tensors", "builtins.bytearray"),
    ),
    "a pickle of a thousand copies": Hostile(
        bin_of(
            b"\x80\x02X" + (5_000_000).to_bytes(4, "little") + b"a" * 5_000_000 + b"q\x00X\x06\0\0\0latin1q\x01"
            b"c_codecs\nencode\nq\x02](" + b"h\x02h\x00h\x01\x86R" * 1_000 + b"e."
        ),
        ("adapter_model.bin", "more than tensors", "_codecs.encode"),
    ),
    "a pickle of copies of a dictionary": Hostile(
        bin_of(
            b"\x80\x02}(" + b"".join(b"J" + n.to_bytes(4, "little") + b"N" for n in range(100_000)) + b"uq\x00"
            b"ccollections\nOrderedDict\nq\x01](" + b"h\x01h\x00\x85R" * 10_000 + b"e."
        ),
        ("adapter_model.bin", "more than tensors", "collections.OrderedDict"),
    ),
    "an archive of a long directory": Hostile(zip_of_a_terabyte, ("adapter_model.bin", "begins with zeros")),
    "target_modules that try everything": Hostile(
        settings(target_modules="(a+|[a-z0-9._]+)+!"), (SETTINGS, "cannot be matched"), 3
    ),
    "rank_pattern that tries everything": Hostile(
        settings(rank_pattern={"(.*)*x": 4}), (SETTINGS, "cannot be matched"), 3
    ),
    "a FIFO as the base": Hostile(
        as_base("x.safetensors", os.mkfifo),
        ("x.safetensors", "is a FIFO; expected a regular file"),
        5,
    ),
    "a FIFO as the adapter": Hostile(
        as_adapter("x.pt", os.mkfifo),
        ("x.pt", "is a FIFO; expected a regular file"),
        5,
    ),
    "YAML of a hundred kilobytes": Hostile(lambda place: "? a\n" * 25_000, ("config.yaml", "stands twice"), 2),
}


#: A second or so each, of which another row tests nearly the same.
SLOW = (
    "a header of names",
    "a header of lists",
    "a header as long as the format allows, in a sparse file",
    "a config.json in a sparse file",
    "a pickle of lists",
    "rank_pattern that tries everything",
    "a FIFO as the adapter",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in COSTLY]
)
def test_memory_and_time(place: Place, name: str) -> None:
    hostile = COSTLY[name]
    config = config_of(place, hostile.harm(place))
    patch = "from shardmerge.system import bounded_regex; bounded_regex.SECONDS = 1.0"
    code = f"{patch}; from shardmerge.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", str(config)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY)),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == hostile.code, done.stderr
    check_message(done.stderr, hostile.parts)
    assert not (place.folder / "not").exists()
