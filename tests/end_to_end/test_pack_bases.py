"""Bases of integers and FP4: merged into 16 bits, beside what keeps its bytes, and onto their own grid."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import shardmerge
from tests.support.pack_bases import PACK_BASES
from tests.support.peft_oracle import bits, write_adapter
from tests.support.quantised_bases import linears
from tests.support.quantised_scene import ALPHA, DOWN, Q, Scene

each = pytest.mark.parametrize("kind", PACK_BASES)
FUSED = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]


@each
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


@each
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


@each
def test_same_writes_the_nearest_codes_of_the_bases_own_grid(tmp_path: Path, kind: str) -> None:
    made = PACK_BASES[kind]()
    scene = Scene(tmp_path, made)
    found = scene.merge(quantized="same")
    assert found.keys() == made.tensors.keys()
    written = {f"{module}.{made.codes}" for module in scene.factors}
    for name, tensor in made.tensors.items():
        assert (bits(found[name]) == bits(tensor)) != (name in written), name
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
    for module in scene.factors:
        exact = scene.merged(module).double()
        error = (made.stored(module, found).double() - exact).abs()
        assert bool((error <= made.nearest(module, exact) + exact.abs() * 2.0**-22).all())
    assert scene.settings() == made.config
    assert shardmerge.verify(tmp_path / "out", rows=None).ok


@each
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_an_adapter_of_zeros_changes_no_code(tmp_path: Path, kind: str, rounding: str) -> None:
    made = PACK_BASES[kind]()
    scene = Scene(tmp_path, made)
    write_adapter(scene.adapter, {module: (a, b * 0) for module, (a, b) in scene.factors.items()}, ALPHA)
    found = scene.merge(quantized="same", rounding=rounding)
    for name, tensor in made.tensors.items():
        if name.removesuffix(f".{made.codes}") not in scene.factors:
            assert bits(found[name]) == bits(tensor), name
    for module in scene.factors:  # the sign of zero may change
        assert torch.equal(made.stored(module, found), made.stored(module, made.tensors)), module


@each
def test_stochastic_rounding_keeps_a_small_update_on_average(tmp_path: Path, kind: str) -> None:
    made = PACK_BASES[kind]()
    scene = Scene(tmp_path, made)
    small = {module: (a, b * 0.02) for module, (a, b) in scene.factors.items()}
    write_adapter(scene.adapter, small, ALPHA)
    module, total = Q, 0.0
    a, b = small[module]
    update = (b @ a).double() * (ALPHA / len(a))
    for seed in range(8):
        found = scene.merge(f"out-{seed}", quantized="same", rounding="stochastic", seed=seed)
        moved = (made.stored(module, found) - made.values[f"{module}.weight"]).double()
        total += float((moved * update).sum() / (update * update).sum()) / 8
    assert shardmerge.verify(tmp_path / "out-0", rows=None).ok
    assert total == pytest.approx(1.0, abs=0.5)
