"""Weights and adapters beside the model's own: copied or named, and the output loads with what the base loads with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shardmerge
from shardmerge.spec.plans import MergePlan
from shardmerge.verification.verifier import verify_output
from tests.support.builders import (
    AUX_FILES,
    Place,
    llama_tensors,
    make_place,
    peft_config,
    random_tensor,
    shard_names,
    write_json,
    write_peft,
    write_shards,
)

MTP = {"mtp.layers.0.weight": torch.ones(3, 3)}
OTHER_NAMES = {"other.weight": torch.ones(2, 2)}


def weights(folder: Path, files: Mapping[str, Mapping[str, torch.Tensor] | bytes | str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Mapping):
            save_file(dict(content), folder / name)
        else:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def names(plan: MergePlan) -> set[str]:
    return {aux.name for aux in plan.aux} - {*AUX_FILES, "config.json"}


def notes(plan: MergePlan, part: str) -> list[str]:
    return [warning for warning in plan.warnings if part in warning]


# --- files in the top folder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["mtp.safetensors", "model-mtp.safetensors", "mm_projector.bin", "model_head.pkl", "s.pt"]
)
def test_weights_of_its_own_are_copied_byte_for_byte(tmp_path: Path, name: str) -> None:
    place = make_place(tmp_path)
    weights(place.base, {name: MTP if name.endswith(".safetensors") else bytes(range(256)) * 9000})
    plan = shardmerge.plan(place.config())
    assert names(plan) == {name}
    assert len(notes(plan, f"copied as they are: {name}")) == 1
    shardmerge.merge(place.config())
    assert (place.output / name).read_bytes() == (place.base / name).read_bytes()
    record = json.loads((place.output / "shardmerge.json").read_text())
    assert record["other_files"][name]["bytes"] == (place.base / name).stat().st_size
    assert verify_output(place.output).complete
    data = bytearray((place.output / name).read_bytes())
    data[-1] ^= 1
    (place.output / name).write_bytes(data)
    with pytest.raises(shardmerge.VerifyError, match=f"{name} was changed after the merge"):
        shardmerge.verify(place.output).raise_for_status()


COPIES: dict[str, Mapping[str, torch.Tensor] | str] = {
    "pytorch_model.bin": "x",
    "pytorch_model-00001-of-00002.bin": "x",
    "tf_model.h5": "x",
    "flax_model.msgpack": "x",
    "model.gguf": "x",
    "model.onnx": "x",
    "last.ckpt": "x",
    "consolidated.safetensors": OTHER_NAMES,
    "open_clip_model.safetensors": OTHER_NAMES,
    "model.fp16.safetensors": {"lm_head.weight": torch.ones(1)},
    "ema.safetensors": {**MTP, "lm_head.weight": torch.ones(1)},
    "model-00001-of-00009.safetensors": {"lm_head.weight": torch.ones(1)},
    "onnx/decoder.onnx": "x",
    "original/consolidated.00.pth": "x",
    "checkpoint-10/model.safetensors": "x",
}


@pytest.mark.parametrize("name", COPIES)
def test_other_copies_of_the_model_are_named(tmp_path: Path, name: str) -> None:
    place = make_place(tmp_path)
    weights(place.base, {name: COPIES[name]})
    plan = shardmerge.plan(place.config())
    assert not names(plan)
    shown = name.rpartition("/")[0] + "/" if "/" in name else name
    assert notes(plan, "not copied") == [f"weights of the base that are not the model's own are not copied: {shown}"]


def test_a_pointer_beside_the_model_is_named_as_one(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    weights(place.base, {"mtp.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:00\n"})
    plan = shardmerge.plan(place.config())
    assert not names(plan)
    (note,) = notes(plan, "not copied")
    assert "mtp.safetensors (cannot be read" in note
    assert "Git LFS pointer" in note


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state_0.pth", "scheduler.pt", "training_args.bin", "x.pt.tmp"])
def test_state_of_training_is_not_worth_a_note(tmp_path: Path, name: str) -> None:
    place = make_place(tmp_path)
    weights(place.base, {name: "x"})
    plan = shardmerge.plan(place.config())
    assert not names(plan)
    assert not plan.warnings


def test_shards_beside_the_model_bring_their_index(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    write_shards(place.base, {"mtp.a": torch.ones(1), "mtp.b": torch.ones(1)}, stem="mtp")
    plan = shardmerge.plan(place.config())
    assert names(plan) == {*shard_names(2, "mtp"), "mtp.safetensors.index.json"}
    shardmerge.merge(place.config())
    assert verify_output(place.output).complete


def test_neighbours_of_a_base_that_is_one_file(tmp_path: Path) -> None:
    place = make_place(tmp_path, shards=1)
    weights(place.base, {"mtp.safetensors": MTP, "ema.safetensors": llama_tensors()})
    plan = shardmerge.plan(place.config(base=str(place.base / "model.safetensors")))
    assert names(plan) == {"mtp.safetensors"}
    assert notes(plan, "not copied: ema.safetensors")


def test_a_gguf_file_has_no_room_for_other_weights(tmp_path: Path) -> None:
    from shardmerge.file_formats.checkpoint import open_checkpoint
    from shardmerge.planning.aux_files import collect
    from shardmerge.sources.source import open_source

    place = make_place(tmp_path)
    weights(place.base, {"mtp.safetensors": MTP})
    found = collect(open_checkpoint(open_source(str(place.base))), [], {}, copies_weights=False)
    assert found.warnings == ["weights of the base that are not the model's own are not copied: mtp.safetensors"]


# --- an adapter beside the base ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights_name", ["adapter_model.safetensors", "adapter_model.bin", None])
def test_an_adapter_beside_the_base_stays_behind(tmp_path: Path, weights_name: str | None) -> None:
    """transformers takes a folder with adapter_config.json for an adapter, and loads what that names."""
    place = make_place(tmp_path)
    write_json(place.base / "adapter_config.json", peft_config(base_model_name_or_path="org/before"))
    if weights_name:
        weights(place.base, {weights_name: MTP if weights_name.endswith("safetensors") else "x"})
    plan = shardmerge.plan(place.config())
    assert not names(plan)
    (note,) = notes(plan, "holds an adapter, too")
    assert "adapter_config.json" in note
    shardmerge.merge(place.config())
    assert not (place.output / "adapter_config.json").exists()


def test_verify_reports_an_adapter_in_the_output(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    shardmerge.merge(place.config())
    write_json(place.output / "adapter_config.json", peft_config())
    with pytest.raises(shardmerge.VerifyError, match=r"adapter_config\.json is not a file of this merge"):
        shardmerge.verify(place.output).raise_for_status()


def test_verify_reports_a_template_in_the_output(tmp_path: Path) -> None:
    place = make_place(tmp_path, aux={})
    shardmerge.merge(place.config())
    (place.output / "chat_template.jinja").write_text("x")
    assert [of.text for of in verify_output(place.output).problems if of.text.startswith("chat_template.jinja is not")]


def test_transformers_loads_the_output_of_such_a_base(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    config.num_key_value_heads = 2
    place = Place(tmp_path)
    LlamaForCausalLM(config).save_pretrained(place.base)
    write_peft(place.adapter)
    write_peft(place.base, config=peft_config(base_model_name_or_path="org/is-not-there"))
    shardmerge.merge(place.config())
    _, info = AutoModelForCausalLM.from_pretrained(place.output, output_loading_info=True)
    assert not any(info.values())


# --- folders ----------------------------------------------------------------------------------------------------------

MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    {"idx": 3, "name": "3", "path": "gone", "type": "x"},
    {"idx": 4, "name": "4", "path": "../outside", "type": "x"},
    {"idx": 5, "name": "5", "path": "/etc", "type": "x"},
    {"idx": 6, "name": "6", "path": 7, "type": "x"},
    "odd",
]
MANIFESTS = {
    "modules.json": MODULES,
    "model_index.json": {
        "_class_name": "X",
        "_y": ["a", "b", "c"],
        "1_Pooling": ["x", "Y"],
        "2_Dense": ["x", "Z"],
        "scheduler": [None, None],
        "../outside": ["x", "Y"],
    },
    "router_config.json": {"types": {"1_Pooling": "x", "2_Dense": "y", "../outside": "z"}},
}


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_folders_that_a_model_is_made_of_are_copied_whole(tmp_path: Path, manifest: str) -> None:
    place = make_place(tmp_path, shards=1)
    write_json(place.base / manifest, MANIFESTS[manifest])
    needed: dict[str, Mapping[str, torch.Tensor] | bytes | str] = {
        "1_Pooling/config.json": "{}",
        "2_Dense/config.json": "{}",
        "2_Dense/model.safetensors": {"linear.weight": random_tensor((900, 400), 1)},
        "2_Dense/pytorch_model.bin": b"x" * 3_000_000,
        "2_Dense/onnx/model.onnx": "x",
    }
    weights(place.base, needed)
    weights(place.base, {"draft/model.safetensors": MTP, "draft/config.json": "{}"})
    weights(tmp_path, {"outside/secret.json": "{}"})
    plan = shardmerge.plan(place.config())
    assert names(plan) == {*needed, manifest}
    assert notes(plan, "not copied: draft/")
    shardmerge.merge(place.config())
    for name in needed:
        assert (place.output / name).read_bytes() == (place.base / name).read_bytes()
    assert verify_output(place.output).complete


def test_a_manifest_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    weights(place.base, {"modules.json": "version https://git-lfs.github.com/spec/v1\n"})
    with pytest.raises(shardmerge.FormatError, match=r"modules\.json: it is a Git LFS pointer.*Nothing was written"):
        shardmerge.plan(place.config())


# --- what the index says of the number of parameters ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "difference"),
    [
        ({}, 0),
        ({"base_model.model.lm_head.weight": (70, 32), "base_model.model.model.embed_tokens.weight": (70, 32)}, 384),
    ],
    ids=["as many", "a grown vocabulary"],
)
@pytest.mark.parametrize("limit", ["same", "20KB"])
def test_total_parameters_follow(
    tmp_path: Path, tensors: Mapping[str, tuple[int, ...]], difference: int, limit: str
) -> None:
    place = make_place(tmp_path, config={"model_type": "llama", "vocab_size": 64, "tie_word_embeddings": False})
    index = place.base / "model.safetensors.index.json"
    # transformers counts parameters, of which a model may store fewer or more.
    write_json(index, {**json.loads(index.read_text()), "metadata": {"total_size": 1, "total_parameters": 1000}})
    if tensors:
        saved = {name: random_tensor(shape, 1) for name, shape in tensors.items()}
        write_peft(place.adapter, saved, config=peft_config(modules_to_save=["lm_head", "embed_tokens"]))
    shardmerge.merge(place.config(output={"max_shard_size": limit}))
    metadata = json.loads((place.output / "model.safetensors.index.json").read_text())["metadata"]
    before = sum(tensor.nbytes for tensor in llama_tensors().values())
    assert metadata == {"total_size": before + 4 * difference, "total_parameters": 1000 + difference}


def test_no_number_of_parameters_where_the_base_has_none(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    shardmerge.merge(place.config())
    index = json.loads((place.output / "model.safetensors.index.json").read_text())
    assert index["metadata"].keys() == {"total_size"}
