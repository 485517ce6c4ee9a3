"""LoHa: W' = W + s · (w1a w1b) ∘ (w2a w2b), two products of low rank multiplied element by element; s = α / r.

W is (out, in), or of a convolution (out, in / groups, k…), kernels flattened; w1a, w2a are (out, r), w1b, w2b
(r, in · k…). A convolution of more than one point may (``use_effective_conv2d``) be decomposed by Tucker instead:
then w1a, w2a are (r, out), w1b, w2b (r, in), and t1, t2 (r, r, k…), of one dimension (r, r, k, 1); either product
becomes P[o, i, k…] = Σ_u Σ_v w_a[u, o] w_b[v, i] t[u, v, k…].
Hyeon-Woo et al. 2021, arXiv:2108.06098; Yeh et al. 2023, arXiv:2309.14859. Source: peft/tuners/loha/layer.py, 0.21.

The bits are those of PEFT's merge, with one exception: where opt_einsum is installed, torch may add up Tucker's sums
in another order for PEFT than it does for us.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.checks import (
    FLAG,
    NUMBER,
    NUMBER_PATTERN,
    RANK,
    RANK_PATTERN,
    Check,
    Config,
    pattern_value,
    rank_of,
)
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, add_scaled, misshaped, slab_elements, slabs
from shardmerge.adapters.tables import register
from shardmerge.spec.tensors import RowRange
from shardmerge.spec.updates import Update, Window

#: What LyCORIS' two methods have in common.
LYCORIS_SETTINGS: Mapping[str, Check] = {
    "r": RANK,
    "alpha": NUMBER,
    "rank_pattern": RANK_PATTERN,
    "alpha_pattern": NUMBER_PATTERN,
    "use_effective_conv2d": FLAG,
}
LYCORIS_INERT = frozenset({"init_weights", "module_dropout", "rank_dropout", "rank_dropout_scale"})


def rank_and_scaling(config: Config, module: str) -> tuple[int, float]:
    """r and s = α / r of a module."""
    rank = rank_of(config, module)
    alpha: float = pattern_value(config.get("alpha_pattern"), module, config["alpha"])
    return rank, alpha / rank


@register
class Loha(PeftFamily):
    """``peft_type: LOHA``, and what it does to a matrix."""

    name = "loha"
    by_rows = frozenset({"w1_a", "w2_a"})
    neutral_if_zero = frozenset({"w2_b"})
    rows_are_independent = True
    adds = True
    peft_type = "LOHA"
    title = "LoHa"
    paper = "arXiv:2108.06098"
    roles = {
        "hada_w1_a": "w1_a",
        "hada_w1_b": "w1_b",
        "hada_w2_a": "w2_a",
        "hada_w2_b": "w2_b",
        "hada_t1": "t1?",
        "hada_t2": "t2?",
    }
    settings = LYCORIS_SETTINGS
    inert = LYCORIS_INERT

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        found = module.factors
        if ("t1" in found) != ("t2" in found):
            there, missing = ("t1", "t2") if "t1" in found else ("t2", "t1")
            claims.half(found[there], module.key(f"hada_{missing}"), module.refs)
            return
        rank, scaling = rank_and_scaling(context.config, module.name)
        family = LohaTucker.name if "t1" in found else self.name
        claims.updates.append(self.update(module, context, family=family, scaling=scaling, rank=rank))

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        if len(shape) < 2:
            return [f"{update.module}.{update.parameter}, {list(shape)} is no matrix, so LoHa cannot update it"]
        rank, columns = update.rank, math.prod(shape[1:])
        return [
            problem
            for role, expected, meaning in (
                ("w1_a", (shape[0], rank), "(out, r)"),
                ("w1_b", (rank, columns), "(r, in · k…)"),
                ("w2_a", (shape[0], rank), "(out, r)"),
                ("w2_b", (rank, columns), "(r, in · k…)"),
            )
            for problem in misshaped(update.factor(role), expected, f"{meaning} of {update.module} {list(shape)}")
        ]

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        for part in slabs(window.rows, update.columns):
            out = scratch[part.start - window.rows.start : part.stop - window.rows.start]
            self.multiply("1", factors, part, out)
            out.mul_(self.multiply("2", factors, part))
        add_scaled(tile, scratch, update.scaling)

    def weighs(self, config: Config) -> bool:
        return True

    def multiply(self, which: str, factors: Factors, rows: RowRange, out: Tensor | None = None) -> Tensor:
        """Rows of the first or the second of the products."""
        return torch.mm(factors.rows(f"w{which}_a", rows), factors.whole(f"w{which}_b"), out=out)

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        return slab_elements(update.columns) * itemsize


@register
class LohaTucker(Loha):
    """The same for a convolution with a core of its own."""

    name = "loha-tucker"
    by_rows = frozenset()
    rows_are_independent = False

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        if len(shape) not in (3, 4):
            return [
                f"{update.factor('t1').name} is for a convolution of one or two dimensions, but "
                f"{update.module}.{update.parameter} is {list(shape)}"
            ]
        rank = update.rank
        core = (rank, rank, *shape[2:], 1)[:4]
        expected = {"w_a": (rank, shape[0]), "w_b": (rank, shape[1]), "t": core}
        meanings = {"w_a": "(r, out)", "w_b": "(r, in)", "t": "(r, r, k…)"}
        return [
            problem
            for role, ref in update.factors
            for kind in [role.replace("1", "").replace("2", "")]
            for problem in misshaped(ref, expected[kind], f"{meanings[kind]} of {update.module} {list(shape)}")
        ]

    def multiply(self, which: str, factors: Factors, rows: RowRange, out: Tensor | None = None) -> Tensor:
        def build() -> Tensor:
            # In this order of dimensions, and multiplied from this side, the bits are those of PEFT's one einsum.
            core, inputs = factors.whole(f"t{which}"), factors.whole(f"w{which}_b")
            return torch.einsum("u v k l, v i -> i k l u", core, inputs).reshape(-1, len(core))

        core = factors.kept(f"core{which}", build)
        product = torch.mm(core, factors.whole(f"w{which}_a")[:, rows.start : rows.stop]).T
        return product if out is None else out.copy_(product)

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        # Both cores and what the making of one takes, and a slab of either product.
        return (4 * update.rank * update.columns + 2 * slab_elements(update.columns)) * itemsize
