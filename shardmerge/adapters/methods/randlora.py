"""RandLoRA: W' = W + α / r · B' A', of full rank: many random bases that all modules share, scaled by trained numbers.

W is (out, in), m the smaller of the two and M the larger, n = ⌈m / r⌉. λ (r, n) and γ (n, m) are trained. A
(r, 1, m*) and B (M*, n*, r) are random, of the largest sizes that any module needs; a module takes A[:, :, :m] and
B[:M, :n]. With A'[u · n + j] = λ[u, j] A[u] ∘ γ[j], (r · n, m), and B' = B[:M, :n] flattened to (M, n · r), the
update is B' A' where out ≥ in, else its transpose. (Rows of A' count ranks first, columns of B' bases first; so it is
in PEFT's forward, too.)
Albert et al. 2025, arXiv:2502.00987. Source: peft/tuners/randlora/layer.py and model.py, 0.21.

The file has A and B as ``base_model.randlora_A`` and ``randlora_B``, or with ``save_projection`` false not at all.
Then they are drawn again from the seed, as PEFT does on a machine that has bf16: even numbers in bf16, or with
``sparse`` and ``very_sparse`` -1, 0 and 1 in float32, A first, each divided by its standard deviation, and rounded to
the dtypes of the modules' weights. Such a B, as large as a weight, is in memory whole; from a file, a few rows of it.

In float32 the bits are those of PEFT's merge, except that the deviation of sparse bases may differ in its last bit
with the number of threads. On a bf16 or fp16 base PEFT rounds the update and then the sum; we round once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.checks import FLAG, NUMBER, OPTIONAL_SEED, RANK, Config
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import (
    PART_ROWS,
    Factors,
    add_scaled,
    all_misshaped,
    parts_of,
    slab_elements,
    slabs,
)
from shardmerge.adapters.methods.vera import ProjectionSettings, rounded, shared_projections, sized
from shardmerge.spec.tensors import DTYPE_BITS, RowRange, TensorRef
from shardmerge.spec.updates import Update, Window


@dataclass(frozen=True, slots=True)
class RandLoraSettings(ProjectionSettings):
    """And the sparsity of A and B: "", "sparse" or "very"."""

    sparse: str = ""


class RandLora(PeftFamily):
    name = "randlora"
    sides = ("", "")  # no factor distinguishes the outputs from the inputs
    streamed = frozenset({"B"})
    neutral_if_zero = frozenset({"lambda"})
    by_column_windows = True
    adds = True
    peft_type = "RANDLORA"
    selectors = frozenset({"layers_to_transform", "layers_pattern"})
    title = "RandLoRA"
    updates = "matrices"
    paper = "arXiv:2502.00987"
    # PEFT saves A and B, which all modules share, once more for every module.
    roles = {"randlora_lambda": "lambda", "randlora_gamma": "gamma", "randlora_A": "A?", "randlora_B": "B?"}
    shared_roles = {"randlora_A": "A", "randlora_B": "B"}
    settings = {
        "r": RANK,
        "randlora_alpha": NUMBER,
        "save_projection": FLAG,
        "projection_prng_key": OPTIONAL_SEED,
        "sparse": FLAG,
        "very_sparse": FLAG,
        "fan_in_fan_out": FLAG,
    }
    inert = frozenset({"init_weights", "randlora_dropout"})

    def claim(self, tensors: Mapping[str, TensorRef], context: Context) -> Claims:
        return sized(super().claim(tensors, context), RandLoraSeeded(), context)

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        config = context.config
        projections = shared_projections(claims, module, context, "randlora_A", "randlora_B")
        if projections is None:
            return
        sparse = "very" if config.get("very_sparse") else "sparse" if config.get("sparse") else ""
        family = self.name if projections else RandLoraSeeded.name
        factors = tuple({**module.factors, **projections}.items())
        settings = RandLoraSettings(config.get("projection_prng_key") or 0, sparse=sparse)
        claims.updates.append(self.update(module, context, family=family, factors=factors, settings=settings))

    def scaling_of(self, config: Config, module: Module) -> float:
        return float(config["randlora_alpha"] / config["r"])

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        rank, small, large = update.rank, min(shape), max(shape)
        bases = math.ceil(small / rank)
        where = f"with r = {rank} in adapter_config.json, for {update.module} {list(shape)}"
        problems = all_misshaped(update, {"lambda": (rank, bases), "gamma": (bases, small)}, where)
        if problems or not update.has("A"):
            return problems
        a, b = update.factor("A"), update.factor("B")
        if len(a.shape) != 3 or a.shape[:2] != (rank, 1) or a.shape[2] < small:
            problems.append(f"{a.name} is {list(a.shape)}; expected [{rank}, 1, {small}] or wider, {where}")
        if len(b.shape) != 3 or b.shape[2] != rank or b.shape[0] < large or b.shape[1] < bases:
            problems.append(f"{b.name} is {list(b.shape)}; expected [{large}, {bases}, {rank}] or larger, {where}")
        return problems

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        tall = update.rows >= update.columns
        out = scratch if tall else scratch.T
        first, second = (window.rows, window.columns) if tall else (window.columns, window.rows)
        scales, weights = factors.whole("lambda"), factors.whole("gamma")
        bases = scales.shape[1]
        for rows, large in parts_of(first):
            left = self.large(factors, update, large)[:, :bases].flatten(1)
            for columns, small in slabs(second, left.shape[1]):
                part = self.small(factors, update)[:, :, small.start : small.stop]
                right = scales[:, :, None] * part * weights[None, :, small.start : small.stop]
                out[rows, columns] = torch.mm(left, right.flatten(0, 1))
        add_scaled(tile, scratch, update.scaling)

    def small(self, factors: Factors, update: Update) -> Tensor:
        """A."""
        return factors.whole("A")

    def large(self, factors: Factors, update: Update, rows: RowRange) -> Tensor:
        """Rows of B."""
        return factors.rows("B", rows)

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        ref = update.factor("B")
        row = ref.shape[1] * ref.shape[2]
        whole = ref.nbytes if ref.strides is not None else 0
        return whole + _working_bytes(update, itemsize, row) + 2 * PART_ROWS * row * DTYPE_BITS[ref.dtype] // 8


class RandLoraSeeded(RandLora):
    """The same with A and B drawn from the seed."""

    name = "randlora-seeded"
    builds = True
    streamed = frozenset()

    def small(self, factors: Factors, update: Update) -> Tensor:
        numbers = factors.whole("lambda")
        return factors.kept("A", lambda: rounded(_draw(update, with_large=False).float(), update).to(numbers))

    def large(self, factors: Factors, update: Update, rows: RowRange) -> Tensor:
        drawn = factors.kept("B", lambda: _draw(update, with_large=True))[rows.start : rows.stop]
        return rounded(drawn.float(), update).to(factors.whole("lambda"))

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        of, sizes = RandLoraSettings.of(update), RandLoraSettings.of(update).sizes
        large, small = max(sizes), min(sizes)
        row = math.ceil(small / update.rank) * update.rank
        # Sparse numbers are drawn, masked and made, for a moment all at once.
        number = 12 if of.sparse else 2
        smaller = update.rank * small * (itemsize + 12)
        return large * row * number + smaller + _working_bytes(update, itemsize, row) + 3 * 4 * PART_ROWS * row


def _working_bytes(update: Update, itemsize: int, row: int) -> int:
    """Bytes of rows of B, columns of A' and its factors, and their product."""
    inner = max(1, math.ceil(min(update.rows, update.columns) / update.rank) * update.rank)
    slab = slab_elements(inner)
    return (2 * PART_ROWS * row + 2 * slab + 2 * PART_ROWS * slab // inner) * itemsize


def _draw(update: Update, *, with_large: bool) -> Tensor:
    """A, or B, which is drawn after A."""
    rank, of = update.rank, RandLoraSettings.of(update)
    sizes, sparse = of.sizes, of.sparse
    small, large = min(sizes), max(sizes)
    bases = math.ceil(small / rank)
    generator = torch.Generator().manual_seed(of.seed)
    if sparse:
        sparsity = math.sqrt(small) if sparse == "very" else 3
        numbers = torch.rand((rank, 1, small), generator=generator)
        if with_large:
            numbers = torch.rand((large, bases, rank), generator=generator)
        signs = (numbers > 1 - 1 / (2 * sparsity)).float()
        signs.masked_fill_(numbers < 1 / (2 * sparsity), -1)
        return signs.div_(signs.std())

    def even(*shape: int) -> Tensor:
        empty = torch.empty(shape, dtype=torch.bfloat16)
        return torch.nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)

    numbers = even(rank, 1, small)
    if with_large:
        numbers = torch.empty((large, bases, rank), dtype=torch.bfloat16)
        for base in range(bases):
            numbers[:, base : base + 1] = even(large, 1, rank)
    return numbers.div_(numbers.std())
