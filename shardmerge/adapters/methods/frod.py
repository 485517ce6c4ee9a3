"""FRoD: W' = U (S + diag(λ)) Vᵀ: W in a basis that modules of one kind share, with some of its entries trained.

W is (out, in). V (in, in) is in the file, one for all modules of a category, as are the positions (2, n) of S's
numbers; λ (in) and the n numbers are the module's own. U (out, in) is not in the file: its columns are those of W V⁻ᵀ
brought to length one, rounded to W's dtype. Source: peft/tuners/frod/layer.py and model.py, 0.21. AAAI 2026, doi
10.1609/aaai.v40i31.39813.

The lengths need all rows of W, so a first pass adds up their squares, in float64, in which PEFT computes U, too. In
float32 the bits are those of PEFT's merge where tiles do not divide W. Where it has fewer outputs than inputs some
columns of U are no more than the noise of rounding, brought to length one; there the last bits may depend on the
tiles. On a 16-bit base PEFT rounds every product; we round once.
"""

from __future__ import annotations

import re

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import PART_ROWS, Factors, all_misshaped, check_indices, parts_of
from shardmerge.adapters.methods.osf import stored_dtype
from shardmerge.spec.updates import Update, Window

_SHARED = re.compile(r"(?:base_model\.)?(?:model\.)?frod_(?P<what>V|s_indices|s_size)\.(?P<category>[^.]+)(?:\.[^.]+)?")
#: A column this short has no direction; PEFT's bound.
_SHORT = 1e-12


class Frod(PeftFamily):
    name = "frod"
    builds = True
    whole_numbers = frozenset({"indices"})
    streamed = frozenset({"W"})
    peft_type = "FROD"
    selectors = frozenset({"layers_to_transform", "layers_pattern"})
    title = "FRoD"
    updates = "Linear layers"
    mixes_weight = True  # W in another basis
    paper = "AAAI 2026, doi 10.1609/aaai.v40i31.39813"
    note = "makes a weight's whole update at once, in memory that grows with the weight"
    roles = {"frod_lambda_l": "diagonal", "frod_lambda_s_values": "values"}
    inert = frozenset(
        {
            *("frod_dropout", "init_weights", "progressbar", "projection_prng_key", "regularization_alpha"),
            *("runtime_offload_base_weight", "save_projection", "sparse_rate"),
        }
    )

    def _shared_role(self, name: str) -> str | None:
        match = _SHARED.fullmatch(name)
        return f"{match['what']} {match['category']}" if match else None

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        category = category_of(module.name)
        shared = [context.shared.get(f"{what} {category}") for what in ("V", "s_indices")]
        if shared[0] is None or shared[1] is None:
            what = (
                f"base_model.frod_V.{category} and frod_s_indices.{category}; save it again with save_projection: true"
            )
            claims.half(module.factors["diagonal"], what, module.refs)
            return
        factors = (*module.factors.items(), ("V", shared[0]), ("indices", shared[1]))
        # Of W itself only the dtype is needed beside the tile.
        claims.updates.append(self.update(module, context, factors=factors, of_base=(("W", "weight"),)))

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        values = update.factor("values")
        count = values.shape[:1]
        expected = {"V": (shape[1], shape[1]), "diagonal": (shape[1],), "values": count, "indices": (2, *count)}
        return all_misshaped(update, expected, f"of {update.module}, or as {values.name} has it")

    def needs_prepass(self, update: Update) -> bool:
        return True

    def prepass(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        squares = factors.kept("squares", lambda: torch.zeros(update.columns, dtype=torch.float64, device=tile.device))
        for part, _ in parts_of(window.rows):
            squares += _in_basis(tile[part], factors).square_().sum(dim=0)

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        lengths = factors.kept("squares", lambda: torch.zeros(0)).sqrt()
        middle = factors.kept("middle", lambda: _middle(factors, update))
        stored = stored_dtype(update)
        for rows, _ in parts_of(window.rows):
            part = tile[rows]
            directions = _in_basis(part, factors).div_(lengths)
            directions[:, lengths <= _SHORT] = 0
            new = directions.float().to(stored).to(tile.dtype) @ middle @ factors.whole("V").t()
            part.add_(new.sub_(part))  # two steps, as PEFT takes them

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        # V in float64, decomposed, and for the solver; S + diag(λ) and its summands; some rows in each step.
        columns, rows = update.columns, 2 * PART_ROWS
        return columns * (columns * (5 * 8 + 3 * itemsize) + rows * 4 * (8 + itemsize) + 16)


def category_of(module: str) -> str:
    """PEFT's category of a module, by the last parts of its name."""
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return f"{parts[-2]}_{parts[-1]}"


def _in_basis(rows: Tensor, factors: Factors) -> Tensor:
    """These rows of W V⁻ᵀ, in float64."""
    basis = factors.kept("basis", lambda: _decomposed(factors.whole("V").double()))
    if basis.shape[0] == basis.shape[1]:
        return rows.double() @ basis.t()
    solved: Tensor = torch.linalg.lu_solve(basis[:-1], basis[-1].int(), rows.double().t())
    return solved.t().contiguous()


def _decomposed(basis: Tensor) -> Tensor:
    """V's LU decomposition, the pivots as its last row; if there is none, the pseudo-inverse, as in PEFT."""
    lu, pivots, failed = torch.linalg.lu_factor_ex(basis)
    inverse: Tensor = torch.linalg.pinv(basis, rtol=1e-6) if int(failed) else torch.cat((lu, pivots.double()[None]))
    return inverse


def _middle(factors: Factors, update: Update) -> Tensor:
    """S + diag(λ), (in, in)."""
    places, values = factors.whole("indices"), factors.whole("values")
    check_indices(update, "indices", places, update.columns)
    middle = values.new_zeros(update.columns, update.columns)
    middle.index_put_((places[0], places[1]), values, accumulate=True)
    return middle + torch.diag(factors.whole("diagonal"))
