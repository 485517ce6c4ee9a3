"""Models that ComfyUI stores in FP8: merged in every mode; other formats of it are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import shardmerge
from shardmerge.errors import PlanError
from tests.support.comfy_bases import FP8, SHAPES, TO_Q, UP, OneFile, as_bytes, comfy
from tests.support.peft_oracle import bits
from tests.support.quantised_scene import Scene

each = pytest.mark.parametrize("kind", ["tensors", "metadata", "old"])


def merged(tmp_path: Path, kind: str, mode: str) -> tuple[Scene, dict[str, Tensor], Any]:
    """The scene, the output, and what its metadata says of formats."""
    scene = Scene(tmp_path, comfy(kind), (TO_Q, UP))
    shardmerge.merge(scene.config(quantized=mode))
    assert shardmerge.verify(tmp_path / "out", rows=None).ok
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return scene, found, json.loads((file.metadata() or {}).get("_quantization_metadata", "null"))


@each
def test_dense_has_no_word_of_fp8(tmp_path: Path, kind: str) -> None:
    scene, found, said = merged(tmp_path, kind, "dense")
    assert found.keys() == {*scene.made.values, "diffusion_model.norm.weight"} and said is None
    for module in SHAPES:
        wanted = scene.merged(module) if module in scene.factors else scene.made.values[f"{module}.weight"]
        assert bits(found[f"{module}.weight"]) == bits(wanted.bfloat16()), module


@each
def test_mixed_leaves_what_is_said_of_other_weights(tmp_path: Path, kind: str) -> None:
    scene, found, said = merged(tmp_path, kind, "mixed")
    gone = {name for name in scene.made.tensors if name.startswith((f"{TO_Q}.", f"{UP}."))}
    for name in scene.made.tensors.keys() - gone:
        assert bits(found[name]) == bits(scene.made.tensors[name]), name
    assert found.keys() == scene.made.tensors.keys() - gone | {f"{TO_Q}.weight", f"{UP}.weight"}
    for module in (TO_Q, UP):
        assert bits(found[f"{module}.weight"]) == bits(scene.merged(module).bfloat16()), module
    if kind == "metadata":
        assert said == {"format_version": "1.0", "layers": {"diffusion_model.blocks.0.attn.to_v": FP8}}


@each
def test_same_changes_codes_only(tmp_path: Path, kind: str) -> None:
    scene, found, said = merged(tmp_path, kind, "same")
    assert isinstance(scene.made, OneFile)
    assert said == json.loads(scene.made.metadata.get("_quantization_metadata", "null"))
    assert found.keys() == scene.made.tensors.keys()
    for name, tensor in scene.made.tensors.items():
        assert (bits(found[name]) == bits(tensor)) != (name in (f"{TO_Q}.weight", f"{UP}.weight")), name


def refused(tmp_path: Path, made: OneFile) -> str:
    scene = Scene(tmp_path, made, (TO_Q, UP))
    with pytest.raises(PlanError) as error:
        shardmerge.plan(scene.config(quantized="dense"))
    return str(error.value)


@pytest.mark.parametrize("kind", ["tensors", "metadata"])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"format": "nvfp4"}, "stored by ComfyUI as nvfp4, which cannot be read"),
        ({"format": "mxfp8"}, "stored by ComfyUI as mxfp8, which"),
        ({"format": "convrot_w4a4", "convrot_groupsize": 256}, "stored by ComfyUI as convrot_w4a4 with convrot, which"),
        ({**FP8, "convrot": True}, "stored by ComfyUI as float8_e4m3fn with convrot, which"),
        ({}, "stored by ComfyUI as None, which"),
        ("float8_e5m2", "stored by ComfyUI as float8_e5m2, which"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path: Path, kind: str, settings: Any, expected: str) -> None:
    if kind == "tensors" and not isinstance(settings, dict):
        expected = "to_q.comfy_quant is not a JSON object"
    text = refused(tmp_path, comfy(kind, {TO_Q: settings}))
    assert "attn.to_q" in text and expected in text


def test_the_first_of_many_is_named(tmp_path: Path) -> None:
    text = refused(tmp_path, comfy("tensors", {module: {"format": "nvfp4"} for module in SHAPES}))
    assert "blocks.0.attn.to_q.weight and 2 more weights: stored by ComfyUI as nvfp4" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (torch.zeros(9, dtype=torch.uint8), "to_q.comfy_quant "),
        (as_bytes([1]), "to_q.comfy_quant is not a JSON object"),
        (torch.zeros(5000, dtype=torch.uint8), "to_q.comfy_quant is U8 [5000]; expected are 4,096 U8 at most"),
        (torch.zeros(3), "to_q.comfy_quant is F32 [3]"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(tmp_path: Path, content: Tensor, expected: str) -> None:
    made = comfy("tensors")
    made.tensors[f"{TO_Q}.comfy_quant"] = content
    assert expected in refused(tmp_path, made)


@pytest.mark.parametrize("text", ["[]", "{", '{"layers": []}'])
def test_metadata_that_makes_no_sense_is_refused_by_name(tmp_path: Path, text: str) -> None:
    made = comfy("metadata")
    made.metadata["_quantization_metadata"] = text
    assert "_quantization_metadata" in refused(tmp_path, made)


def test_exponents_are_not_guessed(tmp_path: Path) -> None:
    """ComfyUI's mxfp8 has scales in tiles, which no shape shows."""
    made = comfy("tensors")
    for module, (rows, columns) in SHAPES.items():
        made.tensors[f"{module}.weight_scale"] = torch.full((rows, columns // 32), 120, dtype=torch.uint8)
        del made.tensors[f"{module}.comfy_quant"]
    assert "to_q" in refused(tmp_path, made)
