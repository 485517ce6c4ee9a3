"""Super-Tuning: W' = W + S, S sparse; as a hybrid ("Supra") W' = W + S + (α / r) · B A.

W is (out, in). S has the file's ``values`` (n) at its ``indices`` (n) into W's elements row by row, and zeros
elsewhere; A is (r, in) and B (out, r). arXiv:2607.09287. Source: peft/tuners/supertuning/layer.py, 0.21.

Without ``save_precomputed_indices`` the positions are those of W's largest elements, among which equal ones are many on
a 16-bit base, and PEFT's choice depends on where it runs. Such adapters are refused. In float32 the bits are those of
PEFT's merge. On a 16-bit base PEFT rounds the values, and B A too; we round once.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.checks import OPTIONAL_NUMBER, checked, is_number, is_rank
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily, contradiction
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, all_misshaped, check_indices
from shardmerge.spec.updates import Settings, Update, Window


@dataclass(frozen=True, slots=True)
class SuperTuningSettings(Settings):
    """The share of W's elements that stay, and α / r."""

    sparsity: float
    lora: float


class SuperTuning(PeftFamily):
    name = "supertuning"
    builds = True
    by_rows = frozenset({"B"})
    whole_numbers = frozenset({"indices"})
    neutral_if_zero = frozenset({"values", "B"})
    adds = True
    peft_type = "SUPERTUNING"
    selectors = frozenset()
    title = "Super-Tuning"
    updates = "Linear layers"
    paper = "arXiv:2607.09287"
    roles = {
        "supertuning_values": "values",
        "supertuning_indices": "indices?",
        "supertuning_lora_A.weight": "A?",
        "supertuning_lora_B.weight": "B?",
    }
    settings = {
        "sparsity": checked(lambda value: is_number(value) and 0 <= value < 1, "from 0 to below 1", required=True),
        "r": checked(is_rank, "a whole number above zero, or null"),
        "lora_alpha": OPTIONAL_NUMBER,
    }
    inert = frozenset({"init_weights", "lora_dropout", "save_precomputed_indices", "select_top"})

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        rank, there = context.config.get("r"), module.factors
        if "indices" not in there:
            missing = module.key("supertuning_indices")
            claims.half(there["values"], f"{missing}; save it again with save_precomputed_indices: true", module.refs)
            return
        for role in ("A", "B"):
            if problem := contradiction(self.roles, module, role, "r", rank is not None):
                claims.reject(module.refs, problem)
                return
        alpha = context.config.get("lora_alpha")
        hybrid = 0.0 if rank is None else (2 * rank if alpha is None else alpha) / rank
        settings = SuperTuningSettings(context.config["sparsity"], hybrid)
        claims.updates.append(self.update(module, context, rank=rank or 0, settings=settings))

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        sparsity = SuperTuningSettings.of(update).sparsity
        count = (int(shape[0] * shape[1] * (1 - sparsity)),)
        meaning = f"as sparsity {sparsity} of {shape[0]} × {shape[1]} elements makes it"
        problems = all_misshaped(update, {"values": count, "indices": count}, meaning)
        expected = {"A": (update.rank, shape[1]), "B": (shape[0], update.rank)}
        return [*problems, *all_misshaped(update, expected, "(r, in) or (out, r)")]

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        order = factors.kept("order", lambda: _order(factors, update))
        bounds = torch.tensor([window.rows.start, window.rows.stop], device=order.device) * update.columns
        indices = factors.whole("indices")
        first, last = torch.searchsorted(indices, bounds, sorter=order).tolist()
        here = order[first:last]
        values = factors.whole("values")[here]
        tile.view(-1).scatter_add_(0, indices[here] - bounds[0], values * update.scaling)
        if update.rank:
            torch.mm(factors.rows("B", window.rows), factors.whole("A"), out=scratch)
            tile.add_(scratch.mul_(SuperTuningSettings.of(update).lora * update.scaling))

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        # The order, with the sorted indices and two masks while it is made; and a tile's part.
        return update.factor("indices").shape[0] * (5 * 8 + 2 * itemsize)


def _order(factors: Factors, update: Update) -> Tensor:
    """The order that sorts the indices."""
    indices = factors.whole("indices")
    check_indices(update, "indices", indices, update.rows * update.columns)
    return indices.argsort(stable=True)
