"""KaSA: W' = T(W) + s · B diag(d) A, T(W) being W without its r smallest singular values.

W is (out, in), A (r, in), B (out, r), d (r); s as for LoRA. T(W) is not in the file: W is decomposed again in float32,
W = U S V, the products of the min(out, in) − r largest singular values with their vectors are added up again, and the
sum is rounded to W's dtype, as PEFT rounds it whenever it loads the adapter. r must be below min(out, in).
Wang et al. 2024, arXiv:2412.06071. Source: KasaLinearVariant in peft/tuners/lora/variants.py, 0.21.

All of W is decomposed, which takes a multiple of its memory. T(W) does not depend on the signs that singular vectors
happen to have. In float32 the bits are those of PEFT's merge; on a 16-bit base PEFT rounds the update before it adds
it, we round once.
"""

from __future__ import annotations

from shardmerge.adapters.claims import ModuleUpdate
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, add_scaled, misshaped
from shardmerge.adapters.methods.lora import Lora
from shardmerge.adapters.methods.osf import stored_dtype, svd_bytes
from shardmerge.spec.tensors import Orientation
from shardmerge.spec.updates import Update, Window


class Kasa(Lora):
    """LoRA on T(W)."""

    name = "kasa"
    builds = True
    mixes_weight = True  # W is cut
    by_columns = frozenset()
    neutral_if_zero = frozenset()
    by_column_windows = False
    rows_are_independent = False
    adds = False
    stacks_vectors = False
    #: As for OSF, but W itself is rounded: the larger entries of a row move by a whole unit.
    sum_units = 4096

    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        if len(shape) != 2 or update.parameter != "weight" or update.orientation is Orientation.TRANSPOSED:
            return [f"{update.module}.{update.parameter} is {list(shape)}; KaSA updates Linear layers only"]
        if update.rank >= min(shape):
            return [
                f"{update.module}: r is {update.rank}, but KaSA cuts r singular values from {list(shape)} and must "
                "leave one"
            ]
        meaning = f"a number for each of r = {update.rank}"
        return [*misshaped(update.factor("diagonal"), (update.rank,), meaning), *super().check(update, shape)]

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        cut = factors.kept("cut", lambda: _cut(factors.whole("W"), update))
        tile.copy_(cut[window.rows.start : window.rows.stop])
        left = self.b(factors, update, window.rows) * factors.whole("diagonal")
        torch.mm(left, factors.whole("A"), out=scratch)
        add_scaled(tile, scratch, update.scaling)

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        # U S; T(W), in three dtypes for a moment; rows of B diag(d).
        elements = update.rows * update.columns
        left = update.rows * min(update.rows, update.columns)
        return svd_bytes(update) + 4 * left + elements * (4 + 2 + itemsize) + update.rows * update.rank * itemsize


def _cut(weight: Tensor, update: Update) -> Tensor:
    """T(W), (out, in)."""
    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    kept = len(s) - update.rank
    cut: Tensor = (u[:, :kept] * s[:kept]) @ v[:kept]
    return cut.to(stored_dtype(update)).to(weight.dtype)
