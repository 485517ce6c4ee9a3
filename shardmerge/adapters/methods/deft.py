"""DEFT: W' = W + Q (s · R − P⁺ᵀ W): what W does in a subspace of the outputs is taken out, and R put in its place.

W is (out, in), P (out, r), R (r, in). With ``decomposition_method: relu`` Q is P and P⁺ is P without its negative
numbers; with ``qr`` both are the orthonormal Q of P's QR decomposition. s = α / r, or 1 without α. With ``para``
there is no R. Source: peft/tuners/deft/layer.py, 0.21.

P⁺ᵀ W needs all rows, so a first pass adds it up; that and the rest is computed in float64, and rounded once. PEFT
sums in float32, and on a 16-bit base rounds the update before it adds it, so bits can differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from shardmerge.adapters.formats.peft import FLAG, OPTIONAL_NUMBER, RANK, Check, Context, Module, PeftMethod, checked
from shardmerge.adapters.methods.base import Claims, Factors, ModuleUpdate, misshaped, oriented
from shardmerge.adapters.methods.factored import Surveyed
from shardmerge.spec.tensors import RowRange
from shardmerge.spec.updates import Parameter, Update

if TYPE_CHECKING:
    from torch import Tensor


class Deft(Surveyed, PeftMethod):
    """``peft_type: DEFT``, and what it does to a matrix."""

    name: ClassVar[str] = "deft"
    peft_type: ClassVar[str] = "DEFT"
    title: ClassVar[str] = "DEFT"
    paper: ClassVar[str] = ""
    roles: ClassVar[Mapping[str, str]] = {"deft_P": "P", "deft_R": "R?"}
    settings: ClassVar[Mapping[str, Check]] = {
        "r": RANK,
        "alpha": OPTIONAL_NUMBER,
        "para": FLAG,
        "decomposition_method": checked(lambda value: value in ("relu", "qr"), "relu or qr"),
    }
    inert: ClassVar[frozenset[str]] = frozenset({"deft_dropout", "init_scale", "init_weights"})

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        config, there = context.config, module.factors
        if ("R" in there) == bool(config.get("para")):
            says = "says para, so PEFT would ignore it" if "R" in there else "does not say para"
            what = there["R"].name if "R" in there else f"{module.key('deft_R')} is missing, and it"
            claims.problems.append(f"{what}: adapter_config.json {says}")
            claims.told |= {ref.name for ref in there.values()}
            return
        settings = (
            ("alpha", config.get("alpha")),
            ("orthogonal", config.get("decomposition_method") == "qr"),
            ("fan_in_fan_out", bool(config.get("fan_in_fan_out"))),
        )
        factors = tuple(there.items())
        claims.updates.append(
            ModuleUpdate(module.name, "weight", self.name, factors, rank=config["r"], settings=settings)
        )

    def orient(self, update: ModuleUpdate, parameter: Parameter) -> ModuleUpdate | str:
        columns = update.factor("R").shape[-1] if update.has("R") else None
        return oriented(update, parameter, (*update.factor("P").shape, 0)[0], columns)

    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        if len(shape) != 2:
            return [f"{update.module}.{update.parameter} is {list(shape)}; DEFT updates Linear layers"]
        rank = min(update.rank, shape[0])
        problems = misshaped(update.factor("P"), (shape[0], rank), "(out, r), r at most out")
        if update.has("R"):
            problems += misshaped(update.factor("R"), (rank, shape[1]), "(r, in)")
        return problems

    def inner(self, update: Update) -> int:
        return update.factor("P").shape[1]

    def view(self, factors: Factors, update: Update, rows: RowRange) -> Tensor:
        part = self.left(factors, update, rows)
        return part.t() if update.setting("orthogonal") else part.relu().t()

    def left(self, factors: Factors, update: Update, rows: RowRange) -> Tensor:
        import torch

        def basis() -> Tensor:
            q: Tensor = torch.linalg.qr(factors.whole("P").double())[0]
            return q

        left = factors.kept("Q", basis) if update.setting("orthogonal") else factors.whole("P")
        return left[rows.start : rows.stop]

    def made(self, seen: Tensor, factors: Factors, update: Update, columns: RowRange) -> Tensor:
        if not update.has("R"):
            return seen.neg()
        alpha, rest = update.setting("alpha"), factors.whole("R")[:, columns.start : columns.stop]
        return rest.double() * (alpha / self.inner(update) if alpha else 1.0) - seen

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        # Q, and P in float64 on its way to it.
        return super().kept_bytes(update, itemsize) + 5 * 8 * update.rows * self.inner(update)
