"""Numbers that cannot be merged or stored stop the merge, are named, and leave nothing behind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import shardmerge
from shardmerge import NonFiniteError
from tests.support.peft_oracle import (
    least_memory,
    make_config,
    merge_to,
    random,
    stored,
    write_adapter,
    write_base,
)

TARGET = "model.layers.0.mlp.down_proj"
NAME = f"{TARGET}.weight"
PREFIX = f"base_model.model.{TARGET}"
ROWS, COLUMNS, RANK = 90, 333, 4
A, B = random(RANK, COLUMNS, seed=1), random(ROWS, RANK, seed=2)
INFINITY, NAN = math.inf, math.nan
memories = pytest.mark.parametrize("memory", ["least", "auto"])


def put(tensor: Tensor, position: tuple[int, ...], value: float) -> Tensor:
    changed = tensor.clone()
    changed[position] = value
    return changed


def refused(folder: Path, weights: Mapping[str, Tensor], a: Tensor = A, b: Tensor = B, **options: Any) -> str:
    """Merge, expect `NonFiniteError`, check that the disk is as before, and give back the message."""
    base = write_base(folder / "base", [{"model.first": random(2000, seed=9)}, weights])
    adapter = write_adapter(folder / "adapter", {TARGET: (a, b)}, alpha=RANK)
    if options.get("max_memory") == "least":
        del options["max_memory"]
        options["max_memory"] = least_memory(make_config(folder / "out", base, [adapter], **options))
    before = sorted(folder.rglob("*"))
    with pytest.raises(NonFiniteError) as caught:
        merge_to(folder / "out", base, adapter, **options)
    assert sorted(folder.rglob("*")) == before
    assert caught.value.exit_code == 4
    return str(caught.value)


def zeros(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(ROWS, COLUMNS, dtype=dtype)


# --- results ----------------------------------------------------------------------------------------------------------


@memories
@pytest.mark.parametrize("sign", [1, -1], ids=["plus", "minus"])
@pytest.mark.parametrize("position", [(0, 0), (16, 7), (89, 332)], ids=str)
def test_a_result_above_float16_is_named_with_what_would_hold_it(
    position: tuple[int, int], sign: int, memory: str, tmp_path: Path
) -> None:
    weight = put(zeros(torch.float16), position, sign * 65504.0)
    b = put(torch.zeros(ROWS, RANK), (position[0], 2), sign * 16.0)
    a = put(torch.zeros(RANK, COLUMNS), (2, position[1]), 1.0)
    message = refused(tmp_path, {NAME: weight}, a, b, max_memory=memory)
    assert f"{NAME}, row {position[0]}, column {position[1]}:" in message
    assert f"{sign * 65520:g}" in message and "float16" in message
    assert "float32" in message and "bfloat16" in message


def test_the_largest_result_that_rounds_to_a_number_is_stored(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{NAME: put(zeros(torch.float16), (5, 5), 65504.0)}])
    b, a = put(torch.zeros(ROWS, 1), (5, 0), 15.9921875), put(torch.zeros(1, COLUMNS), (0, 5), 1.0)
    merge_to(tmp_path / "out", base, write_adapter(tmp_path / "adapter", {TARGET: (a, b)}, alpha=1))
    assert stored(tmp_path / "out")[NAME][5, 5] == 65504.0


def test_what_overflows_float16_is_held_by_float32_and_bfloat16(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{NAME: torch.full((ROWS, COLUMNS), 60000.0, dtype=torch.float16)}])
    b, a = torch.full((ROWS, 1), 100.0), torch.full((1, COLUMNS), 100.0)
    adapter = write_adapter(tmp_path / "adapter", {TARGET: (a, b)}, alpha=1)
    for dtype in ("float32", "bfloat16"):
        merge_to(tmp_path / dtype, base, adapter, dtype=dtype)
        expected = torch.tensor(70000.0).to(getattr(torch, dtype))
        assert bool((stored(tmp_path / dtype)[NAME] == expected).all())
    with pytest.raises(NonFiniteError):
        merge_to(tmp_path / "float16", base, adapter)


def test_a_result_above_bfloat16_is_not_advised_to_use_bfloat16(tmp_path: Path) -> None:
    weight = put(zeros(), (3, 4), torch.finfo(torch.float32).max)
    message = refused(tmp_path, {NAME: weight}, dtype="bfloat16")
    assert f"{NAME}, row 3, column 4:" in message
    assert "more than bfloat16" in message
    assert "output.dtype: float32 holds it" in message


def test_a_float64_result_above_every_dtype_is_told_so(tmp_path: Path) -> None:
    a, b = torch.full((1, COLUMNS), 1e30), torch.full((ROWS, 1), 1e30)
    message = refused(tmp_path, {NAME: zeros()}, a, b, compute="float64")
    assert f"{NAME}, row 0, column 0:" in message and "No output dtype holds it" in message


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_product_that_overflows_is_named(compute: str, tmp_path: Path) -> None:
    a, b = put(zeros()[:1], (0, 5), 1e30), put(torch.zeros(ROWS, 1), (70, 0), -1e30)
    message = refused(tmp_path, {NAME: zeros()}, a, b, compute=compute)
    assert f"{NAME}, row 70, column 5:" in message and "-inf" in message


# --- the base ---------------------------------------------------------------------------------------------------------


@memories
@pytest.mark.parametrize("value", [INFINITY, -INFINITY, NAN], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_value_of_a_touched_weight_that_is_not_finite_is_named(
    dtype: torch.dtype, value: float, memory: str, tmp_path: Path
) -> None:
    weight = put(random(ROWS, COLUMNS, seed=3, dtype=dtype), (77, 5), value)
    message = refused(tmp_path, {NAME: weight}, max_memory=memory)
    assert f"{NAME}, row 77, column 5:" in message
    assert "base" in message and str(value) in message


@memories
def test_an_untouched_value_above_the_output_dtype_is_named_by_its_index(memory: str, tmp_path: Path) -> None:
    masks = torch.full((40, 30, 20), -INFINITY)
    masks[31, 7, 19] = 70000.0
    message = refused(tmp_path, {NAME: zeros(), "model.masks": masks}, dtype="float16", max_memory=memory)
    assert "model.masks, element [31, 7, 19]:" in message
    assert "70000" in message and "float16" in message


# --- factors ----------------------------------------------------------------------------------------------------------


@memories
@pytest.mark.parametrize("value", [INFINITY, -INFINITY, NAN], ids=str)
@pytest.mark.parametrize(
    ("role", "position"),
    [("A", (0, 0)), ("A", (3, 332)), ("B", (0, 1)), ("B", (61, 2)), ("B", (89, 3))],
    ids=["A-first", "A-last", "B-first", "B-middle", "B-last"],
)
def test_a_factor_that_is_not_finite_is_named_with_the_index(
    role: str, position: tuple[int, int], value: float, memory: str, tmp_path: Path
) -> None:
    a = put(A, position, value) if role == "A" else A
    b = put(B, position, value) if role == "B" else B
    message = refused(tmp_path, {NAME: zeros()}, a, b, max_memory=memory)
    assert f"{PREFIX}.lora_{role}.weight" in message and "adapter_model.safetensors" in message
    assert f"{value} at {list(position)}" in message


@memories
@pytest.mark.parametrize(("role", "position"), [("A", (332, 1)), ("B", (2, 61))], ids=["A", "B"])
def test_a_pure_pytorch_factor_is_named_with_the_index_that_it_has_in_its_file(
    role: str, position: tuple[int, int], memory: str, tmp_path: Path
) -> None:
    base = write_base(tmp_path / "base", [{NAME: zeros()}])
    tensors = {"A": A.T.contiguous(), "B": B.T.contiguous()}
    tensors[role][position] = NAN
    torch.save({f"{TARGET}.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "lora.pt")
    entry = {"path": str(tmp_path / "lora.pt"), "alpha": 3.0}
    config = make_config(tmp_path / "out", base, [entry])
    limit = least_memory(config) if memory == "least" else "auto"
    with pytest.raises(NonFiniteError) as caught:
        merge_to(tmp_path / "out", base, entry, max_memory=limit)
    assert f"{TARGET}.{role} " in str(caught.value) and f"nan at {list(position)}" in str(caught.value)
    assert not (tmp_path / "out").exists()


# --- what is left -----------------------------------------------------------------------------------------------------


def test_a_stop_in_the_second_shard_leaves_a_finished_output_as_it_was(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{"model.first": random(9, seed=1)}, {NAME: zeros()}])
    good = write_adapter(tmp_path / "good", {TARGET: (A, B)})
    bad = write_adapter(tmp_path / "bad", {TARGET: (A, put(B, (9, 0), NAN))})
    merge_to(tmp_path / "out", base, good)
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    with pytest.raises(NonFiniteError):
        shardmerge.merge(make_config(tmp_path / "out", base, [bad]), overwrite=True)
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == before
    assert not (tmp_path / "out" / ".shardmerge").exists()


def test_a_stop_after_an_interrupted_run_leaves_no_file(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", [{"model.first": random(9, seed=1)}, {NAME: zeros()}])
    bad = write_adapter(tmp_path / "bad", {TARGET: (A, put(B, (9, 0), NAN))})
    config = make_config(tmp_path / "out", base, [bad])

    def interrupt(progress: shardmerge.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shardmerge.merge(config, progress=interrupt)
    with pytest.raises(NonFiniteError):
        shardmerge.merge(config)
    assert not any(path.is_file() for path in (tmp_path / "out").rglob("*"))
    assert shardmerge.plan(config).digest
