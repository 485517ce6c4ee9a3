"""DEFT: W' = W + Q (s · R − P⁺ᵀ W): W is replaced by R in a subspace of the outputs.

W is (out, in), P (out, r), R (r, in). With ``decomposition_method: relu`` Q is P and P⁺ is P without its negative
numbers; with ``qr`` both are the orthonormal Q of P's QR decomposition. s = α / r, or 1 without α. With ``para``
there is no R. Source: peft/tuners/deft/layer.py, 0.21.

P⁺ᵀ W needs all rows, so a first pass adds it up; that and the rest is computed in float64, and rounded once. PEFT
sums in float32, and on a 16-bit base rounds the update before it adds it, so bits can differ.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.checks import FLAG, OPTIONAL_NUMBER, RANK, Config, one_of
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily, contradiction
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, all_misshaped
from shardmerge.adapters.methods.factored import TwoPass
from shardmerge.spec.tensors import RowRange
from shardmerge.spec.updates import Settings, Update


@dataclass(frozen=True, slots=True)
class DeftSettings(Settings):
    """α, and whether P is replaced by its QR decomposition."""

    alpha: float | None
    orthogonal: bool


class Deft(TwoPass, PeftFamily):
    name = "deft"
    sides = ("P", "R")
    mixes_weight = True  # B Q looks at whole columns of W
    peft_type = "DEFT"
    title = "DEFT"
    updates = "Linear layers"
    roles = {"deft_P": "P", "deft_R": "R?"}
    settings = {
        "r": RANK,
        "alpha": OPTIONAL_NUMBER,
        "para": FLAG,
        "decomposition_method": one_of("relu", "qr"),
    }
    inert = frozenset({"deft_dropout", "init_scale", "init_weights"})

    def settings_of(self, config: Config, module: Module) -> Settings:
        return DeftSettings(config.get("alpha"), config.get("decomposition_method") == "qr")

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        if problem := contradiction(self.roles, module, "R", "para: false", not context.config.get("para")):
            claims.reject(module.refs, problem)
        else:
            claims.updates.append(self.update(module, context))

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        rank = min(update.rank, shape[0])
        return all_misshaped(
            update, {"P": (shape[0], rank), "R": (rank, shape[1])}, "(out, r) or (r, in), r at most out"
        )

    def inner(self, update: Update) -> int:
        return update.factor("P").shape[1]

    def view(self, factors: Factors, update: Update, rows: RowRange) -> Tensor:
        part = self.left(factors, update, rows)
        return part.t() if DeftSettings.of(update).orthogonal else part.relu().t()

    def left(self, factors: Factors, update: Update, rows: RowRange) -> Tensor:
        def basis() -> Tensor:
            q: Tensor = torch.linalg.qr(factors.whole("P").double())[0]
            return q

        left = factors.kept("Q", basis) if DeftSettings.of(update).orthogonal else factors.whole("P")
        return left[rows.start : rows.stop]

    def made(self, seen: Tensor, factors: Factors, update: Update, columns: RowRange) -> Tensor:
        if not update.has("R"):
            return seen.neg()
        alpha, rest = DeftSettings.of(update).alpha, factors.whole("R")[:, columns.start : columns.stop]
        return rest.double() * (alpha / self.inner(update) if alpha else 1.0) - seen

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        # Q, and P in float64 on its way to it.
        return super().kept_bytes(update, itemsize) + 5 * 8 * update.rows * self.inner(update)
