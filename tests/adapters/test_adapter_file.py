"""Which of an adapter's files are read, and what is said where that cannot be told."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardmerge
from shardmerge import PlanError
from shardmerge.config.schema import AdapterConfig
from shardmerge.errors import FormatError, SourceError
from shardmerge.file_formats.adapter_file import AdapterFile
from shardmerge.file_formats.adapter_opening import open_adapter
from shardmerge.reporting.inspection import inspect_path
from shardmerge.sources.source import open_source
from tests.support.builders import (
    contents,
    make_place,
    peft_config,
    peft_tensors,
    shard_names,
    write_index,
    write_json,
    write_peft,
    write_pure,
    write_shards,
)


def opened(path: Path) -> AdapterFile:
    return open_adapter(open_source(str(path)))


def test_a_folder(tmp_path: Path) -> None:
    folder = write_peft(tmp_path / "adapter", config=peft_config(base_model_name_or_path="org/base"))
    adapter = opened(folder)
    assert adapter.file.uri == str(folder / "adapter_model.safetensors")
    assert adapter.config == peft_config(base_model_name_or_path="org/base")
    assert adapter.config_file is not None
    assert adapter.config_file.uri == str(folder / "adapter_config.json")
    assert adapter.tensors.keys() == peft_tensors().keys()
    assert adapter.trained_on == "org/base"
    assert adapter.format() == "peft"
    assert adapter.format("pure-pytorch") == "pure-pytorch"


@pytest.mark.parametrize("value", [None, "", 7, ["x"], ...], ids=str)
def test_trained_on_nothing(tmp_path: Path, value: object) -> None:
    assert opened(write_peft(tmp_path, config=peft_config(base_model_name_or_path=value))).trained_on is None


def test_safetensors_win_over_a_pickle(tmp_path: Path) -> None:
    write_peft(tmp_path, pickled=True)
    write_peft(tmp_path, {"other": torch.ones(1)})
    assert opened(tmp_path).tensors.keys() == {"other"}


def test_a_pickle(tmp_path: Path) -> None:
    adapter = opened(write_peft(tmp_path, pickled=True))
    assert adapter.file.uri == str(tmp_path / "adapter_model.bin")
    assert adapter.tensors.keys() == peft_tensors().keys()
    assert all(ref.uri == adapter.file.uri for ref in adapter.tensors.values())
    assert adapter.config is not None


@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
def test_the_usual_file_by_name_brings_its_config(tmp_path: Path, pickled: bool) -> None:
    write_peft(tmp_path, pickled=pickled)
    adapter = opened(tmp_path / ("adapter_model.bin" if pickled else "adapter_model.safetensors"))
    assert adapter.config == peft_config()


def test_another_file_by_name_does_not(tmp_path: Path) -> None:
    """A .pt beside somebody else's adapter_config.json has no config."""
    write_peft(tmp_path)
    adapter = opened(write_pure(tmp_path / "mine.pt"))
    assert (adapter.config, adapter.config_file) == (None, None)
    assert adapter.format() == "pure-pytorch"


@pytest.mark.parametrize("name", ["lora.safetensors", "lora.pt", "lora.pth", "lora.bin"])
def test_sole_candidate_of_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "sub").mkdir()
    write_pure(tmp_path / "sub" / "other.pt")
    if name.endswith(".safetensors"):
        save_file(peft_tensors(), tmp_path / name)
    else:
        write_pure(tmp_path / name)
    assert opened(tmp_path).file.uri == str(tmp_path / name)


def test_trainers_files_are_no_candidates_beside_the_usual_name(tmp_path: Path) -> None:
    write_peft(tmp_path)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (tmp_path / name).write_bytes(b"x")
    assert opened(tmp_path).tensors.keys() == peft_tensors().keys()


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], "it is empty (hidden files are not looked at)"),
        (
            ["a.pt", "b.safetensors"],
            "expected adapter_model.safetensors or adapter_model.bin, or one .safetensors or .pt file; found a.pt, "
            "b.safetensors",
        ),
        (["x.txt"], "it has no file of weights (x.txt)"),
    ],
    ids=["empty folder", "two candidates", "other files"],
)
def test_no_single_candidate(tmp_path: Path, names: list[str], found: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FormatError) as raised:
        opened(tmp_path)
    assert str(raised.value) == f"{tmp_path}: {found}"


@pytest.mark.parametrize(("text", "part"), [("{", "is not JSON"), ("[]", "not a JSON object"), ("\xff", "is not JSON")])
def test_malformed_config(tmp_path: Path, text: str, part: str) -> None:
    write_peft(tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=f"adapter_config.json.*{part}"):
        opened(tmp_path)


def test_no_tensors(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"adapter_model.safetensors: holds no tensors"):
        opened(write_peft(tmp_path, {}))


def test_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file or directory"):
        opened(tmp_path / "gone")


@pytest.mark.parametrize(
    "scale", [{"alpha": 8.0}, {"scaling": 1.0}, {"alpha": 0.0}, {"scaling": 0.0}], ids=lambda scale: str(scale)
)
def test_scale_of_an_adapter_that_has_its_own(tmp_path: Path, scale: dict[str, float]) -> None:
    adapter = opened(write_peft(tmp_path))
    claims = adapter.claims(AdapterConfig.model_validate({"path": "x", **scale}))
    assert claims.refused
    (problem,) = claims.problems
    assert "its own adapter_config.json" in problem
    assert "weight" in problem


def test_scale_of_an_adapter_whose_config_is_not_peft(tmp_path: Path) -> None:
    """With format: pure-pytorch the config beside it is not read, so the scale must be given."""
    write_pure(tmp_path / "adapter_model.bin")
    write_json(tmp_path / "adapter_config.json", {"r": 4})
    claims = opened(tmp_path).claims(AdapterConfig(path="x", format="pure-pytorch", alpha=8.0))
    assert claims.problems == []
    assert {update.scaling for update in claims.updates} == {2.0}


# --- shards -----------------------------------------------------------------------------------------------------------


def write_sharded(
    folder: Path, count: int = 3, index: str | None = "model", changes: Mapping[str, str | None] = MappingProxyType({})
) -> Path:
    """A PEFT adapter in shards. ``changes`` to the index: tensor → file, or None to leave it out."""
    write_peft(folder)
    (folder / "adapter_model.safetensors").unlink()
    write_shards(folder, peft_tensors(), count, stem="adapter_model")
    file = folder / "adapter_model.safetensors.index.json"
    weight_map = {**json.loads(file.read_text())["weight_map"], **changes}
    file.unlink()
    if index is not None:
        write_index(folder, {name: of for name, of in weight_map.items() if of is not None}, index)
    return folder


@pytest.mark.parametrize("index", ["model", "adapter_model", None])
@pytest.mark.parametrize("named", ["", "adapter_model-00002-of-00003.safetensors"], ids=["folder", "one of them"])
def test_shards_are_one_adapter(tmp_path: Path, index: str | None, named: str) -> None:
    folder = write_sharded(tmp_path / "adapter", index=index)
    adapter = opened(folder / named)
    assert adapter.tensors.keys() == peft_tensors().keys()
    assert [file.uri.rpartition("/")[2] for file in adapter.files] == shard_names(3, "adapter_model")
    assert adapter.config == peft_config() and adapter.beside == () and adapter.problems == ()
    assert len({ref.uri for ref in adapter.tensors.values()}) == 3


@pytest.mark.parametrize("index", ["model", "adapter_model", None])
def test_shards_merge_to_the_same_bytes(tmp_path: Path, index: str | None) -> None:
    place = make_place(tmp_path)
    shardmerge.merge(place.config())
    sharded = write_sharded(tmp_path / "sharded", index=index)
    output = tmp_path / "other"
    report = shardmerge.merge(place.config(adapters=[str(sharded)], output={"path": str(output)}))
    assert contents(output) == contents(place.output)
    assert report.adapter_bytes == sum(path.stat().st_size for path in sharded.glob("*.safetensors"))
    assert shardmerge.verify(str(output), rows=None).raise_for_status().complete
    files = json.loads((output / "shardmerge.json").read_text())["adapters"][0]["files"]
    assert len(files) == 4
    assert inspect_path(str(sharded))["files"] == 3


def test_one_shard_of_one(tmp_path: Path) -> None:
    """max_shard_size may leave one file that is called as a shard."""
    write_peft(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model-00001-of-00001.safetensors")
    assert opened(tmp_path).tensors.keys() == peft_tensors().keys()


def test_an_index_of_a_model_beside_them(tmp_path: Path) -> None:
    """The folder is the base's, too; the index is of the base's shards."""
    write_sharded(tmp_path, index=None)
    write_index(tmp_path, {"x": "model-00001-of-00002.safetensors"})
    assert opened(tmp_path).tensors.keys() == peft_tensors().keys()


FIRST = next(iter(peft_tensors()))


def _without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("changes", "then", "said"),
    [
        ({}, _without("adapter_model-00002-of-00003.safetensors"), "of the 3 shards .* missing: 2; the download"),
        ({FIRST: None}, None, f"puts '{FIRST}' into no file, but it is in adapter_model-00001-of-00003"),
        ({"x": "adapter_model-00001-of-00003.safetensors"}, None, "puts 'x' into adapter_model-00001.* not there"),
        ({FIRST: "adapter_model-00002-of-00003.safetensors"}, None, f"puts '{FIRST}' into adapter_model-00002"),
        ({FIRST: "model-00001-of-00003.safetensors"}, None, f"puts '{FIRST}' into model-00001"),
        (
            {},
            lambda folder: save_file(peft_tensors(), folder / "adapter_model-00003-of-00003.safetensors"),
            "stored twice, in adapter_model-00001-of-00003.safetensors and in adapter_model-00003",
        ),
        (
            {},
            lambda folder: save_file({"x": torch.ones(1)}, folder / "adapter_model-00001-of-00002.safetensors"),
            "shards of several adapters, of 2 and of 3 files",
        ),
        ({}, lambda folder: write_json(folder / "model.safetensors.index.json", {"weight_map": 1}), "weight_map"),
    ],
    ids=["one is gone", "not listed", "not there", "elsewhere", "of a model", "twice", "two counts", "no index"],
)
def test_shards_that_are_not_of_one_adapter(
    tmp_path: Path, changes: dict[str, str | None], then: Callable[[Path], object] | None, said: str
) -> None:
    write_sharded(tmp_path, changes=changes)
    if then is not None:
        then(tmp_path)
    with pytest.raises(FormatError, match=said):
        opened(tmp_path)


def test_metadata_of_shards_that_differs(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    file = tmp_path / "adapter_model-00002-of-00003.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "lora_alpha": "8"})
    assert opened(tmp_path).metadata == {"format": "pt", "lora_alpha": "8"}
    file = tmp_path / "adapter_model-00003-of-00003.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", "lora_alpha": "16"})
    with pytest.raises(FormatError, match=r"metadata of its shards differ: 'lora_alpha' is '8', but '16' in .*00003"):
        opened(tmp_path)


def test_one_file_wins_over_shards_which_are_refused(tmp_path: Path) -> None:
    """PEFT loads the one file. What the shards are, nobody says."""
    place = make_place(tmp_path)
    write_shards(place.adapter, peft_tensors(), 2, stem="adapter_model")
    with pytest.raises(PlanError, match=r"adapter_model-00001-of-00002.safetensors is beside the adapter"):
        shardmerge.plan(place.config())
