"""GraLoRA: W' = W + s · (Δ + B_g A_g), Δ a LoRA of its own in each of k × k blocks; s = α / (r + h).

W is (out, in). A is (k, in/k, r) and B (k, r, out/k): a column of blocks shares an A, a row of blocks a B, and block
(j, n), outputs j and inputs n, takes r/k of the r: Δ_jn = (A[n][:, j-th r/k] · B[j][n-th r/k, :])ᵀ. With ``hybrid_r``
h there is a LoRA of the whole, A_g (h, in) and B_g (out, h). Jung et al. 2025, arXiv:2505.20355. Source:
peft/tuners/gralora/layer.py, 0.21.

The bits are those of PEFT's merge, for every dtype of the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from shardmerge.adapters.claims import Claims, ModuleUpdate, shown
from shardmerge.adapters.formats.checks import COUNT, NUMBER, RANK, Config, is_rank
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily, contradiction
from shardmerge.adapters.lazy_torch import Tensor
from shardmerge.adapters.methods.base import PART_ROWS, Factors, add_scaled, all_misshaped, oriented, parts_of
from shardmerge.adapters.methods.lora import add_product
from shardmerge.spec.tensors import MIN_TILE_ROWS, RowRange
from shardmerge.spec.updates import Parameter, Settings, Update, Window


@dataclass(frozen=True, slots=True)
class GraloraSettings(Settings):
    """k, and h."""

    blocks: int
    hybrid: int


class Gralora(PeftFamily):
    name = "gralora"
    by_rows = frozenset({"general_B"})
    by_column_windows = True
    adds = True
    neutral_if_zero = frozenset({"B", "general_B"})
    peft_type = "GRALORA"
    selectors = frozenset({"layers_to_transform", "layers_pattern"})
    title = "GraLoRA"
    updates = "Linear layers"
    paper = "arXiv:2505.20355"
    roles = {
        "gralora_A": "A",
        "gralora_B": "B",
        "gralora_A_general.weight": "general_A?",
        "gralora_B_general.weight": "general_B?",
    }
    settings = {"r": RANK, "hybrid_r": COUNT, "gralora_k": RANK, "alpha": NUMBER}
    inert = frozenset({"gralora_dropout", "init_weights"})

    def check_config(self, config: Config) -> list[str]:
        rank, many = config.get("r"), config.get("gralora_k")
        wrong = is_rank(rank) and is_rank(many) and rank % many  # type: ignore[operator]
        return [f"adapter_config.json: gralora_k, {many}, must divide r, {rank}"] if wrong else []

    def settings_of(self, config: Config, module: Module) -> GraloraSettings:
        return GraloraSettings(config["gralora_k"], config.get("hybrid_r") or 0)

    def scaling_of(self, config: Config, module: Module) -> float:
        return float(config["alpha"] / (config["r"] + (config.get("hybrid_r") or 0)))

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        hybrid = bool(context.config.get("hybrid_r"))
        for role in ("general_A", "general_B"):
            if problem := contradiction(self.roles, module, role, "hybrid_r", hybrid):
                claims.reject(module.refs, problem)
                return
        claims.updates.append(self.update(module, context))
        a, b = module.factors["A"], module.factors["B"]
        if len(a.shape) != 3 or len(b.shape) != 3:
            claims.misfit(f"{shown(a, b)}: expected (k, in/k, r) and (k, r, out/k)")

    def orient(self, update: ModuleUpdate, parameter: Parameter) -> ModuleUpdate | str:
        a, b = update.factor("A"), update.factor("B")
        if not update.fits:
            return update
        return oriented(update, parameter, b.shape[0] * b.shape[2], a.shape[0] * a.shape[1])

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        of, rank = GraloraSettings.of(update), update.rank
        many, hybrid = of.blocks, of.hybrid
        if any(size % many for size in shape):
            what = f"{update.module}.{update.parameter} is {list(shape)}"
            return [f"{what}, which gralora_k, {many}, does not divide into blocks"]
        expected = {
            "A": (many, shape[1] // many, rank),
            "B": (many, rank, shape[0] // many),
            "general_A": (hybrid, shape[1]),
            "general_B": (shape[0], hybrid),
        }
        return all_misshaped(update, expected, "(k, in/k, r), (k, r, out/k), (hybrid_r, in) or (out, hybrid_r)")

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        for part, rows in parts_of(window.rows):
            self._add_blocks(scratch[part], factors, update, Window(rows, window.columns))
        if GraloraSettings.of(update).hybrid:
            general = factors.whole("general_A")[:, window.columns.start : window.columns.stop]
            add_product(scratch, factors.rows("general_B", window.rows), general)
        add_scaled(tile, scratch, update.scaling)

    def _add_blocks(self, out: Tensor, factors: Factors, update: Update, window: Window) -> None:
        """The window of Δ, into ``out``."""
        a, b = factors.whole("A"), factors.whole("B")
        part = update.rank // len(a)
        for j, rows in _in_blocks(window.rows, b.shape[2]):
            up, down = _wide_enough(rows, b.shape[2]), j * b.shape[2] - window.rows.start
            for n, columns in _in_blocks(window.columns, a.shape[1]):
                wide, right = _wide_enough(columns, a.shape[1]), n * a.shape[1] - window.columns.start
                block = (
                    a[n, wide.start : wide.stop, j * part : (j + 1) * part]
                    @ b[j, n * part : (n + 1) * part, up.start : up.stop]
                )
                block = block[columns.start - wide.start : columns.stop - wide.start]
                block = block[:, rows.start - up.start : rows.stop - up.start].t()
                out[down + rows.start : down + rows.stop, right + columns.start : right + columns.stop] = block

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        # Some rows of a block, and of B_g A_g.
        return 2 * 2 * PART_ROWS * update.columns * itemsize


def _in_blocks(span: RowRange, size: int) -> Iterator[tuple[int, RowRange]]:
    """The blocks that rows or columns are in, and their numbers within each."""
    for index in range(span.start // size, -(-span.stop // size)):
        first = index * size
        yield index, RowRange(max(span.start - first, 0), min(span.stop - first, size))


def _wide_enough(span: RowRange, size: int) -> RowRange:
    """At least `MIN_TILE_ROWS` rows or columns, where the block has them."""
    start = max(0, min(span.start, size - MIN_TILE_ROWS))
    return RowRange(start, max(span.stop, min(size, start + MIN_TILE_ROWS)))
