"""LoKr: W' = W + s · w1 ⊗ w2, Kronecker's product; s = α / r.

W is (out, in), or of a convolution (out, in / groups, k…), kernels flattened; out = a · b and in = c · d. w1 is
(a, c), w2 (b, d · k…): row o, column (i, k…) of the product is w1[o div b, i div d] · w2[o mod b, (i mod d, k…)].
Either factor may be whole or itself a product, w1 = w1_a w1_b (``decompose_both``), w2 = w2_a w2_b, of inner
dimension r; and that of a convolution may (``use_effective_conv2d``) be Tucker's, w2[o, i, k…] = Σ_u Σ_v w2_a[u, o]
w2_b[v, i] t2[u, v, k…].
Yeh et al. 2023, arXiv:2309.14859. Source: peft/tuners/lokr/layer.py, 0.21.

On a convolution of one dimension whose w2 is whole, (b, d, k), PEFT multiplies a matrix with a tensor of three
dimensions, in its forward as in its merge: there row o is made of w1[o mod a] and w2[o div a], and its columns of
(d, c, k), not (c, d, k); and so it is here, unless the setting ``kronecker`` says otherwise. The bits are those of
PEFT's merge.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.peft_method import Context, Module
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, add_scaled, misshaped, slab_elements, slabs
from shardmerge.adapters.methods.loha import LycorisFamily
from shardmerge.spec.tensors import KEPT_WHOLE_BYTES, RowRange
from shardmerge.spec.updates import Settings, Update, Window

#: The fewest rows of w2_a w2_b with the bits of the whole.
_LEAST_ROWS = 16


@dataclass(frozen=True, slots=True)
class LokrSettings(Settings):
    """Whether the update is Kronecker's product on convolutions of one dimension, too."""

    kronecker: bool = False


class Lokr(LycorisFamily):
    name = "lokr"
    builds = True
    neutral_if_zero = frozenset({"w1", "w1_a"})
    peft_type = "LOKR"
    title = "LoKr"
    paper = "arXiv:2309.14859"
    roles = {
        "lokr_w1": "w1?",
        "lokr_w1_a": "w1_a?",
        "lokr_w1_b": "w1_b?",
        "lokr_w2": "w2?",
        "lokr_w2_a": "w2_a?",
        "lokr_w2_b": "w2_b?",
        "lokr_t2": "t2?",
    }
    inert = LycorisFamily.inert | {"decompose_both", "decompose_factor"}

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        found = module.factors
        for whole in ("w1", "w2"):
            parts = [role for role in (f"{whole}_a", f"{whole}_b", "t2"[: 2 * (whole == "w2")]) if role in found]
            if whole in found and parts:
                claims.reject(module.refs, f"{found[whole].name} is there beside {found[parts[0]].name}; one must be")
            elif whole not in found and (missing := sorted({f"{whole}_a", f"{whole}_b"} - found.keys())):
                role = missing[0] if len(missing) == 1 else whole
                claims.half(found[parts[0]] if parts else module.first, module.key(f"lokr_{role}"), module.refs)
            else:
                continue
            return
        update = self.update(module, context, settings=LokrSettings())
        claims.updates.append(update)
        if problems := _misfits(update):
            claims.misfit(problems[0])

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        a, c, b, rest = _sizes(update)
        made, columns = (a * b, c * rest), math.prod(shape[1:])
        problems = [
            f"{update.module}: its factors make an update of {list(made)}, but {update.module}.{update.parameter} is "
            f"{list(shape)}"
        ]
        if len(shape) < 2 or made != (shape[0], columns):
            return problems
        kernel = shape[2:]
        if not update.has("w2_a"):
            ref = update.factor("w2")
            return misshaped(ref, (*ref.shape[:2], *kernel), f"with the kernel of {update.module} {list(shape)}")
        if update.has("t2"):
            ref = update.factor("t2")
            wanted = (*ref.shape[:2], *(*kernel, 1, 1)[:2])
            return misshaped(ref, wanted, f"with the kernel of {update.module} {list(shape)}")
        return problems if rest % math.prod(kernel) else []

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        def made() -> Tensor:
            return factors.whole("w1") if update.has("w1") else torch.mm(factors.whole("w1_a"), factors.whole("w1_b"))

        first = factors.kept("w1", made)
        a, c, b, rest = _sizes(update)
        mixed = len(update.shape) == 3 and update.has("w2") and not LokrSettings.of(update).kronecker
        for part in _parts(window.rows, update):
            out = scratch[part.start - window.rows.start : part.stop - window.rows.start]
            rows = torch.arange(part.start, part.stop, device=tile.device)
            if mixed:
                # Columns are (d, c, k), with dimensions of both factors.
                kernel = update.shape[2]
                ours, theirs = first[rows % a].view(-1, 1, c, 1), factors.whole("w2")[rows // a].unsqueeze(2)
                torch.mul(ours, theirs, out=out.view(len(rows), rest // kernel, c, kernel))
            else:
                second, start = _second(factors, update, part)
                ours, theirs = first[rows // b].unsqueeze(2), second[rows % b - start].unsqueeze(1)
                torch.mul(ours, theirs, out=out.view(len(rows), c, rest))
        add_scaled(tile, scratch, update.scaling)

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        a, c, b, rest = _sizes(update)
        slab = slab_elements(update.columns)
        second = b * rest
        if update.has("t2"):
            second = 3 * second + update.rank * second // max(1, update.factor("w2_b").shape[1])
        elif _is_large(update):
            second = slab + _LEAST_ROWS * rest
        rows_and_columns = 6 * 8 * max(1, slab // max(1, update.columns))
        return (a * c + second + 2 * slab) * itemsize + rows_and_columns


def _second(factors: Factors, update: Update, rows: RowRange) -> tuple[Tensor, int]:
    """The rows of w2, kernels flattened, that rows of W need, and the number of the first."""

    def tucker() -> Tensor:
        core, outputs, inputs = (factors.whole(role) for role in ("t2", "w2_a", "w2_b"))
        return torch.einsum("u v k l, u o, v i -> o i k l", core, outputs, inputs).flatten(1)

    if update.has("w2"):
        return factors.whole("w2").flatten(1), 0
    if update.has("t2"):
        return factors.kept("w2", tucker), 0
    if not _is_large(update):
        return factors.kept("w2", lambda: torch.mm(factors.whole("w2_a"), factors.whole("w2_b"))), 0
    b = update.factor("w2_a").shape[0]
    start = max(0, min(rows.start % b, b - _LEAST_ROWS))
    stop = max(rows.start % b + len(rows), min(b, start + _LEAST_ROWS))
    return torch.mm(factors.whole("w2_a")[start:stop], factors.whole("w2_b")), start


def _is_large(update: Update) -> bool:
    """Whether w2 = w2_a w2_b, as large as W for a ``decompose_factor`` of 1, is made row by row."""
    return not update.has("w2") and not update.has("t2") and math.prod(_sizes(update)[2:]) * 4 > KEPT_WHOLE_BYTES


def _parts(rows: RowRange, update: Update) -> Iterator[RowRange]:
    """Slabs; if w2 is large, slabs whose rows of it are adjacent."""
    b = _sizes(update)[2]
    for _, slab in slabs(rows, update.columns):
        start = slab.start
        while start < slab.stop:
            stop = min(slab.stop, start - start % b + b) if _is_large(update) else slab.stop
            yield RowRange(start, stop)
            start = stop


def _misfits(update: ModuleUpdate) -> list[str]:
    """Why the factors do not fit each other."""
    rank, roles = update.rank, {"w1": 2, "w2": 0, "t2": 4}
    problems = []
    for role, ref in update.factors:
        shape = list(ref.shape)
        dims = roles.get(role, 2) or max(2, min(5, len(shape)))
        if len(shape) != dims:
            problems.append(f"{ref.name} is {shape}; expected {dims} dimensions")
    if problems:
        return problems
    tucker = update.has("t2")
    ranks = {"w1_a": (1,), "w1_b": (0,), "w2_a": (0 if tucker else 1,), "w2_b": (0,), "t2": (0, 1)}
    for role, ref in update.factors:
        for axis in ranks.get(role, ()):
            if ref.shape[axis] != rank:
                problems.append(
                    f"{ref.name} {list(ref.shape)} has rank {ref.shape[axis]}, but adapter_config.json says {rank} for "
                    f"{update.module} (r and rank_pattern)"
                )
    return problems


def _sizes(update: ModuleUpdate | Update) -> tuple[int, int, int, int]:
    """a, c, b and d · k…."""
    a, c = (
        update.factor("w1").shape
        if update.has("w1")
        else (update.factor("w1_a").shape[0], update.factor("w1_b").shape[1])
    )
    if update.has("w2"):
        ref = update.factor("w2")
        return a, c, ref.shape[0], math.prod(ref.shape[1:])
    two_a, two_b = update.factor("w2_a"), update.factor("w2_b")
    if update.has("t2"):
        return a, c, two_a.shape[1], two_b.shape[1] * math.prod(update.factor("t2").shape[2:])
    return a, c, two_a.shape[0], two_b.shape[1]
