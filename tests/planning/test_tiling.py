"""Rows → tiles: even, never too few rows, within a buffer; and the memory that they are said to take."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardmerge.adapters.work import needs_work
from shardmerge.planning import tiling
from shardmerge.planning.tiling import _SIZES, BUFFERS, WORKERS, itemsize, row_bytes, tile_all, tile_counts
from shardmerge.spec.plans import MemoryPlan, ShardPlan, TensorPlan
from shardmerge.spec.tensors import (
    FLOAT_DTYPES,
    KEPT_WHOLE_BYTES,
    LIBRARY_BYTES,
    MIN_TILE_ROWS,
    Encoding,
    TensorInfo,
    TensorRef,
    even_rows,
)
from shardmerge.spec.updates import Update
from tests.support.builders import refs_of, untimed, update_of

SMALLEST, LARGEST, TILE = _SIZES[-1][0], _SIZES[0][0], _SIZES[0][1]


def tensor_plan(
    shape: tuple[int, ...], source: str = "F32", out: str = "F32", rank: int = 0, transposed: bool = False
) -> TensorPlan:
    """A tensor of a plan; with a rank it has an update, whose factors may be stored transposed."""
    elements = math.prod(shape)
    updates: tuple[Update, ...] = ()
    if rank:
        a: TensorRef = refs_of({"A": (shape[1], rank) if transposed else (rank, shape[1])})["A"]
        b: TensorRef = refs_of({"B": (rank, shape[0]) if transposed else (shape[0], rank)})["B"]
        factors = (("A", a.transposed() if transposed else a), ("B", b.transposed() if transposed else b))
        updates = (update_of("m.weight", shape, factors, rank=rank),)
    return TensorPlan(
        refs_of({"m.weight": shape}, source)["m.weight"],
        TensorInfo(out, shape, (0, elements * itemsize(out))),
        updates,
    )


def tile_count(tensor: TensorPlan, buffer_bytes: int) -> int:
    """The number of tiles of a tensor of one segment."""
    ((rows, tiles),) = tile_counts(tensor, buffer_bytes)
    assert rows == tensor.rows
    return tiles


def tile_rows(tensor: TensorPlan, tiles: int) -> int:
    """Rows of the largest tile."""
    return math.ceil(tensor.rows / tiles)


DTYPES = st.sampled_from(FLOAT_DTYPES)
SHAPES = st.tuples(st.integers(1, 5000), st.integers(1, 5000))
TENSORS = st.builds(tensor_plan, SHAPES, DTYPES, DTYPES, st.integers(0, 300), st.booleans())
BUFFER_SIZES = st.integers(1, 1 << 24)


@untimed
@given(st.integers(0, 10_000), st.integers(1, 100))
def test_even_rows(rows: int, tiles: int) -> None:
    ranges = list(even_rows(rows, tiles))
    assert len(ranges) == tiles
    assert [part.start for part in ranges] == [0, *(part.stop for part in ranges[:-1])]
    assert ranges[-1].stop == rows
    lengths = [len(part) for part in ranges]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


@untimed
@given(TENSORS, BUFFER_SIZES)
def test_tiles(tensor: TensorPlan, buffer_bytes: int) -> None:
    tiles = tile_count(tensor, buffer_bytes)
    lengths = [len(part) for part in even_rows(tensor.rows, tiles)]
    assert sum(lengths) == tensor.rows
    assert max(lengths) == tile_rows(tensor, tiles)
    assert min(lengths) >= min(MIN_TILE_ROWS, tensor.rows)
    if tensor.updates and tensor.row_elements == 1:
        assert tiles == 1
    elif max(lengths) * row_bytes(tensor) > buffer_bytes:
        # Above the buffer only where a finer split would have tiles of too few rows.
        assert tiles == max(1, tensor.rows // MIN_TILE_ROWS)
    if tiles > 1:
        assert tensor.rows * row_bytes(tensor) > buffer_bytes


@untimed
@given(TENSORS, BUFFER_SIZES, BUFFER_SIZES)
def test_larger_buffers_never_make_more_tiles(tensor: TensorPlan, one: int, other: int) -> None:
    assert tile_count(tensor, max(one, other)) <= tile_count(tensor, min(one, other))


@pytest.mark.parametrize(
    ("rows", "tiles"), [(0, 1), (1, 1), (15, 1), (16, 1), (31, 1), (32, 2), (33, 2), (47, 2), (48, 3)], ids=str
)
def test_least_rows(rows: int, tiles: int) -> None:
    assert tile_count(tensor_plan((rows, 1000), rank=4), 1) == tiles


def test_a_column_stays_whole() -> None:
    """A product with one column goes through another kernel, tile by tile, than the whole would."""
    assert tile_count(tensor_plan((1 << 20, 1), rank=4), SMALLEST) == 1
    assert tile_count(tensor_plan((1 << 20, 1), out="BF16"), SMALLEST) > 1


def test_conversion_goes_by_element() -> None:
    tensor = tensor_plan((3, 100_000), out="BF16")
    assert (tensor.rows, tensor.row_elements, row_bytes(tensor)) == (300_000, 1, 4)
    assert tile_count(tensor, 1 << 20) == 2


@pytest.mark.parametrize(
    ("tensor", "work"),
    [
        (tensor_plan((4, 4)), False),
        (tensor_plan((4, 4), rank=2), True),
        (tensor_plan((4, 4), out="BF16"), True),
        (tensor_plan((), out="BF16"), True),
    ],
    ids=["bytes", "update", "conversion", "scalar"],
)
def test_needs_work(tensor: TensorPlan, work: bool) -> None:
    assert needs_work(tensor) is work
    (shard,), _ = tile_all([shard_of([tensor])], "F32", None)
    assert [bool(tensor.tiles) for tensor in shard.tensors] == [work]


# --- memory -----------------------------------------------------------------------------------------------------------


def shard_of(tensors: list[TensorPlan]) -> ShardPlan:
    return ShardPlan("model.safetensors", (), tuple(tensors), 0, sum(tensor.out.nbytes for tensor in tensors))


def factor_bytes(tensor: TensorPlan, tiles: int, compute: str) -> int:
    """A whole; of B a tile's rows, or all where it is small; each as stored and in the compute dtype.

    Rows that lie apart are read whole.
    """
    total = 0
    for update in tensor.updates:
        a, b = update.factor("A"), update.factor("B")
        rows = tile_rows(tensor, tiles) * b.shape[1]
        # What MKL copies of it in each thread comes on top of a whole one: 3,072 columns, 3 MiB at most.
        for whole in (a, b) if b.nbytes <= KEPT_WHOLE_BYTES else (a,):
            height, width = whole.shape
            total += height * width * (4 + itemsize(compute))
            total += WORKERS * min(height * min(width, 3072) * itemsize(compute), 3 << 20)
        if b.nbytes <= KEPT_WHOLE_BYTES:
            continue
        total += WORKERS * rows * itemsize(compute)
        total += WORKERS * (b.nbytes if b.strides else rows * 4)
    return total


@untimed
@given(
    st.lists(TENSORS, max_size=5),
    st.sampled_from(["F32", "F64", "BF16"]),
    st.one_of(st.none(), st.integers(1, 1 << 28)),
)
def test_memory_is_that_of_the_tiles(tensors: list[TensorPlan], compute: str, budget: int | None) -> None:
    shards, memory = tile_all([shard_of(tensors[:2]), shard_of(tensors[2:])], compute, budget, threads=WORKERS)
    worked = [tensor for shard in shards for tensor in shard.tensors if tensor.tiles]
    assert [tensor.source for shard in shards for tensor in shard.tensors] == [tensor.source for tensor in tensors]
    assert len(worked) == sum(map(needs_work, tensors))
    for tensor in worked:
        assert tile_rows(tensor, tensor.tiles) * row_bytes(tensor) <= memory.buffer_bytes
    assert memory.buffers == BUFFERS
    tiles = [(tensor, tile_rows(tensor, tensor.tiles) * tensor.row_elements) for tensor in worked]
    # The tile and, at the next multiple of 64 bytes, scratch of its size.
    items = [itemsize(compute) if tensor.updates else 4 for tensor, _ in tiles]
    workspaces = [-(-count * item // 64) * 64 + count * item for (_, count), item in zip(tiles, items, strict=True)]
    assert memory.workspace_bytes == max(workspaces, default=0)
    factors = [factor_bytes(tensor, tensor.tiles, compute) for tensor in worked]
    if memory.weights == 2:
        factors += [one + other for one, other in itertools.pairwise(factors)]
    assert memory.factor_bytes == max(factors, default=0)


@pytest.mark.parametrize(("compute", "size"), [("BF16", 4), ("F32", 4), ("F64", 8)])
def test_blocks_are_made_in_float32_of_the_workspace(compute: str, size: int) -> None:
    plain = tensor_plan((64, 64), "BF16", "BF16", rank=4)
    out = dataclasses.replace(plain.out, dtype="Q4_0", data_offsets=(0, 64 * 64 // 32 * 18))
    quantised = dataclasses.replace(plain, out=out, encoding=Encoding("ggml-Q4_0", (("through", "BF16"),)))
    memories = [tile_all([shard_of([tensor])], compute, None)[1] for tensor in (plain, quantised)]
    assert [memory.workspace_bytes for memory in memories] == [2 * 64 * 64 * itemsize(compute), 2 * 64 * 64 * size]
    # What making blocks takes comes on top, what products in bfloat16 take, and rounding a float64 to 16 bits.
    assert memories[1].code_bytes > memories[0].code_bytes
    assert (memories[0].code_bytes > 0) == (compute != "F32")
    for memory in memories:
        assert memory.total == dataclasses.replace(memory, code_bytes=0).total + memory.code_bytes


@untimed
@given(st.lists(TENSORS, min_size=1, max_size=4), st.integers(1, 1 << 28), st.integers(1, 1 << 28))
def test_more_memory_allowed_never_means_less_used(tensors: list[TensorPlan], one: int, other: int) -> None:
    low, high = sorted((one, other))
    least, small, large = (memory_for(tensors, budget) for budget in (1, low, high))
    assert least.total <= small.total <= large.total
    for memory, budget in ((small, low), (large, high)):
        assert memory.total <= max(budget, least.total)


def memory_for(tensors: list[TensorPlan], budget: int) -> MemoryPlan:
    return tile_all([shard_of(tensors)], "F32", budget, threads=WORKERS)[1]


@pytest.mark.parametrize(("cores", "budget", "workers"), [(1, None, 1), (2, None, 2), (64, 1, 1), (64, 1 << 28, 64)])
def test_as_many_threads_as_there_are_cores_and_memory(
    cores: int, budget: int | None, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiling, "cores", lambda: cores)
    shard = shard_of([tensor_plan((4000, 4000), rank=16)])
    (of,), memory = tile_all([shard], "F32", budget)
    assert memory.workers == workers
    one = memory_of_threads(shard, budget, 1)
    assert of.tensors == one[0].tensors, "tiles do not depend on the number"
    if cores > 1 and budget is None:
        assert memory.total <= tiling.AUTO_MEMORY


def test_memory_bounds_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "cores", lambda: 64)
    shard = shard_of([tensor_plan((4000, 4000), rank=16)])
    _, memory = tile_all([shard], "F32", None)
    assert 2 < memory.workers < 64 and memory.total <= tiling.AUTO_MEMORY
    assert memory_of_threads(shard, None, memory.workers + 1)[1].total > tiling.AUTO_MEMORY or (
        memory_of_threads(shard, None, memory.workers + 1)[1].buffer_bytes < memory.buffer_bytes
    )


def test_a_number_of_threads_is_obeyed_with_smaller_buffers() -> None:
    shard = shard_of([tensor_plan((4000, 4000), rank=16)])
    budget = memory_of_threads(shard, 1 << 30, 2)[1].total
    assert memory_of_threads(shard, budget, 2)[1].buffer_bytes == LARGEST
    many = memory_of_threads(shard, budget, 6)[1]
    assert many.workers == 6 and many.buffer_bytes < LARGEST and many.total <= budget


def memory_of_threads(shard: ShardPlan, budget: int | None, threads: int) -> tuple[ShardPlan, MemoryPlan]:
    (of,), memory = tile_all([shard], "F32", budget, threads)
    return of, memory


def test_order_of_the_tensors_does_not_matter() -> None:
    wide, tall = tensor_plan((16, 400_000), rank=8), tensor_plan((40_000, 64), rank=300)
    assert memory_for([wide, tall], 1) == memory_for([tall, wide], 1)


def test_nothing_to_do_takes_the_largest_buffers_that_fit() -> None:
    large = [tensor_plan((10_000, 10_000))]
    assert memory_for(large, 1 << 28).buffer_bytes == LARGEST
    assert memory_for(large, LIBRARY_BYTES + BUFFERS * LARGEST - 1).buffer_bytes == LARGEST // 2
    assert memory_for(large, 1).buffer_bytes == SMALLEST


def test_a_small_model_takes_small_buffers() -> None:
    """Memory that would never be filled is not asked for; tiles stay as they are."""
    assert memory_for([tensor_plan((4, 4))], 1 << 28).buffer_bytes == TILE
    assert memory_for([tensor_plan((1000, 4000))], 1 << 28).buffer_bytes == 2 * TILE


def experts_in_turn(shared: bool) -> list[TensorPlan]:
    """Experts' down_proj and up_proj, one after the other, of a fused adapter each: factors of 4 experts in one."""

    def factors(of: str) -> tuple[tuple[str, TensorRef], ...]:
        refs = refs_of({f"{of}.A": (4 * 8, 64), f"{of}.B": (64, 4 * 8)})
        return ("A", refs[f"{of}.A"]), ("B", refs[f"{of}.B"])

    down, up = factors("down"), factors("up")
    result: list[TensorPlan] = []
    for expert in range(4):
        for name, fused in (("down", down), ("up", up)):
            of = fused if shared else factors(name)
            update = update_of(f"{expert}.{name}", (4, 64, 64), of, family="lora-experts", experts=4, rank=8)
            tensor = tensor_plan((64, 64))
            result.append(dataclasses.replace(tensor, updates=(update,)))
    return result


def test_factors_that_wait_for_the_next_expert_are_counted() -> None:
    """While one projection is worked on, the other's B waits."""
    assert memory_for(experts_in_turn(shared=True), 1 << 28).shared_bytes == 64 * 4 * 8 * 4
    assert memory_for(experts_in_turn(shared=False), 1 << 28).shared_bytes == 0


def test_who_has_no_memory_for_shared_factors_reads_them_again() -> None:
    tensors = experts_in_turn(shared=True)
    least = memory_for(tensors, 1)
    assert least.shared_bytes == 0
    assert memory_for(tensors, least.total + 100).shared_bytes == 100


def test_two_weights_are_in_the_works_where_their_factors_fit() -> None:
    shard = shard_of([tensor_plan((4000, 4000), rank=256), tensor_plan((4000, 4000), rank=512)])
    free, tight = (memory_of_threads(shard, budget, 2)[1] for budget in (1 << 30, 1))
    assert (free.weights, tight.weights) == (2, 1)
    assert memory_of_threads(shard, free.total, 2)[1] == free
    # Less memory takes the second weight before it takes the large buffers.
    less = memory_of_threads(shard, free.total - 1, 2)[1]
    assert (less.weights, less.buffer_bytes) == (1, free.buffer_bytes)
    one, other = (memory_of_threads(shard_of([tensor]), 1 << 30, 2)[1].factor_bytes for tensor in shard.tensors)
    assert (free.factor_bytes, less.factor_bytes) == (one + other, max(one, other))
