"""MiSS: W'[o, j] = W[o, j] + M[j mod r, o], the same few rows of numbers again and again along the inputs.

W is (out, in), M (r, out). ``init_weights`` is more than its name says. With ``mini`` M is (r, m), m = ``mini_r``, a
divisor of out, and M[j mod r, o mod m] is added. With ``bat`` M is (out / r, r, r), r divides in and out, and of
every r × r block of W, numbered (p, q), W'[p, q] = W[p, q] + W[p, q] M[p] + M[p].
Kang et al. 2024, arXiv:2409.15371. Source: peft/tuners/miss/layer.py, 0.21. The bits are those of PEFT's merge.

Older versions of PEFT (from 0.14) have plain MiSS and Bat as ``peft_type: BONE`` with factors ``bone_block``. The
formulas are the same, and PEFT's way of converting such an adapter is to rename both (scripts/convert-bone-to-miss.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.checks import RANK, checked, is_rank
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, misshaped, slab_elements, slabs
from shardmerge.spec.updates import Settings, Update, Window


@dataclass(frozen=True, slots=True)
class MissSettings(Settings):
    """m with ``mini``, else 0."""

    mini_r: int


class Miss(PeftFamily):
    name = "miss"
    neutral_if_zero = frozenset({"M"})
    adds = True
    peft_type = "MISS"
    title = "MiSS, Bat"
    updates = "matrices"
    paper = "arXiv:2409.15371"
    roles = {"miss_block": "M"}
    settings = {
        "r": RANK,
        "mini_r": checked(is_rank, "a whole number above zero"),
        "init_weights": checked(
            lambda value: isinstance(value, bool) or value in ("bat", "mini"), "true, false, 'bat' or 'mini'"
        ),
    }
    inert = frozenset({"miss_dropout"})

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        config, way = context.config, context.config.get("init_weights")
        settings = MissSettings((config.get("mini_r") or 1) if way == "mini" else 0)
        family = MissBat.name if way == "bat" else self.name
        claims.updates.append(self.update(module, context, family=family, settings=settings))

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        mini_r, rank, where = MissSettings.of(update).mini_r, update.rank, f"{update.module} {list(shape)}"
        width = mini_r or shape[0]
        if rank > shape[1] or shape[0] % width:
            return [f"r is {rank} and mini_r {mini_r}, which do not fit {where}"]
        return misshaped(
            update.factor("M"), (rank, width), f"by r, mini_r and init_weights in adapter_config.json, for {where}"
        )

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        numbers, rank = factors.whole("M"), update.rank
        whole = update.columns // rank * rank
        for part, these in slabs(window.rows, update.columns):
            rows = torch.arange(these.start, these.stop, device=tile.device) % numbers.shape[1]
            added = numbers[:, rows].T * update.scaling
            out = tile[part]
            out[:, :whole].view(len(rows), -1, rank).add_(added.unsqueeze(1))
            out[:, whole:].add_(added[:, : update.columns - whole])

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        slab = slab_elements(update.columns)
        return 2 * slab * itemsize + 2 * 8 * max(1, slab // max(1, update.columns))


class Bone(Miss):
    """``peft_type: BONE``, the former name of MiSS."""

    peft_type = "BONE"
    title = "Bone"
    roles = {"bone_block": "M"}
    settings = {
        "r": RANK,
        "init_weights": checked(lambda value: isinstance(value, bool) or value == "bat", "true, false or 'bat'"),
    }
    inert = frozenset()


class MissBat(Miss):
    """``init_weights: bat``."""

    name = "miss-bat"
    mixes_weight = True  # W times blocks
    adds = False

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        if shape[0] % update.rank or shape[1] % update.rank:
            what = f"{update.module}.{update.parameter} is {list(shape)}"
            return [f"{what}, which blocks of r = {update.rank} do not divide"]
        size = (shape[0] // update.rank, update.rank, update.rank)
        return misshaped(update.factor("M"), size, f"a block for every r = {update.rank} outputs of {update.module}")

    def row_unit(self, update: Update | ModuleUpdate) -> int:
        # Rows are independent, but a product of part of a block rounds differently.
        return update.rank

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        rank, blocks = update.rank, factors.whole("M")
        count = update.columns // rank
        for start in range(0, len(window.rows), rank):
            block = blocks[(window.rows.start + start) // rank]
            parts = tile[start : start + rank].view(rank, count, rank).transpose(0, 1)
            out = scratch[start : start + rank].view(count, rank, rank)
            torch.bmm(parts, block.expand(count, -1, -1), out=out)
            parts.add_(out.add_(block))

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        return 2 * update.rank * update.columns * itemsize
