"""Bases of integers and FP4: merged into 16 bits, beside what keeps its bytes, and onto their own grid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import shardmerge
from shardmerge.errors import FormatError, NonFiniteError, PlanError
from tests.support.pack_bases import PACK_BASES, Packed
from tests.support.peft_oracle import bits, least_memory, stored, write_adapter
from tests.support.quantised_bases import linears
from tests.support.quantised_scene import ALPHA, DOWN, Q, Scene, assert_nearest_codes, assert_values_stay


def each(*quick: str) -> pytest.MarkDecorator:
    """All bases, of which some are tested always, and the others with the slow tests."""
    kinds = [pytest.param(kind, marks=() if kind in quick else pytest.mark.slow) for kind in PACK_BASES]
    return pytest.mark.parametrize("kind", kinds)


FUSED = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]


@each("int4-group-asymmetric", "nvfp4")
def test_mixed_keeps_the_bytes_of_all_that_is_not_updated(tmp_path: Path, kind: str) -> None:
    scene = Scene(tmp_path, PACK_BASES[kind]())
    found = scene.merge(quantized="mixed")
    for name, tensor in scene.made.tensors.items():
        if not name.startswith((*(f"{module}." for module in FUSED), f"{DOWN}.")):
            assert bits(found[name]) == bits(tensor), name
    for module in (*FUSED, DOWN):
        assert [name for name in found if name.startswith(f"{module}.")] == [f"{module}.weight"]
        assert bits(found[f"{module}.weight"]) == bits(scene.merged(module).bfloat16()), module
    assert shardmerge.verify(tmp_path / "out", rows=None).ok


@each("int4-act-order", "int8-channel", "fp4-deepseek")
def test_dense_decodes_everything(tmp_path: Path, kind: str) -> None:
    scene = Scene(tmp_path, PACK_BASES[kind]())
    found = scene.merge(quantized="dense")
    modules = linears()
    plain = {name for name in scene.made.tensors if name.rpartition(".")[0] not in modules}
    assert found.keys() == {*plain, *(f"{module}.weight" for module in modules)}
    for module in modules:
        assert bits(found[f"{module}.weight"]) == bits(scene.merged(module).bfloat16()), module
    assert "quantization_config" not in scene.settings()
    assert shardmerge.verify(tmp_path / "out", rows=None).ok


@each("int4-group", "mxfp4")
def test_same_writes_the_nearest_codes_of_the_bases_own_grid(tmp_path: Path, kind: str) -> None:
    made = PACK_BASES[kind]()
    scene = Scene(tmp_path, made)
    scene.factors = {module: (a, b * 0.2) for module, (a, b) in scene.factors.items()}
    write_adapter(scene.adapter, scene.factors, ALPHA)
    found = scene.merge(quantized="same")
    assert_nearest_codes(scene, made, found)


@each("nvfp4-modelopt")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_an_adapter_of_zeros_changes_no_code(tmp_path: Path, kind: str, rounding: str) -> None:
    made = PACK_BASES[kind]()
    scene = Scene(tmp_path, made)
    write_adapter(scene.adapter, {module: (a, b * 0) for module, (a, b) in scene.factors.items()}, ALPHA)
    found = scene.merge(quantized="same", rounding=rounding)
    assert_values_stay(scene, made, found)


@each("mxfp8-modelopt")
def test_stochastic_rounding_keeps_a_small_update_on_average(tmp_path: Path, kind: str) -> None:
    made = PACK_BASES[kind]()
    scene = Scene(tmp_path, made)
    small = {module: (a, b * 0.02) for module, (a, b) in scene.factors.items()}
    write_adapter(scene.adapter, small, ALPHA)
    a, b = small[Q]
    update = (b @ a).double() * (ALPHA / len(a))
    kept = reported = 0.0
    for seed in range(4):
        output = {"quantized": "same", "rounding": "stochastic", "seed": seed}
        seen = shardmerge.merge(scene.config(f"out-{seed}", **output)).fidelity["q_proj"]
        moved = (made.stored(Q, stored(tmp_path / f"out-{seed}")) - made.values[f"{Q}.weight"]).double()
        kept += float((moved * update).sum() / (update * update).sum()) / 4
        reported += seen.kept / seen.update / 4
    assert shardmerge.verify(tmp_path / "out-0", rows=None).ok
    assert kept == pytest.approx(1.0, abs=0.5) and kept == pytest.approx(reported, abs=1e-3)


# --- what stops ------------------------------------------------------------------------------------------------------


def spoiled(made: Packed, part: str, at: tuple[int, ...], value: float, module: str = Q) -> Packed:
    """The base with another number in a part of a module."""
    made.tensors[f"{module}.{part}"][at] = value
    return made


@pytest.mark.parametrize(
    ("kind", "part", "at", "value", "expected"),
    [
        ("int4-group", "weight_scale", (40, 1), torch.nan, r"q_proj\.weight_scale holds nan at \[40, 1\]"),
        ("mxfp4", "weight_scale", (40, 1), 255, r"q_proj\.weight_scale holds nan at \[40, 1\]"),
        ("nvfp4", "weight_global_scale", (0,), 0.0, r"q_proj\.weight_global_scale makes scales infinite"),
        ("int4-act-order", "weight_g_idx", (7,), 3, r"q_proj\.weight_g_idx holds 3 at \[7\], and there are 3 groups"),
        ("int4-act-order", "weight_g_idx", (7,), -5, r"q_proj\.weight_g_idx holds -5 at \[7\]"),
        ("mxfp8-mxfp8", "weight_scale_inv", (40, 1), 255, r"q_proj\.weight_scale_inv holds nan at \[40, 1\]"),
    ],
)
def test_a_part_that_makes_no_sense_stops_the_merge(
    tmp_path: Path, kind: str, part: str, at: tuple[int, ...], value: float, expected: str
) -> None:
    scene = Scene(tmp_path, spoiled(PACK_BASES[kind](), part, at, value))
    with pytest.raises((FormatError, NonFiniteError), match=expected):
        scene.merge(quantized="dense")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_columns_that_are_not_in_as_many_as_a_group_has_stop_the_merge(tmp_path: Path) -> None:
    made = PACK_BASES["int4-act-order"]()
    order = made.tensors[f"{Q}.weight_g_idx"]
    order[int((order == 0).nonzero()[0])] = 1
    with pytest.raises(FormatError, match=r"weight_g_idx does not put as many columns into each of 3 groups"):
        Scene(tmp_path, made).merge(quantized="dense")


def test_an_order_of_minus_one_is_none(tmp_path: Path) -> None:
    """compressed-tensors' own mark of columns that are in order."""
    made = PACK_BASES["int4-group"]()
    for module in linears():
        columns = made.shape(module)[1]
        made.tensors[f"{module}.weight_g_idx"] = torch.full((columns,), -1, dtype=torch.int32)
    scene = Scene(tmp_path, made)
    found = scene.merge(quantized="dense")
    assert bits(found[f"{Q}.weight"]) == bits(scene.merged(Q).bfloat16())
    assert shardmerge.verify(tmp_path / "out", rows=None).ok


@pytest.mark.parametrize(
    ("kind", "part"), [("int4-group", "weight_scale"), ("int8-channel", "weight_scale"), ("nvfp4", "weight_scale")]
)
def test_a_scale_of_zero_can_be_read_and_not_written_with(tmp_path: Path, kind: str, part: str) -> None:
    made = PACK_BASES[kind]()
    scale = made.tensors[f"{Q}.{part}"].float()
    scale[40, 0] = 0.0
    made.tensors[f"{Q}.{part}"] = scale.to(made.tensors[f"{Q}.{part}"].dtype)
    made.values[f"{Q}.weight"] = made.stored(Q, made.tensors)
    scene = Scene(tmp_path, made)
    with pytest.raises(FormatError, match=rf"q_proj\.{part} holds 0 at \[40, 0\], so no code can hold an updated"):
        scene.merge("same", quantized="same")
    assert bits(scene.merge(quantized="dense")[f"{Q}.weight"]) == bits(scene.merged(Q).bfloat16())


def test_parts_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    made = PACK_BASES["int4-group"]()
    made.tensors[f"{Q}.weight_scale"] = torch.ones(96, 4)
    made.tensors[f"{DOWN}.weight_packed"] = torch.ones(96, 21, dtype=torch.int32)
    with pytest.raises(PlanError) as refused:
        shardmerge.plan(Scene(tmp_path, made).config())
    message = str(refused.value)
    assert f"{Q}.weight_packed is stored by compressed-tensors as I32" in message
    assert f"{DOWN}.weight_packed is stored by compressed-tensors as I32 [96, 21]" in message


# --- little memory ---------------------------------------------------------------------------------------------------


@each("int4-group-asymmetric")
def test_the_same_bytes_in_little_memory(tmp_path: Path, kind: str) -> None:
    """There a weight takes many tiles, whose rows begin anywhere in a word of zero points."""
    scene = Scene(tmp_path, PACK_BASES[kind]())
    for mode in ("dense", "same"):
        wanted = scene.merge(mode, quantized=mode)
        little = scene.config(f"little-{mode}", quantized=mode)
        little["compute"] = {"max_memory": least_memory(scene.config("x", quantized=mode))}
        shardmerge.merge(little)
        for name, tensor in stored(tmp_path / f"little-{mode}").items():
            assert bits(tensor) == bits(wanted[name]), name


# --- programs that load it -------------------------------------------------------------------------------------------

LOADED = ("int4-group", "int4-channel", "int8-channel", "nvfp4", "mxfp4", "mxfp8-compressed-tensors")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["mixed", "dense", "same"])
@pytest.mark.parametrize("kind", LOADED)
def test_transformers_loads_the_merged_weights(tmp_path: Path, kind: str, mode: str) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    made = PACK_BASES[kind]()
    scene = Scene(tmp_path, made)
    found = scene.merge(quantized=mode)
    options = {} if mode == "dense" else {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True, **options
    )
    # It has no place for what NVFP4 stores for activations, in the base neither.
    unexpected = [name for name in info.pop("unexpected_keys") if not name.endswith(".input_global_scale")]
    assert not unexpected and not any(info.values()), (unexpected, info)
    state = model.state_dict()
    for module in linears():
        wanted = made.stored(module, found) if mode == "same" else scene.merged(module)
        assert torch.equal(state[f"{module}.weight"], wanted.bfloat16()), module
