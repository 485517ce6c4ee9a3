"""Damage at random: an error of ours comes of it, or what the safetensors library and a line of torch make of it.

A base and an adapter are merged after some bytes of one of their files were changed, taken out or put in. Where the
merge is accepted, an oracle that shares no code with it reads the same damaged files and must come to the same values:
damage that means nothing (a space in a header, a digit of the README) changes nothing, and damage that is another valid
input gives another valid output. All the while no file is opened but theirs, and nothing is read outside of one.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import shardmerge
from shardmerge.sources.local import LocalReader
from tests.support.builders import (
    ROOT,
    Place,
    Tensors,
    contents,
    layer,
    make_place,
    model_config,
    peft_config,
    random_tensor,
    snapshot,
    write_base,
    write_json,
    write_peft,
)

fuzzed = settings(deadline=None, suppress_health_check=list(HealthCheck))

INDEX, SETTINGS, WEIGHTS = "model.safetensors.index.json", "adapter_config.json", "adapter_model.safetensors"
MODULES = [layer(number, f"self_attn.{which}_proj") for number in range(2) for which in "qk"]
FILES = [
    *("base/model-00001-of-00002.safetensors", "base/model-00002-of-00002.safetensors", f"base/{INDEX}"),
    *("base/config.json", f"adapter/{WEIGHTS}", f"adapter/{SETTINGS}"),
]

# --- what is opened and read ------------------------------------------------------------------------------------------

_opened: list[str] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and _opened is not None and isinstance(arguments[0], str):
        _opened.append(arguments[0])


sys.addaudithook(_note)  # for good: there is no taking it away


@contextmanager
def only_within(folder: Path) -> Iterator[None]:
    """No file is opened but those of a folder, of the interpreter and of the system."""
    global _opened
    _opened = []
    try:
        yield
    finally:
        opened, _opened = _opened, None
    allowed = (folder, ROOT, Path(sys.prefix), Path(sys.base_prefix), Path("/proc"), Path("/sys"), Path("/dev"))
    for name in opened:
        path = Path(name).resolve()
        assert any(path.is_relative_to(of.resolve()) for of in allowed), name


@pytest.fixture(autouse=True)
def _reads_lie_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    read_into, read_block = LocalReader.read_into, LocalReader.read_block

    def checked(reader: LocalReader, offset: int, size: int) -> None:
        assert 0 <= offset <= offset + size <= Path(reader.path).stat().st_size

    def checked_into(self: LocalReader, offset: int, view: memoryview) -> None:
        checked(self, offset, 0 if offset > Path(self.path).stat().st_size - len(view) else len(view))
        read_into(self, offset, view)

    def checked_block(self: LocalReader, memory: memoryview, position: int, offset: int, size: int) -> None:
        checked(self, offset, size)
        read_block(self, memory, position, offset, size)

    monkeypatch.setattr(LocalReader, "read_into", checked_into)
    monkeypatch.setattr(LocalReader, "read_block", checked_block)


# --- a merge and its oracle -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = make_place(tmp_path_factory.mktemp("fuzz") / "place")
    tensors = {f"{module}.weight": random_tensor((8, 8), seed) for seed, module in enumerate(MODULES)}
    tensors |= {"model.norm.weight": random_tensor((8,), 7), "model.embed_tokens.weight": random_tensor((16, 8), 8)}
    shutil.rmtree(place.base)
    write_base(place.base, tensors)
    factors = {
        f"base_model.model.{module}.lora_A.weight": random_tensor((2, 8), 20 + n) for n, module in enumerate(MODULES)
    }
    factors |= {
        f"base_model.model.{module}.lora_B.weight": random_tensor((8, 2), 40 + n) for n, module in enumerate(MODULES)
    }
    write_peft(place.adapter, factors, config=peft_config(r=2, target_modules=["q_proj", "k_proj"]))
    return place


def expected(place: Place) -> Tensors:
    """What the merge must hold, read by other means."""
    index = json.loads((place.base / INDEX).read_bytes())["weight_map"]
    tensors = {name: tensor for file in set(index.values()) for name, tensor in load_file(place.base / file).items()}
    factors = load_file(place.adapter / WEIGHTS)
    told = json.loads((place.adapter / SETTINGS).read_bytes())
    scaling = told["lora_alpha"] / (math.sqrt(told["r"]) if told.get("use_rslora") else told["r"])
    for name, a in factors.items():
        if ".lora_A." in name:
            target = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
            tensors[target] = tensors[target] + scaling * (factors[name.replace(".lora_A.", ".lora_B.")] @ a)
    return tensors


def merged(place: Place) -> Tensors | None:
    """The merge's tensors, by the safetensors library; None where it was refused."""
    before = snapshot(place.folder)
    try:
        with only_within(place.folder):
            plan = shardmerge.plan(place.config())
    except shardmerge.ShardmergeError as error:
        assert error.exit_code in (3, 4, 5)
        str(error).encode()
        assert snapshot(place.folder) == before
        return None
    try:
        with only_within(place.folder):
            shardmerge.merge(plan)
    except shardmerge.FormatError as error:  # a factor is NaN, or a sum is too large
        assert "nan" in str(error).lower() or "inf" in str(error).lower()
        assert not (place.output / INDEX).exists()
        return None
    index = json.loads((place.output / INDEX).read_bytes())["weight_map"]
    return {name: tensor for file in set(index.values()) for name, tensor in load_file(place.output / file).items()}


@contextmanager
def copy_of(intact: Place) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="shardmerge-fuzz-") as folder:
        shutil.copytree(intact.folder, Path(folder, "place"))
        yield Place(Path(folder, "place"))


def check(place: Place) -> bool:
    """Whether the merge was accepted; then it is right."""
    found = merged(place)
    if found is None:
        return False
    right = expected(place)
    assert found.keys() == right.keys()
    for name, tensor in right.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5, equal_nan=True)
    return True


def test_intact(intact: Place) -> None:
    with copy_of(intact) as place:
        assert check(place)


DAMAGES = st.sampled_from(["change", "insert", "remove", "cut", "flip", "repeat"])


def damaged(data: st.DataObject, raw: bytearray) -> None:
    # Headers and configs lie at the beginning, and a damage there is the more interesting.
    last = max(0, len(raw) - 1)
    where = data.draw(st.integers(0, min(200, last)) | st.integers(0, min(1_000, last)) | st.integers(0, last), "where")
    kind = data.draw(DAMAGES, "kind")
    if kind == "change":
        new = data.draw(st.binary(min_size=1, max_size=8), "new")
        raw[where : where + len(new)] = new
    elif kind == "insert":
        raw[where:where] = data.draw(st.binary(min_size=1, max_size=8) | st.just(b" "), "new")
    elif kind == "remove":
        del raw[where : where + data.draw(st.integers(1, 8), "count")]
    elif kind == "cut":
        del raw[where:]
    elif kind == "flip" and raw:
        raw[where] ^= 1 << data.draw(st.integers(0, 7), "bit")
    elif kind == "repeat":
        raw[where:where] = raw[where : where + data.draw(st.integers(1, 64), "count")]


@pytest.mark.parametrize("name", FILES)
@settings(fuzzed, max_examples=40)
@given(data=st.data())
def test_damaged_bytes(intact: Place, name: str, data: st.DataObject) -> None:
    with copy_of(intact) as place:
        raw = bytearray((place.folder / name).read_bytes())
        for _ in range(data.draw(st.integers(1, 2), "damages")):
            damaged(data, raw)
        (place.folder / name).write_bytes(raw)
        check(place)


@pytest.mark.parametrize("name", ["base/README.md", "base/config.json"])
def test_damage_that_means_nothing(intact: Place, name: str) -> None:
    """Nor does it change the weights' bytes."""
    outputs = []
    for addition in ("", " \n"):
        with copy_of(intact) as place:
            path = place.folder / name
            path.write_text(path.read_text() + addition)
            assert check(place)
            outputs.append({key: raw for key, raw in contents(place.output).items() if key != Path(name).name})
    assert outputs[0] == outputs[1]


# --- structure --------------------------------------------------------------------------------------------------------

PARTS = st.sampled_from(
    ["..", "/", ".", "x", "model-00001-of-00002", ".safetensors", "\\", "\0", "~", "decoy", "%2e", ""]
)
FILE_NAMES = st.lists(PARTS, max_size=5).map("".join) | st.sampled_from([Path(name).name for name in FILES])
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([10**400, "q_proj"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(fuzzed, max_examples=60)
@given(
    changes=st.dictionaries(st.sampled_from([*MODULES, "model.norm.weight", "ghost"]), FILE_NAMES | JSON, max_size=2)
)
def test_any_index(intact: Place, changes: dict[str, Any]) -> None:
    with copy_of(intact) as place:
        for decoy in (place.folder.parent / "decoy.safetensors", place.folder / "decoy.safetensors"):
            save_file({"ghost": torch.ones(2)}, decoy)
        index = json.loads((place.base / INDEX).read_bytes())
        index["weight_map"] |= {
            name if name in index["weight_map"] else f"{name}.weight": to for name, to in changes.items()
        }
        write_json(place.base / INDEX, index)
        check(place)


KEYS = [*peft_config(), "rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "layers_pattern", "lora_bias"]
PATTERNS = st.dictionaries(
    st.sampled_from(["q_proj", ".*", "(", "(a+)+", "[", "layers.0", "^"]) | st.text(max_size=3), JSON
)


@settings(fuzzed, max_examples=100)
@given(changes=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), JSON | PATTERNS, min_size=1, max_size=3))
def test_any_settings(intact: Place, changes: dict[str, Any]) -> None:
    with copy_of(intact) as place:
        write_json(place.adapter / SETTINGS, json.loads((place.adapter / SETTINGS).read_text()) | changes)
        try:
            with only_within(place.folder):
                shardmerge.plan(place.config())
        except shardmerge.ShardmergeError as error:
            str(error).encode()


@settings(fuzzed, max_examples=60)
@given(
    changes=st.dictionaries(st.sampled_from(list(model_config())) | st.text(max_size=6), JSON, min_size=1, max_size=3)
)
def test_any_config_of_the_base(intact: Place, changes: dict[str, Any]) -> None:
    with copy_of(intact) as place:
        write_json(place.base / "config.json", model_config() | changes)
        try:
            with only_within(place.folder):
                shardmerge.plan(place.config(output={"dtype": "bfloat16"}))
        except shardmerge.ShardmergeError as error:
            str(error).encode()
