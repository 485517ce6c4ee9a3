"""LoRA on Linear layers: W' = W + s · B A.

A is (r, in), B is (out, r), W is (out, in); s = α / r, or α / √r with rsLoRA.
LoRA: Hu et al. 2021, arXiv:2106.09685. rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.

The scale is applied after the product and the sum is made in the compute dtype, so the result is rounded once. That is
what PEFT's default ``merge_and_unload`` computes, bit for bit. Scaling a factor first, or a fused multiply-add, would
round differently.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from shardmerge.adapters.base import Factors, Family, ModuleUpdate
from shardmerge.spec import FACTOR_DTYPES, FLOAT_DTYPES, RowRange, TensorRef, Update

if TYPE_CHECKING:
    from torch import Tensor


class LoraLinear(Family):
    """W + s · B A, by rows."""

    name: ClassVar[str] = "lora"
    whole_factors: ClassVar[frozenset[str]] = frozenset({"A"})
    zero_means_nothing: ClassVar[frozenset[str]] = frozenset({"B"})

    def check(self, update: ModuleUpdate, weight: TensorRef) -> list[str]:
        a, b = (dict(update.factors)[role] for role in ("A", "B"))
        target = f"{weight.name}, {list(weight.shape)}"
        for factor in (a, b):
            if factor.dtype not in FACTOR_DTYPES:
                return [f"{factor.name} is stored as {factor.dtype}; factors are F64, F32, F16 or BF16"]
        if weight.dtype not in FLOAT_DTYPES:
            return [
                f"{update.module}: its weight {target} is stored as {weight.dtype}; only F32, F16 and BF16 weights can "
                "be merged into, so a quantised base must be dequantised first"
            ]
        if len(weight.shape) != 2:
            return [f"{update.module}: its weight {target} is no matrix; only Linear layers are supported yet"]
        if (b.shape[0], a.shape[1]) != weight.shape:
            return [
                f"{update.module}: the update is ({b.shape[0]}, {a.shape[1]}) from {a.name} and {b.name}, "
                f"but the weight {target} is ({weight.shape[0]}, {weight.shape[1]})"
            ]
        return []

    def apply(self, tile: Tensor, factors: Factors, update: Update, rows: RowRange, scratch: Tensor) -> None:
        import torch

        torch.mm(factors.rows("B", rows), factors.whole("A"), out=scratch)
        # Two steps on purpose: add_(alpha=s) would fuse multiply and add, and skip a rounding that PEFT does.
        tile.add_(scratch.mul_(update.scaling))
