"""What a merge writes: shards that the safetensors library reads, an index that counts bytes, in a safe order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import shardmerge
from shardmerge import OutputError
from shardmerge.destinations.shard_writer import ShardWriter
from shardmerge.spec.tensors import PAGE
from shardmerge.system import durable
from shardmerge.system.directory import Directory
from tests.support.builders import shard_writer
from tests.support.peft_oracle import assert_same_bits, make_config, merge_to, random, stored, write_adapter, write_base

ROOT = Path(__file__).resolve().parents[2]
TARGETS = [f"model.layers.{number}.mlp.down_proj" for number in range(3)]


def tensors(number: int) -> dict[str, Tensor]:
    return {
        f"{TARGETS[number]}.weight": random(20, 12, seed=number),
        f"norm.{number}": random(7, seed=number, dtype=torch.bfloat16),
        f"count.{number}": torch.tensor(number),
    }


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    factors = random(2, 12, seed=8), random(20, 2, seed=9)
    return write_adapter(tmp_path / "adapter", dict.fromkeys(TARGETS, factors))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", [tensors(number) for number in range(3)])


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_base(tmp_path / "base", [{**tensors(0), **tensors(1), **tensors(2)}])


def index_of(output: Path, name: str = "model.safetensors.index.json") -> dict[str, Any]:
    value: dict[str, Any] = json.loads((output / name).read_text())
    return value


def check_index(output: Path, name: str = "model.safetensors.index.json") -> None:
    """Every tensor is where the index says, no tensor and no file is missing from it, and the total is their bytes."""
    index = index_of(output, name)
    found: dict[str, str] = {}
    total = 0
    for file in output.glob("*.safetensors"):
        for tensor, value in load_file(file).items():
            found[tensor] = file.name
            total += value.nbytes
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == total


def weight_names(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir() if ".safetensors" in path.name)


# --- shards and indexes -----------------------------------------------------------------------------------------------


def test_sharded_bases_keep_their_files(sharded: Path, adapter: Path, tmp_path: Path) -> None:
    merge_to(tmp_path / "out", sharded, adapter)
    assert weight_names(tmp_path / "out") == weight_names(sharded)
    for file in sharded.glob("*.safetensors"):
        assert load_file(file).keys() == load_file(tmp_path / "out" / file.name).keys()
    check_index(tmp_path / "out")


def test_a_base_of_one_file_gives_one_file_and_no_index(single: Path, adapter: Path, tmp_path: Path) -> None:
    merge_to(tmp_path / "out", single, adapter)
    assert weight_names(tmp_path / "out") == ["model.safetensors"]


def test_a_base_file_of_another_name_keeps_it(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    save_file({**tensors(0), **tensors(1), **tensors(2)}, tmp_path / "base" / "weights.safetensors")
    merge_to(tmp_path / "out", tmp_path / "base" / "weights.safetensors", adapter)
    assert weight_names(tmp_path / "out") == ["weights.safetensors"]


def test_shards_without_an_index_get_one(adapter: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [tensors(number) for number in range(3)], index=False)
    merge_to(tmp_path / "out", base, adapter)
    assert weight_names(tmp_path / "out") == [*weight_names(base), "model.safetensors.index.json"]
    check_index(tmp_path / "out")


@pytest.mark.parametrize("limit", [1, 967, 968, 982, 1964, 2945, 2946, 10**9], ids="limit-{}".format)
@pytest.mark.parametrize("kind", ["sharded", "single"])
def test_a_shard_size_gives_new_shards(
    kind: str, limit: int, adapter: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base: Path = request.getfixturevalue(kind)
    output = tmp_path / "out"
    merge_to(tmp_path / "same", base, adapter)
    merge_to(output, base, adapter, max_shard_size=limit)
    assert_same_bits(stored(output), stored(tmp_path / "same"))
    shards = sorted(output.glob("*.safetensors"))
    for shard in shards:
        sizes = [tensor.nbytes for tensor in load_file(shard).values()]
        assert sum(sizes) <= limit or len(sizes) == 1
    if len(shards) == 1:
        assert weight_names(output) == ["model.safetensors"]
        return
    count = len(shards)
    assert [shard.name for shard in shards] == [
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    check_index(output)
    # Filled as far as the limit allows: no two neighbours would have fitted into one.
    totals = [sum(tensor.nbytes for tensor in load_file(shard).values()) for shard in shards]
    firsts = [next(iter(tensor_sizes(shard).values())) for shard in shards]
    assert all(total + first > limit for total, first in zip(totals, firsts[1:], strict=False))


def tensor_sizes(shard: Path) -> dict[str, int]:
    """Bytes of each tensor of a file, in the order of their data."""
    with open(shard, "rb") as file:
        entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    entries.pop("__metadata__", None)
    offsets = sorted((entry["data_offsets"], name) for name, entry in entries.items())
    return {name: stop - start for (start, stop), name in offsets}


def test_an_index_of_another_name_and_its_metadata_are_kept(sharded: Path, adapter: Path, tmp_path: Path) -> None:
    index = index_of(sharded)
    index["metadata"] = {"total_size": 5, "total_parameters": 750, "note": {"a": [1]}}
    (sharded / "model.safetensors.index.json").unlink()
    for file in sharded.glob("*.safetensors"):
        file.rename(file.with_name(file.name.replace("model", "diffusion_model")))
    index["weight_map"] = {name: file.replace("model", "diffusion_model") for name, file in index["weight_map"].items()}
    (sharded / "diffusion_model.safetensors.index.json").write_text(json.dumps(index))
    merge_to(tmp_path / "out", sharded, adapter)
    name = "diffusion_model.safetensors.index.json"
    check_index(tmp_path / "out", name)
    metadata = index_of(tmp_path / "out", name)["metadata"]
    assert metadata["total_parameters"] == 750 and metadata["note"] == {"a": [1]}


def test_the_total_size_follows_a_changed_dtype(sharded: Path, adapter: Path, tmp_path: Path) -> None:
    merge_to(tmp_path / "out", sharded, adapter, dtype="float16")
    check_index(tmp_path / "out")
    assert index_of(tmp_path / "out")["metadata"]["total_size"] == 3 * (20 * 12 * 2 + 7 * 2 + 8)


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {"format": "pt", "é": "\N{SNOWMAN}"}, None], ids=str)
def test_the_metadata_of_a_file_is_kept(
    metadata: Mapping[str, str] | None, single: Path, adapter: Path, tmp_path: Path
) -> None:
    path = single / "model.safetensors"
    save_file(load_file(path), path, metadata=dict(metadata) if metadata else None)
    merge_to(tmp_path / "out", single, adapter)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == metadata


@pytest.mark.parametrize("dtype", ["same", "float32", "bfloat16", "float16"])
def test_every_tensor_is_aligned_to_its_dtype(dtype: str, single: Path, adapter: Path, tmp_path: Path) -> None:
    merge_to(tmp_path / "out", single, adapter, dtype=dtype)
    path = tmp_path / "out" / "model.safetensors"
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    assert (8 + length) % 8 == 0
    if dtype == "same":
        return  # the base's own order is kept
    for name, tensor in load_file(path).items():
        assert entries[name]["data_offsets"][0] % tensor.element_size() == 0


# --- modes ------------------------------------------------------------------------------------------------------------

_MERGE = """
import os, sys
os.umask(int(sys.argv[1], 8))
import shardmerge
shardmerge.merge(sys.argv[2])
"""


@pytest.mark.parametrize("umask", ["027", pytest.param("022", marks=pytest.mark.slow)])
def test_modes_follow_the_umask(umask: str, sharded: Path, adapter: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(make_config(tmp_path / "deep" / "out", sharded, [adapter])))
    for file in sharded.iterdir():
        file.chmod(0o400)
    subprocess.run([sys.executable, "-c", _MERGE, umask, str(config)], cwd=ROOT, check=True, timeout=300)
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "deep" / "out").rglob("*")}
    assert {"config.json", "shardmerge.json", "model-00001-of-00003.safetensors"} <= found.keys()
    assert set(found.values()) == {0o666 & ~int(umask, 8)}
    for folder in (tmp_path / "deep", tmp_path / "deep" / "out"):
        assert folder.stat().st_mode & 0o777 == 0o777 & ~int(umask, 8)


# --- the order of the commit ------------------------------------------------------------------------------------------


def renames(config: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, set[str]]]:
    """Every rename into the output itself: the name, and the weight files and markers there just before it."""
    output = Path(config["output"]["path"])
    seen: list[tuple[str, set[str]]] = []
    replace = os.replace

    def noting(source: str, target: str, **folders: int) -> None:
        if os.path.samestat(os.fstat(folders["dst_dir_fd"]), output.stat()):
            seen.append((target, {path.name for path in output.iterdir()}))
        replace(source, target, **folders)

    monkeypatch.setattr(os, "replace", noting)
    shardmerge.merge(config)
    return seen


def test_the_index_comes_last(sharded: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = renames(make_config(tmp_path / "out", sharded, [adapter]), monkeypatch)
    name, before = seen[-1]
    assert name == "model.safetensors.index.json"
    complete = {path.name for path in (tmp_path / "out").iterdir()}
    # Its own temporary name is there, and the work folder still is.
    assert before - {f"{name}.tmp", ".shardmerge"} == complete - {name}


def test_of_one_file_the_weights_come_last(
    single: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = renames(make_config(tmp_path / "out", single, [adapter]), monkeypatch)
    name, before = seen[-1]
    assert name == "model.safetensors"
    assert before - {".shardmerge"} == {path.name for path in (tmp_path / "out").iterdir()} - {name}


def test_no_shard_is_in_the_output_before_all_are_finished(
    sharded: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = shardmerge.plan(make_config(tmp_path / "out", sharded, [adapter]))
    found: list[list[str]] = []
    shardmerge.merge(plan, progress=lambda progress: found.append(weight_names(tmp_path / "out")))
    assert found and not any(found)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to know which file a descriptor is of")
def test_a_file_is_durable_before_it_has_its_name(
    sharded: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is renamed was fsynced after its last write; the directory is fsynced before anything else is."""
    log: list[tuple[str, str]] = []
    on_disk: set[str] = set()
    real = {name: getattr(os, name) for name in ("replace", "fsync", "pwrite")}

    def path_of(descriptor: int) -> str:
        return os.readlink(f"/proc/self/fd/{descriptor}")

    def pwrite(descriptor: int, *rest: Any) -> Any:
        on_disk.discard(path_of(descriptor))
        return real["pwrite"](descriptor, *rest)

    def fsync(descriptor: int) -> None:
        on_disk.add(path_of(descriptor))
        log.append(("fsync", path_of(descriptor)))

    def replace(source: str, target: str, **folders: int) -> None:
        old, new = f"{path_of(folders['src_dir_fd'])}/{source}", f"{path_of(folders['dst_dir_fd'])}/{target}"
        assert old in on_disk, source
        on_disk.remove(old)
        on_disk.add(new)
        log.append(("rename", new))
        real["replace"](source, target, **folders)

    for name, function in (("pwrite", pwrite), ("fsync", fsync), ("replace", replace)):
        monkeypatch.setattr(os, name, function)
    merge_to(tmp_path / "out", sharded, adapter)
    places = [number for number, (step, _) in enumerate(log) if step == "rename"]
    # 3 shards, 3 receipts and 3 placings, the journal twice, config.json, the record, the index.
    assert len(places) == 14
    for number in places:
        assert log[number + 1] == ("fsync", os.path.dirname(log[number][1]))


# --- the writer of a shard --------------------------------------------------------------------------------------------


def test_a_shard_that_is_not_committed_is_removed(sharded: Path, adapter: Path, tmp_path: Path) -> None:
    shard = shardmerge.plan(make_config(tmp_path / "out", sharded, [adapter])).shards[0]
    target = tmp_path / "stage" / shard.name
    target.parent.mkdir()
    with shard_writer(target, shard) as writer:
        writer.write_block(memoryview(bytearray(2 * PAGE)), shard.header_bytes % PAGE, 0, 3)
        assert [path.name for path in target.parent.iterdir()] == [shard.name + durable.TEMPORARY_SUFFIX]
    assert list(target.parent.iterdir()) == []


def test_a_writer_without_a_directory_is_an_output_error(sharded: Path, adapter: Path, tmp_path: Path) -> None:
    shard = shardmerge.plan(make_config(tmp_path / "out", sharded, [adapter])).shards[0]
    with pytest.raises(OutputError, match="nowhere"), Directory(tmp_path) as directory:
        ShardWriter(directory / f"nowhere/{shard.name}", shard)
