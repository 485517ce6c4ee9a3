"""What lies beside the weights: which files the output gets, from where, and that they stay the same bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import shardmerge
from shardmerge.spec.plans import MergePlan
from tests.support.builders import (
    AUX_FILES,
    Place,
    llama_tensors,
    make_place,
    model_config,
    shard_names,
    write_base,
    write_json,
    write_peft,
    write_pure,
)


def sources(plan: MergePlan) -> dict[str, str]:
    """The files of the output and the paths that they come from."""
    return {aux.name: aux.source.uri for aux in plan.aux}


def add(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def test_every_file_of_the_base(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    expected = {name: str(place.base / name) for name in (*AUX_FILES, "config.json")}
    plan = shardmerge.plan(place.config())
    assert sources(plan) == expected
    assert [aux.content for aux in plan.aux] == [None] * len(expected)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "pytorch_model\n.bin",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "model.safetensors.index.fp16.json",
        "adapter_model.safetensors",
        "consolidated.safetensors",
        "tf_model.h5",
        "flax_model.msgpack",
        "rust_model.ot",
        "model.gguf",
        "model.onnx",
        "model.onnx_data",
        "training_args.bin",
        "optimizer.pt",
        "rng_state.pth",
        "last.ckpt",
        "model.safetensors.tmp",
        "shardmerge.json",
        ".gitattributes",
        ".cache/huggingface/x.json",
        "checkpoint-500/trainer_state.json",
        "runs/events",
        "wandb/log.txt",
        "onnx/config.json",
        "original/params.json",
    ],
)
def test_left_out(tmp_path: Path, name: str) -> None:
    place = make_place(tmp_path)
    add(place.base, {name: "x"})
    assert sources(shardmerge.plan(place.config())).keys() == {*AUX_FILES, "config.json"}


@pytest.mark.parametrize(
    "name",
    [
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
        "preprocessor_config.json",
        "code/ops.py",
        "assets/deep/logo.png",
        "arrays.npz",
        "model_head.pkl",
    ],
)
def test_taken_along(tmp_path: Path, name: str) -> None:
    place = make_place(tmp_path)
    add(place.base, {name: "x"})
    assert sources(shardmerge.plan(place.config()))[name] == str(place.base / name)


def test_folder_of_another_model_is_left_out_with_a_word(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    add(place.base, {"draft/config.json": "{}", "draft/model.safetensors": "x", "code/ops.py": "x", "onnx/m.onnx": "x"})
    plan = shardmerge.plan(place.config())
    assert sources(plan).keys() == {*AUX_FILES, "config.json", "code/ops.py"}
    assert [warning for warning in plan.warnings if "draft" in warning] == [
        "weights of the base that are not the model's own are not copied: draft/, onnx/"
    ]


def test_links_are_followed(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    (place.base / "LICENSE").rename(place.base / ".blob")
    (place.base / "LICENSE").symlink_to(place.base / ".blob")
    shardmerge.merge(place.config())
    assert (place.output / "LICENSE").read_text() == AUX_FILES["LICENSE"]
    assert not (place.output / "LICENSE").is_symlink()


def test_the_output_has_them_byte_for_byte(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    odd = b'{"torch_dtype":   "float32",\r\n\t"x": 1.0e+2}'
    (place.base / "config.json").write_bytes(odd)
    (place.base / "raw.dat").write_bytes(bytes(range(256)) * 9000)  # above a copy's block
    (place.base / "empty.txt").write_bytes(b"")
    shardmerge.merge(place.config())
    names = {*AUX_FILES, "config.json", "raw.dat", "empty.txt"}
    assert {path.name for path in place.output.iterdir()} == {
        *names,
        *shard_names(2),
        "model.safetensors.index.json",
        "shardmerge.json",
    }
    for name in names:
        assert (place.output / name).read_bytes() == (place.base / name).read_bytes()


# --- a base that is one file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_config", [True, False], ids=["with config.json", "without"])
def test_neighbours_of_a_file_need_a_config(tmp_path: Path, has_config: bool) -> None:
    place = make_place(tmp_path, shards=1)
    if not has_config:
        (place.base / "config.json").unlink()
    plan = shardmerge.plan(place.config(base=str(place.base / "model.safetensors")))
    assert sources(plan).keys() == ({*AUX_FILES, "config.json"} if has_config else set())


def test_config_of_a_file_follows_the_dtype(tmp_path: Path) -> None:
    place = make_place(tmp_path, shards=1)
    assert changed_config(place, base=str(place.base / "model.safetensors"))["torch_dtype"] == "bfloat16"


# --- tokenizer and template -------------------------------------------------------------------------------------------


def test_tokenizer_and_template_of_the_adapter_win(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    own = {
        "tokenizer.json": "own",
        "chat_template.jinja": "own",
        "added_tokens.json": "own",
        "additional_chat_templates/tool.jinja": "own",
    }
    add(place.adapter, {**own, "LICENSE": "own", "README.md": "own", "config.json": "{}", "modeling_y.py": "own"})
    plan = shardmerge.plan(place.config())
    found = sources(plan)
    gone = {"special_tokens_map.json", "tokenizer_config.json"}
    assert found.keys() == {*AUX_FILES, "config.json", *own} - gone
    for name in found:
        assert found[name] == str((place.adapter if name in own else place.base) / name)
    (note,) = (warning for warning in plan.warnings if "the tokenizer is the one of adapter" in warning)
    assert all(name in note for name in gone)
    shardmerge.merge(place.config())
    assert (place.output / "chat_template.jinja").read_text() == "own"
    assert (place.output / "additional_chat_templates" / "tool.jinja").read_text() == "own"
    assert (place.output / "LICENSE").read_text() == AUX_FILES["LICENSE"]


def test_first_adapter_that_has_one_gives_the_tokenizer(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    adapters = [write_peft(tmp_path / name) for name in ("none", "first", "second")]
    add(adapters[1], {"tokenizer.json": "first"})
    add(adapters[2], {"tokenizer.json": "second", "vocab.json": "second"})
    found = sources(shardmerge.plan(place.config(adapters=[str(path) for path in adapters])))
    assert found["tokenizer.json"] == str(adapters[1] / "tokenizer.json")
    assert "vocab.json" not in found


def test_lone_adapter_file_brings_no_tokenizer(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    write_pure(place.adapter / "x.pt")
    add(place.adapter, {"tokenizer.json": "own"})
    config = place.config(adapters=[{"path": str(place.adapter / "x.pt"), "alpha": 8}])
    assert sources(shardmerge.plan(config))["tokenizer.json"] == str(place.base / "tokenizer.json")


VOCABULARY = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}
#: The same, as later versions of tokenizers write it, and with a token that was added.
ADDED = {"added_tokens": [{"id": 3}], "model": {**VOCABULARY["model"], "merges": [["a", "b"]]}, "padding": None}
OTHER = {"model": {**VOCABULARY["model"], "vocab": {"b": 0, "a": 1, "ab": 2}}}


@pytest.mark.parametrize(
    ("own", "is_kept"),
    [(VOCABULARY, True), (ADDED, True), (OTHER, False), ({}, False)],
    ids=["the same bytes", "the same vocabulary", "another vocabulary", "odd"],
)
def test_files_of_the_same_vocabulary_stay(tmp_path: Path, own: dict[str, Any], is_kept: bool) -> None:
    """llama.cpp's converter prefers tokenizer.model, which holds the vocabulary and nothing else."""
    place = make_place(tmp_path)
    add(place.base, {"tokenizer.json": json.dumps(VOCABULARY), "tokenizer.model": "base", "merges.txt": "base"})
    add(place.adapter, {"tokenizer.json": json.dumps(own), "tokenizer_config.json": "{}"})
    plan = shardmerge.plan(place.config())
    assert ("tokenizer.model" in sources(plan)) == ("merges.txt" in sources(plan)) == is_kept
    notes = [warning for warning in plan.warnings if "left out" in warning]
    assert [("tokenizer.model" in note, str(place.adapter) in note) for note in notes] == [(not is_kept, True)]


# --- config.json and the dtype ----------------------------------------------------------------------------------------


def changed_config(place: Place, dtype: str = "bfloat16", **config: Any) -> dict[str, Any]:
    """config.json of the output of a merge to another dtype."""
    shardmerge.merge(place.config(output={"dtype": dtype}, **config))
    value = json.loads((place.output / "config.json").read_text())
    assert isinstance(value, dict)
    return value


NESTED = {
    "ключ": "значение",
    "torch_dtype": "float32",
    "text_config": {"dtype": "float32", "hidden_size": 3, "inner_config": {"torch_dtype": "float16"}},
    "vision_config": {"torch_dtype": "float32", "list": [{"dtype": "float32"}]},
    "quantization_config": {"dtype": "float32", "torch_dtype": "float32"},
    "rope": {"dtype": "float32"},
    "dtype": None,
}


def test_every_dtype_of_the_model_follows(tmp_path: Path) -> None:
    place = make_place(tmp_path, config=NESTED)
    assert changed_config(place) == {
        **NESTED,
        "torch_dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "hidden_size": 3, "inner_config": {"torch_dtype": "bfloat16"}},
        "vision_config": {"torch_dtype": "bfloat16", "list": [{"dtype": "float32"}]},
    }
    text = (place.output / "config.json").read_text()
    assert list(json.loads(text)) == list(NESTED)
    assert "значение" in text
    assert text.endswith("}\n")


@pytest.mark.parametrize("ending", ["", "\n"], ids=["no newline", "newline"])
def test_only_the_dtype_changes(tmp_path: Path, ending: str) -> None:
    place = make_place(tmp_path)
    text = json.dumps(model_config(), indent=2) + ending
    (place.base / "config.json").write_text(text)
    changed_config(place, "float16")
    assert (place.output / "config.json").read_text() == text.replace("float32", "float16")


@pytest.mark.parametrize(
    ("config", "output"),
    [
        (model_config(), {}),
        (model_config(), {"dtype": "same"}),
        (model_config(), {"dtype": "float32"}),
        (model_config(torch_dtype="bfloat16"), {"dtype": "same"}),
        (model_config(torch_dtype=...), {"dtype": "bfloat16"}),
        (model_config(torch_dtype="bfloat16"), {"dtype": "bfloat16"}),
    ],
    ids=["default", "same", "the stored one", "says another", "says none", "says the new one"],
)
def test_config_stays_the_same_bytes(tmp_path: Path, config: dict[str, Any], output: dict[str, str]) -> None:
    place = make_place(tmp_path)
    (place.base / "config.json").write_text(json.dumps(config, separators=(" ,", ": ")))
    shardmerge.merge(place.config(output=output))
    assert (place.output / "config.json").read_bytes() == (place.base / "config.json").read_bytes()


def test_no_config(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    (place.base / "config.json").unlink()
    shardmerge.merge(place.config(output={"dtype": "float16"}))
    assert not (place.output / "config.json").exists()


def test_config_of_a_model_that_is_already_of_the_dtype(tmp_path: Path) -> None:
    """Nothing is converted, so a config that lies about the dtype goes on lying: it is not ours."""
    place = make_place(tmp_path)
    write_base(place.base, llama_tensors(torch.bfloat16))
    write_json(place.base / "config.json", model_config(torch_dtype="float32"))
    assert changed_config(place)["torch_dtype"] == "float32"
