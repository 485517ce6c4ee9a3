"""Where a tile's rows lie in a module's matrix: the parts of all tiles make up the matrix, and nothing else."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shardmerge.planning.tiling import tile_counts
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import Orientation, TensorInfo, transposed_if
from shardmerge.spec.updates import Region, Update
from shardmerge.spec.windows import boundaries, locate
from tests.support.builders import refs_of, untimed, update_of

Shape = tuple[int, ...]


def update(shape: Shape, region: Region, *, experts: int = 0, orientation: Orientation = Orientation.SAME) -> Update:
    """An update of a matrix of this shape, as the family sees it."""
    return dataclasses.replace(
        update_of("w", shape, (), rank=1), region=region, experts=experts, orientation=orientation, target="w"
    )


def plan(stored: Shape, *updates: Update, buffer_bytes: int = 1 << 20) -> TensorPlan:
    tensor = TensorPlan(refs_of({"w": stored})["w"], TensorInfo("F32", stored, (0, 0)), updates)
    segments = tile_counts(tensor, buffer_bytes)
    return dataclasses.replace(tensor, tiles=sum(count for _, count in segments), segments=segments)


def gathered(tensor: TensorPlan, of: Update, values: Tensor) -> Tensor:
    """The matrix (of every expert), collected from the tiles; what no tile gives is -1."""
    matrix = torch.full((max(of.experts, 1), of.rows, of.columns), -1.0)
    flat = values.reshape(tensor.rows, tensor.row_elements)
    seen = torch.zeros_like(matrix)
    for tile in tensor.ranges():
        part = locate(tensor, of, tile)
        if part is None:
            continue
        view = flat[tile.start : tile.stop, part.columns.start : part.columns.stop]
        view = part.orientation.view(view)
        window = part.window
        where = (
            window.expert if of.experts else 0,
            slice(window.rows.start, window.rows.stop),
            slice(window.columns.start, window.columns.stop),
        )
        matrix[where] = view
        seen[where] += 1
    assert seen.max() <= 1
    return matrix


SIZES = st.integers(1, 60)


@untimed
@given(SIZES, SIZES, st.booleans(), st.booleans(), st.integers(1, 4000))
def test_whole_matrix(rows: int, columns: int, stored_transposed: bool, transposes: bool, buffer_bytes: int) -> None:
    """A Linear layer, a Conv1D, an embedding, and an embedding that is stored transposed."""
    stored = (columns, rows) if stored_transposed else (rows, columns)  # of the parameter (rows, columns)
    seen = (columns, rows) if transposes else (rows, columns)
    of = update(
        seen, Region("w", rows, orientation=transposed_if(stored_transposed)), orientation=transposed_if(transposes)
    )
    tensor = plan(stored, of, buffer_bytes=buffer_bytes)
    values = torch.arange(rows * columns, dtype=torch.float32).view(stored)
    wanted = values.T if stored_transposed != transposes else values
    assert torch.equal(gathered(tensor, of, values)[0], wanted)


@untimed
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), SIZES, st.integers(1, 4000))
def test_modules_that_are_stored_as_one(parts: list[int], columns: int, buffer_bytes: int) -> None:
    """q, k and v of one stored tensor: each finds its rows, and no tile reaches across."""
    starts = [sum(parts[:index]) for index in range(len(parts))]
    updates = [
        update((rows, columns), Region("w", rows, stored_start=start))
        for rows, start in zip(parts, starts, strict=True)
    ]
    tensor = plan((sum(parts), columns), *updates, buffer_bytes=buffer_bytes)
    values = torch.arange(sum(parts) * columns, dtype=torch.float32).view(-1, columns)
    for of, start in zip(updates, starts, strict=True):
        assert torch.equal(gathered(tensor, of, values)[0], values[start : start + of.rows])


@untimed
@given(st.integers(1, 5), st.integers(1, 30), SIZES, st.booleans(), st.booleans(), st.integers(1, 4000))
def test_experts_in_one_tensor(
    experts: int, rows: int, columns: int, stored_transposed: bool, transposes: bool, buffer_bytes: int
) -> None:
    stored = (experts, columns, rows) if stored_transposed else (experts, rows, columns)
    seen = (experts, columns, rows) if transposes else (experts, rows, columns)
    region = Region("w", rows, orientation=transposed_if(stored_transposed))
    of = update(seen, region, experts=experts, orientation=transposed_if(transposes))
    tensor = plan(stored, of, buffer_bytes=buffer_bytes)
    values = torch.arange(experts * rows * columns, dtype=torch.float32).view(stored)
    wanted = values.transpose(1, 2) if stored_transposed != transposes else values
    assert torch.equal(gathered(tensor, of, values), wanted)


@pytest.mark.parametrize("transposed", [False, True])
def test_one_expert_of_a_stored_stack(transposed: bool) -> None:
    """An adapter's expert as a module of its own, its gate the first half of the rows that are stored fused."""
    stored = (4, 7, 40) if transposed else (4, 40, 7)
    values = torch.arange(4 * 40 * 7, dtype=torch.float32).view(stored)
    for expert in range(4):
        for half in range(2):
            region = Region("w", 20, stored_start=20 * half, expert=expert, orientation=transposed_if(transposed))
            of = update((20, 7), region)
            matrix = values[expert].T if transposed else values[expert]
            assert torch.equal(gathered(plan(stored, of), of, values)[0], matrix[20 * half : 20 * half + 20])


@pytest.mark.parametrize("transposed", [False, True])
def test_a_stored_expert_of_a_fused_parameter(transposed: bool) -> None:
    """One file a projection: it holds rows of one expert's matrix."""
    stored = (7, 20) if transposed else (20, 7)
    values = torch.arange(140, dtype=torch.float32).view(stored)
    of = update((4, 40, 7), Region("w", 20, start=20, expert=2, orientation=transposed_if(transposed)), experts=4)
    matrix = gathered(plan(stored, of), of, values)
    assert torch.equal(matrix[2, 20:], values.T if transposed else values)
    matrix[2, 20:] = -1
    assert bool((matrix == -1).all())


def test_boundaries() -> None:
    whole = update((9, 5), Region("w", 9))
    assert boundaries(plan((9, 5), whole)) == [0, 9]
    part = update((3, 5), Region("w", 3, stored_start=2))
    assert boundaries(plan((9, 5), whole, part)) == [0, 2, 5, 9]
    stack = update((3, 9, 5), Region("w", 9), experts=3)
    assert boundaries(plan((3, 9, 5), stack)) == [0, 9, 18, 27]
    assert boundaries(plan((9,), update((9,), Region("w", 9)))) == [0, 9]
