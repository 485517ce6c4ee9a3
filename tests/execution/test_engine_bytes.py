"""What the engine copies, converts, and computes in another dtype: every byte of the output has one right value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmerge
from shardmerge.spec.tensors import LIBRARY_BYTES
from tests.support.peft_oracle import (
    assert_same_bits,
    bits,
    least_memory,
    make_config,
    merge_to,
    nearest_even,
    random,
    stored,
    weight_bytes,
    write_adapter,
    write_base,
)

KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TARGET = "model.layers.0.mlp.down_proj"
ALPHA = 7.3
RANK = 5
A, B = random(RANK, 77, seed=1), random(51, RANK, seed=2)
INFINITY, NAN = float("inf"), float("nan")

each_dtype = pytest.mark.parametrize("dtype", KINDS)


def weight(dtype: torch.dtype) -> Tensor:
    return random(51, 77, seed=3, scale=0.02, dtype=dtype)


def foreign() -> dict[str, Tensor]:
    """Tensors that a merge carries along and never computes with; every pattern of 8 bits occurs."""
    patterns = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    return {
        "buffers.bool": torch.tensor([[True, False, True]]),
        "buffers.f64": random(3, 5, seed=5).double() + 1e-12,
        "buffers.i64": torch.arange(-5, 6) * 2**40,
        "buffers.u8": patterns,
        "buffers.empty": torch.zeros(0, 4, dtype=torch.int32),
        "quantised.weight": patterns.view(16, 16).view(torch.float8_e4m3fn),
        "quantised.scale": patterns.view(torch.float8_e5m2),
    }


def floats(dtype: torch.dtype) -> dict[str, Tensor]:
    """Untouched weights, with what a float can be other than an ordinary number."""
    special = torch.tensor([-INFINITY, INFINITY, NAN, -NAN, 0.0, -0.0, 1.0, torch.finfo(dtype).tiny], dtype=dtype)
    return {
        "model.mask": special,
        "model.norm.weight": random(77, seed=6, dtype=dtype),
        "model.embed.weight": random(40, 7, 3, seed=7, dtype=dtype),
        "model.scalar": torch.tensor(0.1, dtype=dtype),
        "model.empty": torch.zeros(0, 4, dtype=dtype),
    }


def without_payload(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every NaN made the same one: what a conversion keeps of its sign and payload is the processor's affair."""
    return {
        name: tensor.masked_fill(tensor != tensor, NAN) if tensor.dtype in KINDS.values() else tensor
        for name, tensor in tensors.items()
    }


def make_base(folder: Path, dtype: torch.dtype) -> Path:
    first = {**foreign(), f"{TARGET}.weight": weight(dtype)}
    return write_base(folder, [first, floats(dtype)], dtype=str(dtype).removeprefix("torch."))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", {TARGET: (A, B)}, ALPHA)


# --- untouched tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_size", ["same", 400, 10**9], ids="shards-{}".format)
@each_dtype
def test_untouched_tensors_are_the_same_bytes(dtype: str, max_shard_size: Any, adapter: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", KINDS[dtype])
    merge_to(tmp_path / "out", base, adapter, max_shard_size=max_shard_size)
    before, after = stored(base), stored(tmp_path / "out")
    assert bits(before.pop(f"{TARGET}.weight")) != bits(after.pop(f"{TARGET}.weight"))
    assert_same_bits(after, before)


@pytest.mark.parametrize("compute", ["float32", "float64", "bfloat16"])
def test_untouched_tensors_are_the_same_bytes_whatever_is_computed_in(
    compute: str, adapter: Path, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", torch.float32)
    merge_to(tmp_path / "out", base, adapter, compute=compute)
    before, after = stored(base), stored(tmp_path / "out")
    del before[f"{TARGET}.weight"], after[f"{TARGET}.weight"]
    assert_same_bits(after, before)


def test_runs_longer_than_a_buffer_are_copied_whole(tmp_path: Path) -> None:
    # 5 odd-sized tensors of some 100 kB each, between targets, through buffers of 64 KiB.
    names = [f"model.layers.{n}.mlp.down_proj" for n in range(3)]
    tensors = {f"{name}.weight": random(51, 77, seed=n) for n, name in enumerate(names)}
    tensors |= {f"model.layers.{n}.extra": random(25_001 + n, seed=n) for n in range(5)}
    base = write_base(tmp_path / "base", [tensors])
    adapter = write_adapter(tmp_path / "adapter", dict.fromkeys(names, (A, B)))
    config = make_config(tmp_path / "out", base, [adapter])
    merge_to(tmp_path / "out", base, adapter, max_memory=least_memory(config))
    after = stored(tmp_path / "out")
    assert_same_bits(
        {name: tensor for name, tensor in after.items() if "extra" in name},
        {name: tensor for name, tensor in tensors.items() if "extra" in name},
    )


# --- conversion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", KINDS, ids="to-{}".format)
@pytest.mark.parametrize("dtype", KINDS, ids="from-{}".format)
def test_conversion(dtype: str, to: str, adapter: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", KINDS[dtype])
    merge_to(tmp_path / "out", base, adapter, dtype=to)
    after = stored(tmp_path / "out")
    summed = weight(KINDS[dtype]).float() + (B @ A) * (ALPHA / RANK)
    expected = {name: tensor.to(KINDS[to]) for name, tensor in floats(KINDS[dtype]).items()}
    expected |= {f"{TARGET}.weight": summed.to(KINDS[to]), **foreign()}
    assert_same_bits(without_payload(after), without_payload(expected))


@pytest.mark.parametrize("to", KINDS, ids="to-{}".format)
@pytest.mark.parametrize("dtype", KINDS, ids="from-{}".format)
def test_tiles_do_not_show_in_a_conversion(dtype: str, to: str, tmp_path: Path) -> None:
    base = write_base(
        tmp_path / "base",
        [{f"{TARGET}.weight": random(311, 333, seed=1, dtype=KINDS[dtype]), "x": random(3, 41_111, seed=2)}],
    )
    adapter = write_adapter(tmp_path / "adapter", {TARGET: (random(3, 333, seed=3), random(311, 3, seed=4))})
    config = make_config(tmp_path / "none", base, [adapter], dtype=to)
    files = []
    for memory in (least_memory(config), "auto"):
        merge_to(tmp_path / str(memory), base, adapter, dtype=to, max_memory=memory)
        files.append(weight_bytes(tmp_path / str(memory)))
    assert files[0] == files[1]


def test_a_mask_of_infinities_survives_every_conversion(adapter: Path, tmp_path: Path) -> None:
    mask = torch.full((7, 9), -INFINITY).triu(1)
    base = write_base(tmp_path / "base", [{f"{TARGET}.weight": weight(torch.float32), "model.mask": mask}])
    for to in KINDS:
        merge_to(tmp_path / to, base, adapter, dtype=to)
        assert torch.equal(stored(tmp_path / to)["model.mask"].float(), mask)


# --- float64 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["bfloat16", "float16"], ids="to-{}".format)
@pytest.mark.parametrize("dtype", KINDS, ids="from-{}".format)
def test_float64_results_are_rounded_once(dtype: str, to: str, adapter: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", KINDS[dtype])
    merge_to(tmp_path / "out", base, adapter, dtype=to, compute="float64")
    exact = weight(KINDS[dtype]).double() + (B.double() @ A.double()) * (ALPHA / RANK)
    found = stored(tmp_path / "out")[f"{TARGET}.weight"]
    assert bits(found) == bits(nearest_even(exact, KINDS[to]))


def test_float64_results_on_a_tie_of_float32_are_rounded_once(tmp_path: Path) -> None:
    # 1 + 2^-8 lies between two bfloat16 numbers; with 2^-30 more it must go up, and by way of float32 it goes down.
    eye = torch.eye(16)
    base = write_base(tmp_path / "base", [{f"{TARGET}.weight": eye * (1 + 2.0**-8)}])
    adapter = write_adapter(tmp_path / "adapter", {TARGET: (eye * 2.0**-30, eye)}, alpha=16)
    merge_to(tmp_path / "out", base, adapter, dtype="bfloat16", compute="float64")
    assert stored(tmp_path / "out")[f"{TARGET}.weight"].diagonal().tolist() == [1 + 2.0**-7] * 16
    merge_to(tmp_path / "narrow", base, adapter, dtype="bfloat16")
    assert stored(tmp_path / "narrow")[f"{TARGET}.weight"].diagonal().tolist() == [1.0] * 16


def test_a_tiny_update_in_float64_of_a_weight_that_is_zero_gives_zero(tmp_path: Path) -> None:
    eye = torch.eye(16)
    base = write_base(tmp_path / "base", [{f"{TARGET}.weight": torch.zeros(16, 16, dtype=torch.bfloat16)}])
    adapter = write_adapter(tmp_path / "adapter", {TARGET: (eye * 1e-30, eye * 1e-30)}, alpha=16)
    merge_to(tmp_path / "out", base, adapter, compute="float64")
    assert not bool(stored(tmp_path / "out")[f"{TARGET}.weight"].any())


def test_float64_to_float32_is_what_torch_rounds(adapter: Path, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", torch.bfloat16)
    merge_to(tmp_path / "out", base, adapter, dtype="float32", compute="float64")
    exact = weight(torch.bfloat16).double() + (B.double() @ A.double()) * (ALPHA / RANK)
    assert bits(stored(tmp_path / "out")[f"{TARGET}.weight"]) == bits(exact.float())


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_tensor_larger_than_max_memory_is_merged(tmp_path: Path) -> None:
    large = random(2048, 300, seed=1)
    a, b = random(4, 300, seed=2), random(2048, 4, seed=3)
    base = write_base(tmp_path / "base", [{f"{TARGET}.weight": large, "model.embed.weight": large + 1}])
    adapter = write_adapter(tmp_path / "adapter", {TARGET: (a, b)}, alpha=3.0)
    memory = least_memory(make_config(tmp_path / "out", base, [adapter]))
    assert memory - LIBRARY_BYTES < large.nbytes / 2
    plan = shardmerge.plan(make_config(tmp_path / "out", base, [adapter], max_memory=memory))
    assert plan.memory.total <= memory
    assert max(tensor.tiles for tensor in plan.shards[0].tensors) > 10
    shardmerge.merge(plan)
    after = stored(tmp_path / "out")
    assert_same_bits(after, {f"{TARGET}.weight": large + (b @ a) * 0.75, "model.embed.weight": large + 1})
