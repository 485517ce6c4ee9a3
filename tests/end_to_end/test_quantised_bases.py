"""Quantised bases: merged into 16 bits beside what keeps its bytes, into 16 bits alone, and onto their own grid."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import shardmerge
from shardmerge.errors import NonFiniteError, PlanError
from tests.support.builders import run_cli, run_python
from tests.support.peft_oracle import bits, random, stored, write_adapter
from tests.support.quantised_bases import (
    BASES,
    Quantised,
    fp8_block,
    fp8_channel,
    fp8_modelopt,
    fp8_stacked_experts,
    linears,
)
from tests.support.quantised_scene import ALPHA, DOWN, RANK, Q, Scene
from tests.support.tampering import forge_checksums

each = pytest.mark.parametrize("kind", BASES)


def assert_kept(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *modules: str) -> None:
    """Every stored tensor of the base is there with its bytes, but those of ``modules``."""
    for name, tensor in wanted.items():
        if not name.startswith(tuple(f"{module}." for module in modules)):
            assert bits(found[name]) == bits(tensor), name


@each
def test_mixed_keeps_the_bytes_of_all_that_is_not_updated(tmp_path: Path, kind: str) -> None:
    scene = Scene(tmp_path, BASES[kind]())
    found = scene.merge()
    fused = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    assert_kept(found, scene.made.tensors, *fused, DOWN)
    for module in (*fused, DOWN):
        parts = [name for name in found if name.startswith(f"{module}.")]
        assert parts == [f"{module}.weight"] and found[parts[0]].dtype == torch.bfloat16
        wanted = scene.merged(module) if module in scene.factors else scene.made.values[f"{module}.weight"]
        assert bits(found[f"{module}.weight"]) == bits(wanted.bfloat16()), module
    before, after = scene.made.config["quantization_config"], scene.settings()["quantization_config"]
    key = "ignore" if "ignore" in before else "modules_to_not_convert"
    assert after == {**before, key: ["lm_head", *sorted([*fused, DOWN])]}
    assert shardmerge.verify(tmp_path / "out", rows=None).ok


def test_a_new_list_names_what_programs_leave_out_where_there_is_none(tmp_path: Path) -> None:
    """DeepSeek's config.json has no list. transformers then leaves out the head by itself, but not beside a list."""
    made = fp8_block()
    del made.config["quantization_config"]["modules_to_not_convert"]
    scene = Scene(tmp_path, made)
    scene.merge(quantized="mixed")
    listed = scene.settings()["quantization_config"]["modules_to_not_convert"]
    fused = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    assert listed[:2] == ["lm_head", "model.embed_tokens"] and set(listed[2:]) == {*fused, DOWN}


@each
def test_dense_decodes_everything(tmp_path: Path, kind: str) -> None:
    scene = Scene(tmp_path, BASES[kind]())
    found = scene.merge(quantized="dense")
    assert found.keys() == {name for name in scene.made.tensors if name.endswith("weight")}
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    for module in linears():
        wanted = scene.merged(module) if module in scene.factors else scene.made.values[f"{module}.weight"]
        assert bits(found[f"{module}.weight"]) == bits(wanted.bfloat16()), module
    assert "quantization_config" not in scene.settings()
    assert shardmerge.verify(tmp_path / "out", rows=None).ok


@each
def test_same_writes_the_nearest_codes_of_the_bases_own_grid(tmp_path: Path, kind: str) -> None:
    scene = Scene(tmp_path, BASES[kind]())
    found = scene.merge(quantized="same")
    assert found.keys() == scene.made.tensors.keys()
    for name, tensor in scene.made.tensors.items():
        if name.removesuffix(".weight") not in scene.factors:
            assert bits(found[name]) == bits(tensor), name
    for module in scene.factors:
        before, after = scene.made.tensors[f"{module}.weight"], found[f"{module}.weight"]
        assert after.dtype == before.dtype and after.shape == before.shape
        assert not torch.equal(after.view(torch.uint8), before.view(torch.uint8))
        # No other code is nearer: neither neighbour, one step of the bits up or down.
        exact, grid = scene.merged(module).double(), _grid(scene.made, module)
        error = (after.double() * grid - exact).abs()
        for step in (-1, 1):
            other = (after.view(torch.uint8).int() + step).clamp(0, 255).to(torch.uint8).view(torch.float8_e4m3fn)
            further = (other.double() * grid - exact).abs().nan_to_num(nan=torch.inf)
            assert bool((error <= further * (1 + 1e-5)).all())
    assert scene.settings() == scene.made.config
    assert shardmerge.verify(tmp_path / "out", rows=None).ok


def _grid(made: Quantised, module: str) -> Tensor:
    """The scale of every element, from the values: those of the largest codes are exact enough."""
    codes, values = made.tensors[f"{module}.weight"].double(), made.values[f"{module}.weight"].double()
    scale = next(made.tensors[f"{module}.{key}"] for key in SCALES if f"{module}.{key}" in made.tensors).double()
    scale = scale.reshape(1, 1) if scale.ndim < 2 else scale
    high, wide = (-(-size // of) for size, of in zip(codes.shape, scale.shape, strict=True))
    if scale.shape not in ((1, 1), (codes.shape[0], 1)):
        high, wide = made.config["quantization_config"]["weight_block_size"]
    grid = scale.repeat_interleave(high, 0).repeat_interleave(wide, 1)[: codes.shape[0], : codes.shape[1]]
    torch.testing.assert_close(codes * grid, values, rtol=1e-6, atol=0)
    return grid


SCALES = ("weight_scale_inv", "weight_scale", "scale")


@each
def test_an_adapter_of_zeros_changes_no_code(tmp_path: Path, kind: str) -> None:
    scene = Scene(tmp_path, BASES[kind]())
    write_adapter(scene.adapter, {module: (a, b * 0) for module, (a, b) in scene.factors.items()}, ALPHA)
    for name, tensor in scene.merge(quantized="same").items():
        assert bits(tensor) == bits(scene.made.tensors[name]), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("mode", ["mixed", "same"])
def test_the_outputs_dtype_leaves_parts_of_quantised_weights_alone(tmp_path: Path, dtype: str, mode: str) -> None:
    scene = Scene(tmp_path, fp8_block())
    found = scene.merge(dtype=dtype, quantized=mode)
    of_torch = getattr(torch, dtype)
    assert found["model.norm.weight"].dtype == of_torch
    touched = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"] + [DOWN] if mode == "mixed" else []
    for name, tensor in scene.made.tensors.items():
        module = name.rpartition(".")[0]
        if "scale" in name and module not in touched:
            assert bits(found[name]) == bits(tensor), name
    if mode == "mixed":
        assert found[f"{Q}.weight"].dtype == of_torch


def test_a_weight_outside_the_quantised_ones_leaves_them_alone(tmp_path: Path) -> None:
    scene = Scene(tmp_path, fp8_block())
    write_adapter(scene.adapter, {"lm_head": (random(RANK, 96, seed=1), random(64, RANK, seed=2))}, ALPHA)
    found = scene.merge()
    assert_kept(found, scene.made.tensors, "lm_head")
    assert scene.settings() == scene.made.config


def test_experts_of_a_layer_go_together(tmp_path: Path) -> None:
    made = fp8_block()
    experts = [f"model.layers.0.mlp.experts.{number}.{name}" for number in range(3) for name in ("w1", "w2", "w3")]
    for module in experts:
        for key in ("weight", "weight_scale_inv"):
            made.tensors[f"{module}.{key}"] = made.tensors[f"{Q}.{key}"].clone()
    scene = Scene(tmp_path, made)
    a, b = scene.factors[Q]
    write_adapter(scene.adapter, {experts[1]: (a, b)}, ALPHA)
    found = scene.merge()
    assert_kept(found, made.tensors, "model.layers.0.mlp.experts")
    assert all(found[f"{module}.weight"].dtype == torch.bfloat16 for module in experts)
    listed = scene.settings()["quantization_config"]["modules_to_not_convert"]
    assert listed == ["lm_head", "model.layers.0.mlp.experts"]


def test_auto_is_dense_where_programs_lose_experts(tmp_path: Path) -> None:
    made = fp8_channel()
    experts = [
        f"model.layers.0.mlp.experts.{number}.{name}" for number in range(2) for name in ("up_proj", "down_proj")
    ]
    for module in experts:
        for key in ("weight", "weight_scale"):
            made.tensors[f"{module}.{key}"] = made.tensors[f"{Q}.{key}"].clone()
    scene = Scene(tmp_path, made)
    write_adapter(scene.adapter, {experts[0]: scene.factors[Q]}, ALPHA)
    (note,) = (text for text in shardmerge.plan(scene.config()).warnings if "quantised" in text)
    assert "output.quantized is dense: of this format transformers loads experts only if all" in note
    found = scene.merge(quantized="mixed")  # for vLLM
    assert all(found[f"{module}.weight"].dtype == torch.bfloat16 for module in experts)
    assert scene.settings()["quantization_config"]["ignore"] == ["lm_head", *sorted(experts)]


def test_a_scale_that_is_not_a_number_stops_the_merge(tmp_path: Path) -> None:
    made = fp8_block()
    made.tensors[f"{Q}.weight_scale_inv"][1, 0] = torch.nan
    scene = Scene(tmp_path, made)
    with pytest.raises(NonFiniteError, match=r"q_proj\.weight_scale_inv holds nan at \[1, 0\]"):
        scene.merge()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (
            "weight_scale_inv",
            torch.ones(2, 2),
            r"q_proj\.weight is F8_E4M3 \[96, 96\], but .*weight_scale_inv is F32 \[2, 2\]",
        ),
        ("weight_scale_inv", torch.ones(3, 2, dtype=torch.int32), r"weight_scale_inv is I32 \[3, 2\]"),
        (
            "weight_scale",
            torch.ones(3, 2),
            r"weight_scale_inv and .*weight_scale beside it where one scale was expected",
        ),
        ("weight_scale_inv", None, r"q_proj\.weight is stored as F8_E4M3, and has no scale beside it"),
    ],
)
def test_scales_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, key: str, value: Tensor | None, expected: str
) -> None:
    made = fp8_block()
    made.tensors.pop(f"{Q}.{key}", None)
    if value is not None:
        made.tensors[f"{Q}.{key}"] = value
    with pytest.raises(PlanError, match=expected):
        shardmerge.plan(Scene(tmp_path, made).config())


def test_settings_that_reach_all_weights_are_refused_where_a_format_is_unknown(tmp_path: Path) -> None:
    made = fp8_block()
    made.tensors["model.layers.0.mlp.extra.weight"] = torch.ones(4, 4, dtype=torch.int8)
    made.config["quantization_config"]["quant_method"] = "unheard-of"
    made.config["quantization_config"]["weight_block_size"] = [32, 64]
    scene = Scene(tmp_path, made)
    with pytest.raises(PlanError, match=r"output\.dtype: float16 cannot be used with .*: it stores .*extra\.weight"):
        shardmerge.plan(scene.config(dtype="float16"))


def test_modelopts_settings_are_beside_config_json(tmp_path: Path) -> None:
    scene = Scene(tmp_path, fp8_modelopt())
    found = scene.merge("mixed")
    fused = [f"model.layers.0.self_attn.{name}_proj" for name in "kqv"]
    for name, tensor in scene.made.tensors.items():
        if name.endswith("k_scale") or not name.startswith((*fused, DOWN)):
            assert bits(found[name]) == bits(tensor), name
    settings = json.loads((tmp_path / "mixed" / "hf_quant_config.json").read_text())["quantization"]
    assert settings == {
        "quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head", *fused, DOWN],
    }  # fmt: skip
    dense = scene.merge("dense", quantized="dense")
    assert dense.keys() == {name for name in scene.made.tensors if name.endswith("weight")}
    assert not (tmp_path / "dense" / "hf_quant_config.json").exists()
    assert shardmerge.verify(tmp_path / "dense", rows=None).ok and shardmerge.verify(tmp_path / "mixed", rows=None).ok


def test_stacked_experts_with_scales_of_their_last_dimension(tmp_path: Path) -> None:
    scene = Scene(tmp_path, fp8_stacked_experts(), (Q,))
    found = scene.merge(quantized="dense")
    for name in scene.made.values:
        assert bits(found[name]) == bits(scene.merged(name.removesuffix(".weight")).bfloat16()), name
    assert not [name for name in found if "scale" in name]
    assert shardmerge.verify(tmp_path / "out", rows=None).ok


def test_export_decodes_a_checkpoint(tmp_path: Path) -> None:
    scene = Scene(tmp_path, fp8_block())
    done = run_cli("export", scene.base, "-o", tmp_path / "out", "--quantized", "dense")
    assert done.returncode == 0, done.stderr
    found = stored(tmp_path / "out")
    assert found.keys() == {name for name in scene.made.tensors if name.endswith("weight")}
    for name, value in scene.made.values.items():
        assert bits(found[name]) == bits(value.bfloat16()), name


def test_what_is_lost_on_the_bases_grid_is_reported(tmp_path: Path) -> None:
    """The share that is kept is the projection of the codes' change on the update, over the rows that were seen."""
    scene = Scene(tmp_path, fp8_block())
    write_adapter(scene.adapter, {module: (a, b * 0.005) for module, (a, b) in scene.factors.items()}, ALPHA)
    scene.factors = {module: (a, b * 0.005) for module, (a, b) in scene.factors.items()}
    report = shardmerge.merge(scene.config(quantized="same"))
    found = stored(tmp_path / "out")
    for module in scene.factors:
        kind = module.rpartition(".")[2]
        update = scene.merged(module).double() - scene.made.values[f"{module}.weight"].double()
        change = (found[f"{module}.weight"].double() - scene.made.tensors[f"{module}.weight"].double()) * _grid(
            scene.made, module
        )
        kept = float((change * update).sum() / (update * update).sum())
        assert report.fidelity[kind].share_kept == pytest.approx(kept, abs=2e-3)
    assert any("the base's own codes" in text and "output.quantized: mixed" in text for text in report.warnings)


def test_a_plan_says_what_each_mode_takes_and_why_it_was_chosen(tmp_path: Path) -> None:
    scene = Scene(tmp_path, fp8_block())
    (note,) = (text for text in shardmerge.plan(scene.config()).warnings if "quantised" in text)
    assert "14 weights quantised (fp8). output.quantized is mixed: programs that load this format follow" in note
    assert "as same" in note and "(4 become bfloat16)" in note and "as dense" in note
    for mode in ("mixed", "dense", "same"):
        scene.merge(mode, quantized=mode)
    sizes = {
        mode: sum(t.nbytes for name, t in stored(tmp_path / mode).items() if name.rpartition(".")[0] in linears())
        for mode in ("same", "mixed", "dense")
    }
    said = [float(part.split(" MB")[0].split()[-1]) for part in note.split(" as ")[:3]]
    assert said == pytest.approx([size / 1e6 for size in sizes.values()], abs=0.051)


_KILLED = """
import json, os, signal, sys, shardmerge
config, seen = json.loads(sys.argv[1]), 0
def progress(at):
    global seen
    seen += at.shard_number == 2 and at.doing == "merging"
    if seen > 2:
        os.kill(os.getpid(), signal.SIGKILL)
shardmerge.merge(config, progress=progress)
"""


@pytest.mark.parametrize("mode", ["mixed", "dense", "same"])
def test_a_killed_merge_is_resumed_with_the_same_bytes(tmp_path: Path, mode: str) -> None:
    scene = Scene(tmp_path, fp8_block(), (Q, "model.layers.1.self_attn.q_proj", DOWN))
    scene.merge("whole", quantized=mode)
    killed = run_python("-c", _KILLED, json.dumps(scene.config(quantized=mode)))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
    report = shardmerge.merge(scene.config(quantized=mode))
    assert report.shards_reused == 1
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert shardmerge.verify(tmp_path / "out", rows=None).ok


def test_verify_finds_a_flipped_code_and_a_flipped_scale(tmp_path: Path) -> None:
    for number, (mode, name) in enumerate(
        [("same", f"{DOWN}.weight"), ("same", f"{DOWN}.weight_scale_inv"), ("mixed", f"{DOWN}.weight"),
         ("dense", "model.layers.1.mlp.up_proj.weight"), ("mixed", "model.layers.1.mlp.up_proj.weight")]
    ):  # fmt: skip
        scene = Scene(tmp_path / str(number), fp8_block())
        scene.merge(quantized=mode)
        file = tmp_path / str(number) / "out" / "model-00002-of-00002.safetensors"
        content = bytearray(file.read_bytes())
        size = int.from_bytes(content[:8], "little")
        start = json.loads(content[8 : 8 + size])[name]["data_offsets"][0]
        content[8 + size + start + 1] ^= 0x20
        file.write_bytes(content)
        forge_checksums(tmp_path / str(number) / "out")
        assert not shardmerge.verify(tmp_path / str(number) / "out", rows=None).ok, (mode, name)


def test_config_json_goes_on_naming_a_format_that_cannot_be_read(tmp_path: Path) -> None:
    """All that can be read would become dense: then nothing would say how the rest is stored."""
    made = fp8_block()
    for name in [name for name in made.tensors if "_proj." in name and not name.startswith((Q, DOWN))]:
        del made.tensors[name]
    made.tensors["model.layers.0.mlp.extra.weight"] = torch.ones(4, 4, dtype=torch.int8)
    scene = Scene(tmp_path, made)
    with pytest.raises(PlanError, match=r"would no longer say how model\.layers\.0\.mlp\.extra\.weight is stored"):
        shardmerge.plan(scene.config())
    assert shardmerge.plan(scene.config(quantized="same")).totals.updated == 2


def test_only_scales_of_the_cache_are_left_out_and_named(tmp_path: Path) -> None:
    made = fp8_block()
    learned = {
        "model.layers.0.self_attn.q_scale": torch.ones(96),
        "model.layers.0.mlp.output_scale": torch.ones(()),
    }
    of_cache = {f"model.layers.0.self_attn.{name}": torch.ones(()) for name in ("k_scale", "v_proj.output_scale")}
    made.tensors |= {**learned, **of_cache}
    scene = Scene(tmp_path, made)
    notes = shardmerge.plan(scene.config(quantized="dense")).warnings
    assert any("left out, as only a quantised model uses them: 2, such as" in text for text in notes)
    found = scene.merge(quantized="dense")
    assert learned.keys() <= found.keys() and not of_cache.keys() & found.keys()
    assert_kept(scene.merge("mixed"), of_cache)
