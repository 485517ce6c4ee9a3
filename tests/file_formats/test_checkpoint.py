"""Bases as they are stored: with and without an index, in one file or several, complete or not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shardmerge.errors import FormatError, SourceError
from shardmerge.file_formats.checkpoint import Checkpoint, open_checkpoint
from shardmerge.sources.local import LocalSource
from shardmerge.sources.source import open_source
from shardmerge.spec.tensors import DTYPE_BITS
from tests.support.builders import (
    Q0,
    llama_tensors,
    model_config,
    shard_names,
    split,
    write_base,
    write_index,
    write_json,
    write_shards,
)

FIRST, SECOND = shard_names(2)
INDEX = "model.safetensors.index.json"


def opened(path: Path) -> Checkpoint:
    return open_checkpoint(open_source(str(path)))


def refusal(path: Path) -> str:
    with pytest.raises(FormatError) as raised:
        opened(path)
    assert raised.value.exit_code == 4
    return str(raised.value)


def edit_index(folder: Path, **changes: object) -> None:
    """Change entries of the weight map."""
    path = folder / INDEX
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    write_json(path, index)


def stored_bytes(checkpoint: Checkpoint, name: str) -> bytes:
    ref = checkpoint.weights[name].tensor
    return Path(ref.uri).read_bytes()[ref.offset : ref.offset + ref.nbytes]


# --- the ways to store a base -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shards", "index", "names"),
    [(2, True, [FIRST, SECOND]), (3, False, shard_names(3)), (1, False, ["model.safetensors"])],
    ids=["index", "numbered without index", "one file"],
)
def test_every_tensor_is_found_where_it_is(tmp_path: Path, shards: int, index: bool, names: list[str]) -> None:
    tensors = llama_tensors(torch.bfloat16)
    base = write_base(tmp_path / "base", tensors, shards=shards, index=index)
    checkpoint = opened(base)
    assert [shard.name for shard in checkpoint.shards] == names
    assert checkpoint.index_name == (INDEX if index else None)
    assert checkpoint.weights.keys() == tensors.keys()
    for name, part in zip(names, split(tensors, shards), strict=True):
        for tensor in part:
            assert checkpoint.weights[tensor].shard == name
    for name, expected in tensors.items():
        ref = checkpoint.weights[name].tensor
        assert (ref.dtype, ref.shape) == ("BF16", tuple(expected.shape))
        assert stored_bytes(checkpoint, name) == bytes(expected.view(torch.uint8).flatten().tolist())


def test_info(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    info = opened(base).info()
    files = [base / FIRST, base / SECOND]
    assert (info.location, info.revision, info.shards, info.model_type) == (str(base), None, 2, "llama")
    assert info.tensors == len(llama_tensors())
    assert info.nbytes == sum(file.stat().st_size for file in files)
    assert [(file.uri, file.size) for file in info.files] == [(str(file), file.stat().st_size) for file in files]


def test_index_metadata_is_kept(tmp_path: Path) -> None:
    base = tmp_path / "base"
    write_shards(base, llama_tensors(), index=False)
    weight_map = {
        name: file for file, part in zip((FIRST, SECOND), split(llama_tensors(), 2), strict=True) for name in part
    }
    write_index(base, weight_map, total_size=7, made_by="somebody")
    assert dict(opened(base).index_metadata) == {"total_size": 7, "made_by": "somebody"}


@pytest.mark.parametrize("name", ["model.safetensors", "anything.safetensors"])
def test_path_of_a_file(tmp_path: Path, name: str) -> None:
    save_file(llama_tensors(), tmp_path / name)
    save_file({"other": torch.ones(1)}, tmp_path / "other.safetensors")
    checkpoint = opened(tmp_path / name)
    assert checkpoint.weights.keys() == llama_tensors().keys()
    assert [shard.name for shard in checkpoint.shards] == [name]


def test_path_of_a_file_knows_the_model_around_it(tmp_path: Path) -> None:
    """How the layers are stored and whether the head is tied stand in config.json alone."""
    base = write_base(tmp_path / "base", shards=1, config=model_config(model_type="gpt2", tie_word_embeddings=True))
    checkpoint = opened(base / "model.safetensors")
    assert (checkpoint.model_type, checkpoint.ties_embeddings) == ("gpt2", True)


def test_only_file_of_a_folder_need_not_be_called_model(tmp_path: Path) -> None:
    save_file(llama_tensors(), tmp_path / "tiny.safetensors")
    assert [shard.name for shard in opened(tmp_path).shards] == ["tiny.safetensors"]


@pytest.mark.parametrize("other", ["adapter_model", "consolidated", "consolidated-00001-of-00002", "optimizer"])
def test_files_that_are_no_part_of_the_model(tmp_path: Path, other: str) -> None:
    write_shards(tmp_path, llama_tensors(), index=False)
    save_file({"other": torch.ones(1)}, tmp_path / f"{other}.safetensors")
    assert opened(tmp_path).weights.keys() == llama_tensors().keys()


def test_model_safetensors_wins_over_its_neighbours(tmp_path: Path) -> None:
    write_shards(tmp_path, llama_tensors(), shards=1)
    save_file({"other": torch.ones(1)}, tmp_path / "extra.safetensors")
    assert [shard.name for shard in opened(tmp_path).shards] == ["model.safetensors"]


def test_folders_and_hidden_files_are_not_the_model(tmp_path: Path) -> None:
    write_shards(tmp_path, llama_tensors(), shards=1)
    for name in ("sub", ".hidden"):
        (tmp_path / name).mkdir()
        save_file({name: torch.ones(1)}, tmp_path / name / "model-00001-of-00001.safetensors")
    save_file({"hidden": torch.ones(1)}, tmp_path / ".x.safetensors")
    assert opened(tmp_path).weights.keys() == llama_tensors().keys()


@pytest.mark.parametrize("whole", [False, True], ids=["linked files", "linked folder"])
def test_links_as_in_the_cache_of_the_hub(tmp_path: Path, whole: bool) -> None:
    base = write_base(tmp_path / "base")
    entry = tmp_path / "models--org--name"
    snapshot = entry / "snapshots" / "abc"
    if whole:
        snapshot.parent.mkdir(parents=True)
        snapshot.symlink_to(base)
    else:
        blobs = entry / "blobs"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for number, path in enumerate(sorted(base.iterdir())):
            path.rename(blobs / str(number))
            (snapshot / path.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    checkpoint = opened(snapshot)
    assert checkpoint.weights.keys() == llama_tensors().keys()
    assert checkpoint.model_type == "llama"
    assert checkpoint.weights[Q0 + ".weight"].tensor.uri.startswith(str(snapshot))
    expected = llama_tensors()[Q0 + ".weight"]
    assert stored_bytes(checkpoint, Q0 + ".weight") == bytes(expected.view(torch.uint8).flatten().tolist())


def test_link_to_nowhere_is_a_missing_shard(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (base / SECOND).unlink()
    (base / SECOND).symlink_to("gone")
    with pytest.raises(SourceError, match=f"{SECOND}: is a link that leads nowhere, to gone; the download is incomp"):
        opened(base)


@pytest.mark.parametrize(
    ("dtype", "code"),
    [
        (torch.float64, "F64"),
        (torch.float16, "F16"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.int64, "I64"),
        (torch.int32, "I32"),
        (torch.int16, "I16"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.bool, "BOOL"),
        (torch.complex64, "C64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_dtypes_are_seen(tmp_path: Path, dtype: torch.dtype, code: str) -> None:
    tensor = torch.ones(3, 4).to(dtype)
    save_file({"w": tensor, "scalar": torch.ones((), dtype=dtype)}, tmp_path / "model.safetensors")
    weights = opened(tmp_path).weights
    ref = weights["w"].tensor
    assert (ref.dtype, ref.shape, ref.nbytes) == (code, (3, 4), 12 * DTYPE_BITS[code] // 8)
    assert weights["scalar"].tensor.shape == ()


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({}, False),
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"text_config": "x"}, False),
    ],
    ids=["nothing said", "tied", "the outer word counts", "only the inner", "odd"],
)
def test_tied_embeddings(tmp_path: Path, config: dict[str, object], tied: bool) -> None:
    base = write_base(tmp_path / "base", shards=1, config=config)
    assert opened(base).ties_embeddings is tied


# --- what is refused --------------------------------------------------------------------------------------------------


def missing_shard(base: Path) -> None:
    (base / SECOND).unlink()


def numbered_shard_missing(base: Path) -> None:
    (base / INDEX).unlink()
    (base / FIRST).unlink()


def duplicate_tensor(base: Path) -> None:
    part = split(llama_tensors(), 2)[1]
    save_file({**part, Q0 + ".weight": torch.ones(1)}, base / SECOND)


def two_indexes(base: Path) -> None:
    (base / INDEX).rename(base / "a.safetensors.index.json")
    (base / "b.safetensors.index.json").write_text((base / "a.safetensors.index.json").read_text())


def pickled(base: Path) -> None:
    for path in (*base.glob("*.safetensors"), base / INDEX):
        path.unlink()
    (base / "pytorch_model.bin").write_bytes(b"x")


def nothing(base: Path) -> None:
    for path in (*base.glob("*.safetensors"), base / INDEX):
        path.unlink()


def index_text(text: str) -> Callable[[Path], object]:
    return lambda base: (base / INDEX).write_text(text)


def placed_in(file: object) -> Callable[[Path], object]:
    return lambda base: edit_index(base, **{"lm_head.weight": file})


DAMAGED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a shard is missing": (missing_shard, [INDEX, "names 1 shards that are not there", SECOND, "incomplete"]),
    "a numbered shard is missing": (numbered_shard_missing, ["of the 2 shards of model, these are missing: [1]"]),
    "a tensor is stored twice": (duplicate_tensor, [repr(Q0 + ".weight"), "stored twice", FIRST, SECOND]),
    "two indexes": (two_indexes, ["several indexes", "a.safetensors.index.json, b.safetensors.index.json"]),
    "pickled": (pickled, ["expected .safetensors files", "pickled weights; convert them"]),
    "no weights": (nothing, ["expected .safetensors files", "nothing to merge into"]),
    "index names a tensor that is not there": (
        lambda base: edit_index(base, ghost=FIRST),
        ["names 1 tensors that are not in the file that it names", "'ghost'", FIRST],
    ),
    "index names the wrong shard": (placed_in(FIRST), ["not in the file that it names", "'lm_head.weight'"]),
    "index leaves the folder": (placed_in("../x.safetensors"), ["'lm_head.weight'", "'../x.safetensors'"]),
    "index goes below the folder": (placed_in("sub/x.safetensors"), ["'sub/x.safetensors'"]),
    "index names the root": (placed_in("/x.safetensors"), ["'/x.safetensors'", "not the name of a .safetensors file"]),
    "index with backslashes": (placed_in("..\\x.safetensors"), ["not the name of a .safetensors file"]),
    "index names a dot": (placed_in(".."), ["'..'", "not the name of a .safetensors file"]),
    "index names another kind": (placed_in("x.bin"), ["'x.bin'", "not the name of a .safetensors file"]),
    "index names a number": (placed_in(7), ["7", "not the name of a .safetensors file"]),
    "index is not JSON": (index_text("{"), [INDEX, "is not JSON"]),
    "index is a list": (index_text("[]"), [INDEX, "is not a JSON object"]),
    "index has no weight map": (index_text("{}"), [INDEX, "expected", "weight_map"]),
    "index is empty": (index_text('{"weight_map": {}}'), [INDEX, "expected", "weight_map"]),
    "index maps from a list": (index_text('{"weight_map": []}'), [INDEX, "expected", "weight_map"]),
    "index metadata is a list": (index_text('{"weight_map": {"a": "b.safetensors"}, "metadata": [1]}'), ["expected"]),
    "a shard is a pointer": (
        lambda base: (base / FIRST).write_text("version https://git-lfs.github.com/spec/v1\n"),
        [f"{FIRST}: it is a Git LFS pointer", "git lfs pull"],
    ),
    "a shard is not a safetensors file": (
        lambda base: (base / FIRST).write_text("some other text"),
        [FIRST, "not a safetensors file"],
    ),
    "a shard is cut": (lambda base: os.truncate(base / FIRST, 2000), [FIRST, "cut"]),
    "config.json is not JSON": (lambda base: (base / "config.json").write_text("{,}"), ["config.json is not"]),
    "config.json is a list": (lambda base: (base / "config.json").write_text("[]"), ["config.json is not a"]),
}


@pytest.mark.parametrize(("damage", "parts"), DAMAGED.values(), ids=DAMAGED)
def test_refusal(tmp_path: Path, damage: Callable[[Path], object], parts: list[str]) -> None:
    base = write_base(tmp_path / "base")
    damage(base)
    message = refusal(base)
    assert str(base) in message
    for part in parts:
        assert part in message


def test_model_index_wins_over_another(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    write_index(base, {"x": "gone.safetensors"}, "consolidated")
    assert opened(base).index_name == INDEX


def test_one_shard_of_several_is_no_model(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    assert "of the 2 shards of model, these are missing: [2]" in refusal(base / FIRST)


def test_index_is_no_path_of_a_base(tmp_path: Path) -> None:
    """Its shards lie beside it, so nobody must be told that the download is incomplete."""
    base = write_base(tmp_path / "base")
    message = refusal(base / INDEX)
    assert "incomplete" not in message
    assert f"give the directory {base}" in message


def test_many_missing_shards_are_not_all_listed(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", shards=8)
    for name in shard_names(8)[1:]:
        (base / name).unlink()
    message = refusal(base)
    assert "names 7 shards that are not there" in message
    assert shard_names(8)[5] in message
    assert shard_names(8)[6] not in message


def test_a_config_that_is_not_there_is_empty(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    (base / "config.json").unlink()
    assert open_checkpoint(LocalSource(str(base))).config == {}


def test_a_tensor_that_the_index_leaves_out_is_named(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base")
    path = base / INDEX
    index = json.loads(path.read_text())
    names = [f"model.layers.0.{name}_layernorm.weight" for name in ("input", "post_attention")]
    files = [index["weight_map"].pop(name) for name in names]
    write_json(path, index)
    (note,) = opened(base).notes
    assert f"{INDEX} leaves out 2 tensors of the shards that it names" in note
    for name, file in zip(names, files, strict=True):
        assert f"'{name}' in {file}" in note
    assert opened(base).weights.keys() == llama_tensors().keys()


def test_programs_load_what_the_index_leaves_out(tmp_path: Path) -> None:
    """That is why it is merged. The oracle is transformers."""
    from tests.support.peft_oracle import Base, Lora, base_folder, merge_to, weight_bytes
    from tests.support.peft_oracle import adapter_folder as peft_adapter

    spec = Base(max_shard_size=20_000)
    base = shutil.copytree(base_folder(spec), tmp_path / "base")
    index = json.loads((base / INDEX).read_text())
    left_out = "model.layers.0.self_attn.q_proj.weight"
    file = index["weight_map"].pop(left_out)
    assert file in index["weight_map"].values()  # an index that names a file loads all of it
    write_json(base / INDEX, index)
    transformers = pytest.importorskip("transformers")
    _, found = transformers.AutoModelForCausalLM.from_pretrained(base, output_loading_info=True)
    assert not found["missing_keys"]
    adapter = peft_adapter(spec, Lora())
    report = merge_to(tmp_path / "out", base, adapter)
    merge_to(tmp_path / "whole", base_folder(spec), adapter)
    assert any(repr(left_out) in warning for warning in report.warnings)
    assert weight_bytes(tmp_path / "out") == weight_bytes(tmp_path / "whole")
    assert left_out in json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
