"""SHiRA: W'[i, j] = W[i, j] + v at a few positions (i, j), chosen before training.

W is (out, in), v (n), the positions (2, n) whole numbers, rows above columns; n = r (out + in). On Windows PEFT saves
the positions as floats. Where a position occurs twice, both numbers count.
Bhardwaj et al. 2024, arXiv:2406.13175. Source: peft/tuners/shira/layer.py and model.py, 0.21.
The bits are those of PEFT's merge.
"""

from __future__ import annotations

from shardmerge.adapters.claims import ModuleUpdate
from shardmerge.adapters.formats.checks import RANK
from shardmerge.adapters.formats.peft_method import PeftFamily
from shardmerge.adapters.lazy_torch import Tensor
from shardmerge.adapters.methods.base import Factors, all_misshaped, check_indices
from shardmerge.spec.updates import Update, Window


class Shira(PeftFamily):
    name = "shira"
    whole_numbers = frozenset({"indices"})
    neutral_if_zero = frozenset({"numbers"})
    by_column_windows = True
    adds = True
    peft_type = "SHIRA"
    selectors = frozenset()
    title = "SHiRA"
    updates = "matrices"
    paper = "arXiv:2406.13175"
    roles = {"shira_weight": "numbers", "shira_indices": "indices"}
    settings = {"r": RANK}
    inert = frozenset({"init_weights", "mask_type", "random_seed"})

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        count = update.rank * sum(shape)
        meaning = f"r (out + in) of {update.module} {list(shape)} with r = {update.rank} in adapter_config.json"
        return all_misshaped(update, {"numbers": (count,), "indices": (2, count)}, meaning)

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        rows, columns = factors.whole("indices").long()
        check_indices(update, "indices", rows, update.rows)
        check_indices(update, "indices", columns, update.columns)
        here = (rows >= window.rows.start) & (rows < window.rows.stop)
        here &= (columns >= window.columns.start) & (columns < window.columns.stop)
        chosen = rows[here] - window.rows.start, columns[here] - window.columns.start
        tile.index_put_(chosen, factors.whole("numbers")[here] * update.scaling, accumulate=True)

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        # The positions as whole numbers, masks, and the chosen numbers twice.
        return update.factor("numbers").shape[0] * (16 + 4 + 2 * (16 + itemsize))
