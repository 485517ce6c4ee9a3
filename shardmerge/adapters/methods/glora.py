"""GLoRA: W' = W + (W ∘ A + B) and b' = b + (b ∘ D + E + W C), W in the last term as it is in the base.

W is (out, in), b (out). A and B are Xd Xu, (out, r) (r, in), or a column (out, 1), or one number, or nothing
(``config_A_B``); C, (in, 1), is Xd Xu, (in, r) (r, 1), or a column, or nothing (``config_C``); D and E are (out), one
number or nothing (``config_D_E``). For nothing PEFT stores zeros, which are added as they are; so it does for C, D
and E of a layer without a bias. Chavan et al. 2023, arXiv:2306.07967. Source: peft/tuners/glora/layer.py, 0.21.

In float32 the bits are those of PEFT's merge, but the last of W C may differ, since rows are multiplied some at a
time. On a 16-bit base PEFT rounds the factors and every step; we round once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.checks import RANK, one_of
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, Family, all_misshaped
from shardmerge.adapters.methods.lora import add_product
from shardmerge.spec.tensors import MIN_TILE_ROWS, RowRange
from shardmerge.spec.updates import Settings, Update, Window

#: Rows of W that are read at a time for W C.
_ROWS = 64
_PARTS = ("Xd", "Xu", "X", "zeros")


@dataclass(frozen=True, slots=True)
class GloraSettings(Settings):
    """The letters of the factors that are vectors, not single numbers."""

    vectors: str


class Glora(PeftFamily):
    name = "glora"
    by_rows = frozenset({"A.Xd", "B.Xd", "A.zeros", "B.zeros"})
    rows_are_independent = True
    peft_type = "GLORA"
    selectors = frozenset()
    title = "GLoRA"
    updates = "Linear layers"
    paper = "arXiv:2306.07967"
    roles = {f"glora_{letter}.{part}": f"{letter}.{part}?" for letter in "ABCDE" for part in _PARTS}
    settings = {
        "r": RANK,
        "config_A_B": one_of("lora", "vector", "constant", "none"),
        "config_C": one_of("lora", "vector", "none"),
        "config_D_E": one_of("vector", "constant", "none"),
    }
    inert = frozenset({"init_weights"})

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        config = context.config
        forms = {letter: config.get(f"config_{of}") for of in ("A_B", "C", "D_E") for letter in of.split("_")}
        defaults = {"A": "lora", "B": "lora", "C": "lora", "D": "constant", "E": "constant"}
        has_bias = any(f"{letter}.{part}" in module.factors for letter in "CDE" for part in _PARTS[:3])
        wanted: list[str] = []
        for letter, default in defaults.items():
            form = forms[letter] or default
            if form == "none" or (letter in "CDE" and not has_bias):
                wanted += [f"{letter}.zeros"] if f"{letter}.zeros" in module.factors else []
            else:
                wanted += [f"{letter}.Xd", f"{letter}.Xu"] if form == "lora" else [f"{letter}.X"]
        there = module.factors
        if missing := [role for role in wanted if role not in there]:
            claims.half(module.first, module.key(f"glora_{missing[0]}"), module.refs)
            return
        if extra := [ref for role, ref in there.items() if role not in wanted]:
            has = ", ".join(sorted(wanted))
            claims.reject(
                module.refs, f"{extra[0].name} does not fit adapter_config.json, by which {module.name} has {has}"
            )
            return
        vectors = (letter for letter, default in defaults.items() if (forms[letter] or default) == "vector")
        settings = GloraSettings("".join(vectors))
        for parameter, family, letters in (("weight", self.name, "AB"), ("bias", GloraBias.name, "CDE")):
            factors = tuple((role, there[role]) for role in wanted if role[0] in letters)
            if not factors:
                continue
            update = self.update(module, context, family=family, factors=factors, settings=settings)
            if parameter == "bias":
                # The file has zeros for a layer without a bias, too.
                update = update.changed(parameter=parameter, optional=not has_bias)
            if any(role[0] == "C" for role, _ in factors):
                update = update.changed(of_base=(("W", "weight"),))
            claims.updates.append(update)

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        problems = []
        for letter in "AB":
            column = (shape[0], 1) if letter in GloraSettings.of(update).vectors else (1,)
            problems += _misshaped(update, letter, shape[0], shape[1], {"X": column, "zeros": shape})
        return problems

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        if update.has("A.Xd"):
            torch.mm(factors.rows("A.Xd", window.rows), factors.whole("A.Xu"), out=scratch)
            scratch.mul_(tile)
        else:
            torch.mul(tile, _value(factors, update, "A", tile, window.rows), out=scratch)
        if update.has("B.Xd"):
            add_product(scratch, factors.rows("B.Xd", window.rows), factors.whole("B.Xu"))
        else:
            scratch.add_(_value(factors, update, "B", tile, window.rows))
        tile.add_(scratch)

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        return 2 * MIN_TILE_ROWS * update.columns * itemsize if update.has("B.Xd") else 0


class GloraBias(Family):
    """b + (b ∘ D + E + W C)."""

    name = "glora-bias"
    builds = True
    streamed = frozenset({"W"})
    mixes_weight = True  # W C

    def check(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        problems = []
        for letter in "DE":
            of_each = letter in GloraSettings.of(update).vectors
            problems += _misshaped(update, letter, shape[0], 1, {"X": shape if of_each else (1,), "zeros": shape})
        if update.has("W"):
            columns = update.factor("W").shape[1]
            problems += _misshaped(update, "C", columns, 1, {"X": (columns, 1), "zeros": (columns, 1)})
        return problems

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        torch.mul(tile, _value(factors, update, "D", tile, window.rows).reshape(-1, 1), out=scratch)
        scratch.add_(_value(factors, update, "E", tile, window.rows).reshape(-1, 1))
        if update.has("W"):
            if update.has("C.Xd"):
                column = factors.kept("C", lambda: factors.whole("C.Xd") @ factors.whole("C.Xu"))
            else:
                column = _value(factors, update, "C", tile, None)
            for start in range(window.rows.start, window.rows.stop, _ROWS):
                stop = min(start + _ROWS, window.rows.stop)
                product = torch.matmul(factors.rows("W", RowRange(start, stop)), column)
                scratch[start - window.rows.start : stop - window.rows.start] += product
        tile.add_(scratch)

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        if not update.has("W"):
            return 0
        weight = update.factor("W")
        columns = weight.shape[1]
        # A W that is stored transposed is kept whole.
        stored = weight.nbytes if weight.strides is not None else 4 * _ROWS * columns
        return stored + (_ROWS + 1) * columns * itemsize


def _value(factors: Factors, update: Update, letter: str, tile: Tensor, rows: RowRange | None) -> Tensor:
    """A factor that is not a product: its numbers for these rows, for all rows if it has none, or one number."""
    if update.has(f"{letter}.X"):
        value = factors.whole(f"{letter}.X")
    elif not update.has(f"{letter}.zeros"):
        return tile.new_zeros(1)
    elif letter in "AB" and rows is not None:
        return factors.rows(f"{letter}.zeros", rows)
    else:
        value = factors.whole(f"{letter}.zeros")
    return value[rows.start : rows.stop] if rows is not None and len(value) > 1 else value


def _misshaped(
    update: ModuleUpdate, letter: str, rows: int, columns: int, expected: Mapping[str, tuple[int, ...]]
) -> list[str]:
    shapes = {"Xd": (rows, update.rank), "Xu": (update.rank, columns), **expected}
    named = {f"{letter}.{part}": shape for part, shape in shapes.items()}
    return all_misshaped(update, named, f"{letter} as adapter_config.json has it")
