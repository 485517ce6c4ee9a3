"""What a plan promises: shards, names, sizes, bytes read and written, and a digest of all that they depend on."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import shardmerge
from shardmerge.errors import PlanError
from shardmerge.file_formats.checkpoint import Checkpoint, open_checkpoint
from shardmerge.file_formats.checkpoint_files import Shard
from shardmerge.file_formats.safetensors_header import FIRST_READ
from shardmerge.planning.layout import lay_out
from shardmerge.sources.local import LocalReader, LocalSource
from shardmerge.sources.source import open_source
from shardmerge.spec.plans import jsonable
from shardmerge.spec.tensors import SourceFile, TensorRef, Weight
from tests.support.builders import (
    Q0,
    Place,
    llama_tensors,
    make_place,
    model_config,
    peft_config,
    shard_names,
    untimed,
    write_json,
    write_peft,
    write_pure,
    write_shards,
)

INDEX = "model.safetensors.index.json"


def pure(place: Place) -> dict[str, Any]:
    return {"adapters": [{"path": str(write_pure(place.folder / "x.pt")), "alpha": 8}]}


def tall(place: Place) -> dict[str, Any]:
    """A tensor of several tiles, of which one factor goes by rows, and not enough memory for large ones."""
    write_shards(place.base, {**llama_tensors(), Q0 + ".weight": torch.ones(4096, 32)})
    factors = {"A": torch.ones(4, 32), "B": torch.ones(4096, 4)}
    write_peft(place.adapter, {f"base_model.model.{Q0}.lora_{role}.weight": one for role, one in factors.items()})
    return {"compute": {"max_memory": "11.5MB"}}


MERGES: dict[str, Callable[[Place], dict[str, Any]]] = {
    "same": lambda place: {},
    "another dtype": lambda place: {"output": {"dtype": "bfloat16"}},
    "other shards": lambda place: {"output": {"max_shard_size": "20kB"}},
    "small tiles": tall,
    "factors stored transposed": pure,
    "two adapters": lambda place: {"adapters": [str(place.adapter), str(write_peft(place.folder / "other"))]},
}


@pytest.mark.parametrize("changes", MERGES.values(), ids=MERGES)
def test_bytes_and_shards_are_what_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Callable[[Place], dict[str, Any]]
) -> None:
    place = make_place(tmp_path)
    read, ends = 0, dict[str, int]()
    read_into = LocalReader.read_into

    def counting(self: LocalReader, offset: int, view: memoryview) -> None:
        nonlocal read
        read += len(view)
        ends[self.path] = max(ends.get(self.path, 0), offset + len(view))
        read_into(self, offset, view)

    monkeypatch.setattr(LocalReader, "read_into", counting)
    plan = shardmerge.plan(place.config(**changes(place)))
    tiles = max(tensor.tiles for shard in plan.shards for tensor in shard.tensors)
    assert (tiles > 1) == (changes is tall)
    for path in place.base.glob("*.safetensors"):  # no weight is read for a plan
        with path.open("rb") as file:
            assert ends[str(path)] <= max(FIRST_READ, 8 + int.from_bytes(file.read(8), "little"))
    read = 0
    report = shardmerge.merge(plan)
    copied = sum(aux.source.size for aux in plan.aux if aux.content is None)
    # The files beside the weights and the adapters are hashed, too.
    hashed = copied + sum(file.size for adapter in plan.adapters for file in adapter.files)
    assert plan.bytes_read == read - copied - hashed == report.bytes_read
    sizes = {path.name: path.stat().st_size for path in place.output.iterdir()}
    assert plan.bytes_written == sum(sizes.values()) - sizes["shardmerge.json"] - sizes[INDEX] == report.bytes_written
    assert {shard.name: shard.nbytes for shard in plan.shards} == {
        name: size for name, size in sizes.items() if name.endswith(".safetensors")
    }
    written = open_checkpoint(open_source(str(place.output)))
    for shard, planned in zip(written.shards, plan.shards, strict=True):
        assert shard.name == planned.name
        assert [(ref.name, ref.dtype, ref.shape) for ref in shard.tensors] == [
            (tensor.source.name, tensor.out.dtype, tensor.out.shape) for tensor in planned.tensors
        ]
    index = json.loads((place.output / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(ref.nbytes for shard in written.shards for ref in shard.tensors)
    assert index["weight_map"] == {ref.name: shard.name for shard in written.shards for ref in shard.tensors}


# --- shards -----------------------------------------------------------------------------------------------------------

TOTAL = sum(tensor.nbytes for tensor in llama_tensors().values())


@pytest.mark.parametrize(
    ("shards", "index", "size", "names", "index_name"),
    [
        (2, True, "same", shard_names(2), INDEX),
        (3, False, "same", shard_names(3), INDEX),
        (1, True, "same", ["model.safetensors"], None),
        (2, True, TOTAL, ["model.safetensors"], None),
        (2, True, TOTAL - 1, shard_names(2), INDEX),
        (3, False, "1GB", ["model.safetensors"], None),
        (1, True, "1GB", ["model.safetensors"], None),
        (1, True, TOTAL - 1, shard_names(2), INDEX),
    ],
    ids=[
        "kept",
        "kept, without index",
        "kept, one file",
        "just one",
        "just two",
        "numbered to one",
        "one to one",
        "one to two",
    ],
)
def test_names(
    tmp_path: Path, shards: int, index: bool, size: str | int, names: list[str], index_name: str | None
) -> None:
    place = make_place(tmp_path, shards=shards, index=index)
    plan = shardmerge.plan(place.config(output={"max_shard_size": size}))
    assert [shard.name for shard in plan.shards] == names
    assert plan.index_name == index_name


@pytest.mark.parametrize("stem", ["tiny", "pytorch_model", "a.b-1"])
def test_names_follow_the_base(tmp_path: Path, stem: str) -> None:
    place = make_place(tmp_path)
    for path in place.base.glob("model*"):
        path.unlink()
    write_shards(place.base, llama_tensors(), stem=stem)
    plan = shardmerge.plan(place.config(output={"max_shard_size": TOTAL - 1}))
    assert [shard.name for shard in plan.shards] == shard_names(2, stem)
    assert plan.index_name == f"{stem}.safetensors.index.json"


def checkpoint_of(sizes: list[list[int]]) -> Checkpoint:
    """A checkpoint of shards of F32 vectors of so many elements, that is nowhere."""
    source, shards, number = LocalSource("/nowhere"), [], 0
    for name, part in zip(shard_names(len(sizes)), sizes, strict=True):
        refs = []
        for size in part:
            refs.append(TensorRef(f"t{number}", f"/nowhere/{name}", "F32", (size,), 0, 4 * size))
            number += 1
        shards.append(Shard(name, SourceFile(f"/nowhere/{name}", 0), (("format", "pt"),), tuple(refs)))
    weights = {ref.name: Weight(ref.name, (("weight", ref),), shard.name) for shard in shards for ref in shard.tensors}
    return Checkpoint(source, tuple(shards), weights, INDEX, {}, {})


@untimed
@given(
    st.lists(st.lists(st.integers(0, 40), max_size=8), min_size=1, max_size=4),
    st.integers(1, 400),
    st.sampled_from(["same", "BF16"]),
)
def test_resharding(sizes: list[list[int]], limit: int, dtype: str) -> None:
    checkpoint = checkpoint_of(sizes)
    width = 4 if dtype == "same" else 2
    layout = lay_out(checkpoint, dtype, limit)
    in_order = [ref.name for shard in checkpoint.shards for ref in shard.tensors]
    assert [tensor.source.name for shard in layout.shards for tensor in shard.tensors] == in_order
    count = len(layout.shards)
    assert [shard.name for shard in layout.shards] == (shard_names(count) if count > 1 else ["model.safetensors"])
    assert layout.index_name == (INDEX if count > 1 else None)
    for shard, following in zip(layout.shards, [*layout.shards[1:], None], strict=True):
        assert shard.metadata == (("format", "pt"),)
        assert shard.data_bytes <= limit or sum(1 for tensor in shard.tensors if tensor.out.nbytes) == 1
        if following is not None:  # the next tensor would not have fitted
            assert shard.data_bytes + following.tensors[0].out.nbytes > limit
        end = 0
        for tensor in shard.tensors:
            assert tensor.out.data_offsets == (end, end := end + tensor.source.shape[0] * width)
        assert end == shard.data_bytes
        assert shard.header_bytes % 8 == 0


def test_conversion_puts_the_widest_first(tmp_path: Path) -> None:
    """So that no tensor lies at an offset that its dtype does not divide."""
    tensors = {"u8": torch.ones(3, dtype=torch.uint8), "w": torch.ones(3), "i64": torch.ones(1, dtype=torch.int64)}
    save_file(tensors, tmp_path / "model.safetensors")
    layout = lay_out(open_checkpoint(open_source(str(tmp_path))), "BF16", None)
    (shard,) = layout.shards
    assert [(tensor.source.name, tensor.out.dtype) for tensor in shard.tensors] == [
        ("i64", "I64"),
        ("w", "BF16"),
        ("u8", "U8"),
    ]
    assert all(
        tensor.out.data_offsets[0] % {"I64": 8, "BF16": 2, "U8": 1}[tensor.out.dtype] == 0 for tensor in shard.tensors
    )


# --- the plan as data -------------------------------------------------------------------------------------------------


def test_plan_is_data(tmp_path: Path) -> None:
    plan = shardmerge.plan(make_place(tmp_path).config())
    assert pickle.loads(pickle.dumps(plan)) == plan
    json.dumps(jsonable(plan), allow_nan=False)


def test_plan_is_the_same_twice(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    assert shardmerge.plan(place.config()) == shardmerge.plan(place.config())


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"output": {"path": "/elsewhere/x"}}, True),
        ({"compute": {"max_memory": "1GB"}}, True),
        ({"output": {"dtype": "bfloat16"}}, False),
        ({"output": {"max_shard_size": "20kB"}}, False),
        ({"compute": {"dtype": "float64"}}, False),
        ({"adapters": [{"path": "adapter", "weight": 2}]}, False),
        ({"adapters": ["adapter", "adapter"]}, False),
        ({"adapters": ["other"]}, False),
    ],
    ids=["another place", "more memory", "dtype", "shards", "compute dtype", "weight", "twice", "another adapter"],
)
def test_digest_of_another_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], same: bool
) -> None:
    place = make_place(tmp_path)
    write_peft(tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    assert (shardmerge.plan(place.config(**changes)).digest == shardmerge.plan(place.config()).digest) == same


@pytest.mark.parametrize(
    "name",
    [
        "base/model-00001-of-00002.safetensors",
        "base/config.json",
        "base/LICENSE",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
    ],
)
def test_digest_of_other_files(tmp_path: Path, name: str) -> None:
    place = make_place(tmp_path)
    before = shardmerge.plan(place.config()).digest
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)  # the same bytes, but another file: nobody has compared them
    assert shardmerge.plan(place.config()).digest != before


def test_digest_of_another_alpha(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    entry = pure(place)["adapters"][0]
    digests = {shardmerge.plan(place.config(adapters=[{**entry, "alpha": alpha}])).digest for alpha in (8, 16, 8.0, 4)}
    assert len(digests) == 3


# --- base: auto, and what an adapter says of its base -----------------------------------------------------------------


def trained_on(place: Place, name: str, base: Path | str | None) -> str:
    config = peft_config(base_model_name_or_path=None if base is None else str(base))
    return str(write_peft(place.folder / name, config=config))


def test_auto_is_what_the_adapter_was_trained_on(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    plan = shardmerge.plan(place.config(base="auto", adapters=[trained_on(place, "a", place.base)]))
    assert plan.base.location == str(place.base)
    assert plan.warnings == ()


def test_auto_with_several_adapters_of_one_base(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    adapters = [trained_on(place, "a", None), trained_on(place, "b", place.base), trained_on(place, "c", place.base)]
    assert shardmerge.plan(place.config(base="auto", adapters=adapters)).base.location == str(place.base)


def test_auto_with_a_base_that_is_gone(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    with pytest.raises(PlanError, match=r"base: auto: the adapter names /gone/base: no such file"):
        shardmerge.plan(place.config(base="auto", adapters=[trained_on(place, "a", "/gone/base")]))


def test_auto_with_an_adapter_that_is_gone(tmp_path: Path) -> None:
    """What the base would have been cannot be known, so it is no second problem."""
    place = make_place(tmp_path)
    with pytest.raises(PlanError, match=r"1 problem.*\n.*/gone/lora: no such file"):
        shardmerge.plan(place.config(base="auto", adapters=["/gone/lora"]))


@pytest.mark.parametrize(
    "says",
    ["org/other", "org/BASE", "/home/somebody/base/", "base", "C:\\models\\x", None],
    ids=str,
)
def test_a_local_copy_may_be_called_anything(tmp_path: Path, says: str | None) -> None:
    place = make_place(tmp_path)
    assert shardmerge.plan(place.config(adapters=[trained_on(place, "a", says)])).warnings == ()


@pytest.mark.parametrize(
    ("says", "warned"),
    [
        ("org/Llama-8B", True),
        ("org/Llama-8B-Instruct", False),
        ("other/llama-8b-instruct", False),
        ("unsloth/Llama-8B-Instruct-unsloth-bnb-4bit", False),
        ("org/Llama-8B-Instruct-AWQ", False),
        ("org/Llama-8B-Instruct@v2", False),
        ("/home/somebody/copy", False),
    ],
)
@pytest.mark.parametrize("where", ["config.json", "the Hub's cache"])
def test_another_base_than_the_adapter_says(tmp_path: Path, says: str, warned: bool, where: str) -> None:
    name = "org/Llama-8B-Instruct"
    place = make_place(tmp_path, config=model_config(_name_or_path=name if where == "config.json" else ...))
    base = place.base
    if where != "config.json":
        base = tmp_path / "models--org--Llama-8B-Instruct" / "snapshots" / "0123"
        base.parent.mkdir(parents=True)
        place.base.rename(base)
    warnings = shardmerge.plan(place.config(base=str(base), adapters=[trained_on(place, "a", says)])).warnings
    expected = f"says it was trained on {says}, not on {base}: the base is {name}"
    assert [warning.endswith(expected) for warning in warnings] == [True] * warned


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({}, ""),
        ({"vocab_size": 32}, ""),  # of which the base says nothing
        ({"hidden_size": 64}, "hidden_size is 64 there, and 32 in the base"),
        ({"model_type": "qwen2"}, "model_type is qwen2 there, and llama in the base"),
        ({"hidden_size": ..., "text_config": {"hidden_size": 64}}, "hidden_size is 64 there"),
        ({"hidden_size": ..., "text_config": {"hidden_size": 32}}, ""),
    ],
    ids=str,
)
def test_the_model_that_the_adapter_names_is_here(tmp_path: Path, changes: dict[str, Any], warned: str) -> None:
    """It may be a copy of the base, or another model: its config.json says which."""
    place = make_place(tmp_path)
    (tmp_path / "named").mkdir()
    write_json(tmp_path / "named" / "config.json", model_config(**changes))
    warnings = shardmerge.plan(place.config(adapters=[trained_on(place, "a", tmp_path / "named")])).warnings
    assert len(warnings) == bool(warned) and all(warned in warning for warning in warnings)


@pytest.mark.parametrize("harm", ["no config.json", "no JSON", "FIFO"])
def test_a_named_model_that_cannot_be_read_says_nothing(tmp_path: Path, harm: str) -> None:
    place = make_place(tmp_path)
    (tmp_path / "named").mkdir()
    if harm == "no JSON":
        (tmp_path / "named" / "config.json").write_text("{")
    elif harm == "FIFO":
        os.mkfifo(tmp_path / "named" / "config.json")
    assert shardmerge.plan(place.config(adapters=[trained_on(place, "a", tmp_path / "named")])).warnings == ()


def test_rounding_twice_is_a_warning(tmp_path: Path) -> None:
    (warning,) = shardmerge.plan(make_place(tmp_path).config(compute={"dtype": "bfloat16"})).warnings
    assert "rounds the update before it is added" in warning


def test_device_that_is_not_here(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    with pytest.raises(PlanError, match=r"cuda:99.*finds \d+ CUDA devices"):
        shardmerge.merge(place.config(compute={"device": "cuda:99"}))
    assert not place.output.exists()
