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

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats import checks
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, add_scaled, all_misshaped, slab_elements, slabs
from shardmerge.spec.tensors import RowRange
from shardmerge.spec.updates import Update, Window


class LycorisFamily(PeftFamily):
    """LoHa and LoKr: s = α / r."""

    adds = True
    settings = {
        "r": checks.RANK,
        "alpha": checks.NUMBER,
        "rank_pattern": checks.RANK_PATTERN,
        "alpha_pattern": checks.NUMBER_PATTERN,
        "use_effective_conv2d": checks.FLAG,
    }
    inert = frozenset({"init_weights", "module_dropout", "rank_dropout", "rank_dropout_scale"})

    def scaling_of(self, config: checks.Config, module: Module) -> float:
        alpha: float = checks.pattern_value(config.get("alpha_pattern"), module.name, config["alpha"])
        return alpha / checks.rank_of(config, module.name)

    def weighs(self, config: checks.Config) -> bool:
        return True


class Loha(LycorisFamily):
    name = "loha"
    by_rows = frozenset({"w1_a", "w2_a"})
    neutral_if_zero = frozenset({"w2_b"})
    rows_are_independent = True
    peft_type = "LOHA"
    title = "LoHa"
    updates = "matrices and convolutions"
    dims = frozenset({2, 3, 4, 5})
    paper = "arXiv:2108.06098"
    roles = {
        "hada_w1_a": "w1_a",
        "hada_w1_b": "w1_b",
        "hada_w2_a": "w2_a",
        "hada_w2_b": "w2_b",
        "hada_t1": "t1?",
        "hada_t2": "t2?",
    }

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        found = module.factors
        if ("t1" in found) != ("t2" in found):
            there, missing = ("t1", "t2") if "t1" in found else ("t2", "t1")
            claims.half(found[there], module.key(f"hada_{missing}"), module.refs)
            return
        family = LohaTucker.name if "t1" in found else self.name
        claims.updates.append(self.update(module, context, family=family))

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        left, right = (shape[0], update.rank), (update.rank, math.prod(shape[1:]))
        expected = {"w1_a": left, "w1_b": right, "w2_a": left, "w2_b": right}
        return all_misshaped(update, expected, f"(out, r) or (r, in · k…) of {update.module} {list(shape)}")

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        for part, rows in slabs(window.rows, update.columns):
            self.multiply("1", factors, rows, scratch[part])
            scratch[part].mul_(self.multiply("2", factors, rows))
        add_scaled(tile, scratch, update.scaling)

    def multiply(self, which: str, factors: Factors, rows: RowRange, out: Tensor | None = None) -> Tensor:
        """Rows of the first or the second product."""
        return torch.mm(factors.rows(f"w{which}_a", rows), factors.whole(f"w{which}_b"), out=out)

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        return slab_elements(update.columns) * itemsize


class LohaTucker(Loha):
    """The same with Tucker's factors."""

    name = "loha-tucker"
    builds = True
    updates = "convolutions of one or two dimensions by Tucker's factors"
    dims = frozenset({3, 4})
    by_rows = frozenset()
    rows_are_independent = False

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        rank = update.rank
        a, b, core = (rank, shape[0]), (rank, shape[1]), (rank, rank, *shape[2:], 1)[:4]
        expected = {"w1_a": a, "w1_b": b, "t1": core, "w2_a": a, "w2_b": b, "t2": core}
        meaning = f"(r, out), (r, in) or (r, r, k…) of {update.module} {list(shape)}"
        return all_misshaped(update, expected, meaning)

    def multiply(self, which: str, factors: Factors, rows: RowRange, out: Tensor | None = None) -> Tensor:
        def build() -> Tensor:
            # This order of dimensions, multiplied from this side, has the bits of PEFT's one einsum.
            core, inputs = factors.whole(f"t{which}"), factors.whole(f"w{which}_b")
            return torch.einsum("u v k l, v i -> i k l u", core, inputs).reshape(-1, len(core))

        core = factors.kept(f"core{which}", build)
        product = torch.mm(core, factors.whole(f"w{which}_a")[:, rows.start : rows.stop]).T
        return product if out is None else out.copy_(product)

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        # Both cores, what one is made of, and a slab of either product.
        return (4 * update.rank * update.columns + 2 * slab_elements(update.columns)) * itemsize
