"""Bases that MLX has quantised: merged into 16 bits, beside what keeps its bytes, and onto their own grid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import shardmerge
from shardmerge.errors import FormatError, NonFiniteError, PlanError
from tests.support.peft_oracle import bits, least_memory, random, stored, write_adapter
from tests.support.quantised_mlx import MLX_BASES, mlx_base
from tests.support.quantised_scene import ALPHA, DOWN, RANK, Q, Scene, assert_nearest_codes, assert_values_stay

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
FILE = "adapter_model.safetensors"


def each(*quick: str) -> pytest.MarkDecorator:
    """All bases, of which some are tested always, and the others with the slow tests."""
    kinds = [pytest.param(kind, marks=() if kind in quick else pytest.mark.slow) for kind in MLX_BASES]
    return pytest.mark.parametrize("kind", kinds)


def parts(scene: Scene, module: str) -> set[str]:
    return {name for name in scene.made.tensors if name.startswith(f"{module}.")}


@each("affine-4", "mxfp8")
def test_mixed_keeps_the_bytes_of_all_that_is_not_updated(tmp_path: Path, kind: str) -> None:
    scene = Scene(tmp_path, MLX_BASES[kind]())
    found = scene.merge()
    for name, tensor in scene.made.tensors.items():
        if name not in parts(scene, Q) | parts(scene, DOWN):
            assert bits(found[name]) == bits(tensor), name
    for module in (Q, DOWN):
        assert [name for name in found if name.startswith(f"{module}.")] == [f"{module}.weight"]
        assert bits(found[f"{module}.weight"]) == bits(scene.merged(module).bfloat16()), module
    before, after = scene.made.config, scene.settings()
    for key in ("quantization", "quantization_config"):
        assert after.pop(key) == {**before[key], Q: False, DOWN: False}
        del before[key]
    assert after == before
    assert shardmerge.verify(tmp_path / "out", rows=None).ok


@each("affine-3", "nvfp4")
def test_dense_decodes_everything(tmp_path: Path, kind: str) -> None:
    scene = Scene(tmp_path, MLX_BASES[kind]())
    found = scene.merge(quantized="dense")
    assert found.keys() == {name for name in scene.made.tensors if name.endswith(".weight")}
    for name, value in scene.made.values.items():
        module = name.removesuffix(".weight")
        wanted = scene.merged(module) if module in scene.factors else value
        assert bits(found[name]) == bits(wanted.bfloat16()), name
    assert not {"quantization", "quantization_config"} & scene.settings().keys()
    assert shardmerge.verify(tmp_path / "out", rows=None).ok


@each("affine-4", "affine-6-f16", "mxfp4")
def test_same_writes_the_nearest_codes_of_the_bases_own_grid(tmp_path: Path, kind: str) -> None:
    made = MLX_BASES[kind]()
    scene = Scene(tmp_path, made)
    found = scene.merge(quantized="same")
    assert_nearest_codes(scene, made, found)


@each("affine-8-f32")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_an_adapter_of_zeros_changes_no_code(tmp_path: Path, kind: str, rounding: str) -> None:
    made = MLX_BASES[kind]()
    scene = Scene(tmp_path, made)
    write_adapter(scene.adapter, {module: (a, b * 0) for module, (a, b) in scene.factors.items()}, ALPHA)
    found = scene.merge(quantized="same", rounding=rounding)
    assert_values_stay(scene, made, found)
    if kind.startswith("affine"):  # in which zero has no sign
        assert all(bits(found[name]) == bits(tensor) for name, tensor in made.tensors.items())


@each("affine-4")
def test_stochastic_rounding_keeps_a_small_update_on_average(tmp_path: Path, kind: str) -> None:
    made = MLX_BASES[kind]()
    scene = Scene(tmp_path, made)
    small = {module: (a, b * 0.02) for module, (a, b) in scene.factors.items()}
    write_adapter(scene.adapter, small, ALPHA)
    a, b = small[Q]
    update, total = (b @ a).double() * (ALPHA / RANK), 0.0
    for seed in range(4):
        found = scene.merge(f"out-{seed}", quantized="same", rounding="stochastic", seed=seed)
        moved = (made.stored(Q, found) - made.values[f"{Q}.weight"]).double()
        total += float((moved * update).sum() / (update * update).sum()) / 4
    assert shardmerge.verify(tmp_path / "out-0", rows=None).ok
    assert total == pytest.approx(1.0, abs=0.5)


@each("affine-3")
def test_the_same_bytes_in_little_memory(tmp_path: Path, kind: str) -> None:
    scene = Scene(tmp_path, MLX_BASES[kind]())
    for mode in ("dense", "same"):
        wanted = scene.merge(mode, quantized=mode)
        little = scene.config(f"little-{mode}", quantized=mode)
        little["compute"] = {"max_memory": least_memory(scene.config("x", quantized=mode))}
        shardmerge.merge(little)
        for name, tensor in stored(tmp_path / f"little-{mode}").items():
            assert bits(tensor) == bits(wanted[name]), name


def test_modules_may_have_settings_of_their_own(tmp_path: Path) -> None:
    of_modules = {DOWN: {"bits": 8, "group_size": 32}, "model.layers.1.mlp.up_proj": False, Q: True}
    scene = Scene(tmp_path, mlx_base(of_modules={**of_modules, Q: {"group_size": 32, "bits": 4}}))
    for mode in ("mixed", "dense"):
        found = scene.merge(mode, quantized=mode)
        for module in (Q, DOWN):
            assert bits(found[f"{module}.weight"]) == bits(scene.merged(module).bfloat16()), module
        assert shardmerge.verify(tmp_path / mode, rows=None).ok
    said = scene.settings("mixed")["quantization"]
    assert (said[DOWN], said["model.layers.1.mlp.up_proj"], said[Q]) == (False, False, False)
    found = scene.merge("same", quantized="same")
    assert found[f"{DOWN}.weight"].shape == (96, 40) and scene.settings("same") == scene.made.config
    assert shardmerge.verify(tmp_path / "same", rows=None).ok


# --- embeddings, which MLX quantises, too -----------------------------------------------------------------------------


def rewrite(scene: Scene, tensors: dict[str, torch.Tensor], **settings: object) -> None:
    """Another adapter in the place of the scene's."""
    config = json.loads((scene.adapter / "adapter_config.json").read_text())
    config |= {"target_modules": [HEAD], "r": RANK, "lora_alpha": ALPHA, **settings}
    (scene.adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"base_model.model.{name}": part for name, part in tensors.items()}, scene.adapter / FILE)


def lora_of_the_head() -> dict[str, torch.Tensor]:
    a, b = random(RANK, 96, seed=3), random(64, RANK, seed=4)
    return {f"{HEAD}.lora_A.weight": a, f"{HEAD}.lora_B.weight": b}


def test_a_quantised_head_is_updated(tmp_path: Path) -> None:
    scene = Scene(tmp_path, mlx_base())
    rewrite(scene, lora_of_the_head())
    found = scene.merge()
    a, b = lora_of_the_head().values()
    wanted = scene.made.values[f"{HEAD}.weight"] + (b @ a) * (ALPHA / RANK)
    assert bits(found[f"{HEAD}.weight"]) == bits(wanted.bfloat16())
    assert scene.settings()["quantization"][HEAD] is False
    assert bits(found[f"{EMBEDDING}.weight"]) == bits(scene.made.tensors[f"{EMBEDDING}.weight"])


@pytest.mark.parametrize("mode", ["mixed", "dense", "same"])
def test_a_tied_head_is_one_with_the_embedding_or_refused(tmp_path: Path, mode: str) -> None:
    scene = Scene(tmp_path, mlx_base(tie_word_embeddings=True))
    rewrite(scene, lora_of_the_head())
    with pytest.raises(
        PlanError, match=r"embed_tokens\.weight is stored as mlx-affine, of which lm_head\.weight cannot"
    ):
        shardmerge.plan(scene.config(quantized=mode))
    config = scene.config(quantized=mode) | {"tied": "peft"}
    shardmerge.merge(config)
    found = stored(tmp_path / "out")
    assert not any(name.startswith(HEAD) for name in found)
    if mode != "same":
        a, b = lora_of_the_head().values()
        wanted = scene.made.values[f"{EMBEDDING}.weight"] + (b @ a) * (ALPHA / RANK)
        assert bits(found[f"{EMBEDDING}.weight"]) == bits(wanted.bfloat16())
    assert shardmerge.verify(tmp_path / "out", rows=None).ok


def test_a_vocabulary_that_grows_is_refused_by_name(tmp_path: Path) -> None:
    scene = Scene(tmp_path, mlx_base())
    whole = {f"{EMBEDDING}.weight": random(70, 96, seed=3), f"{HEAD}.weight": random(70, 96, seed=5)}
    rewrite(scene, whole, modules_to_save=["embed_tokens", "lm_head"], target_modules=["q_proj"])
    with pytest.raises(
        PlanError, match=r"it is stored as mlx-affine, which cannot be resized: merge into a dense copy"
    ):
        shardmerge.plan(scene.config())


@pytest.mark.parametrize(
    ("part", "value", "error", "expected"),
    [
        ("scales", torch.nan, NonFiniteError, r"q_proj\.scales holds nan at \[40, 1\]"),
        ("biases", torch.inf, NonFiniteError, r"q_proj\.biases holds inf at \[40, 1\]"),
        ("scales", 0.0, FormatError, r"q_proj\.scales holds 0 at \[40, 1\], so no code can hold an updated value"),
    ],
)
def test_a_part_that_makes_no_sense_stops_the_merge(
    tmp_path: Path, part: str, value: float, error: type[Exception], expected: str
) -> None:
    made = mlx_base()
    made.tensors[f"{Q}.{part}"][40, 1] = value
    with pytest.raises(error, match=expected):
        Scene(tmp_path, made).merge(quantized="same")
    assert not list((tmp_path / "out").glob("*.safetensors"))
