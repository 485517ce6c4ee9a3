"""C3A: W' = W + C / in, C made of circulant blocks: C[m·b + i, n·b + j] = K[m, n, (j − i) mod b].

W is (out, in), the kernel K (out/b, in/b, b), b the block size. Chen et al. 2024, arXiv:2407.19342. Source:
peft/tuners/c3a/layer.py and utils.py, 0.21.

PEFT sends an identity matrix through Fourier transforms to find C, which costs it the last bits of every element,
also of those that are zero. Here K's numbers are put where they belong, so C is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardmerge.adapters.claims import ModuleUpdate
from shardmerge.adapters.formats.checks import RANK, RANK_PATTERN, Config, pattern_value
from shardmerge.adapters.formats.peft_method import Module, PeftFamily
from shardmerge.adapters.lazy_torch import Tensor
from shardmerge.adapters.methods.base import Factors, misshaped
from shardmerge.spec.tensors import RowRange
from shardmerge.spec.updates import Settings, Update, Window


@dataclass(frozen=True, slots=True)
class C3aSettings(Settings):
    """b, the size of a block."""

    size: int


class C3a(PeftFamily):
    name = "c3a"
    by_rows = frozenset({"kernel"})
    neutral_if_zero = frozenset({"kernel"})
    adds = True
    peft_type = "C3A"
    selectors = frozenset({"layers_to_transform", "layers_pattern"})
    title = "C3A"
    updates = "Linear layers"
    paper = "arXiv:2407.19342"
    roles = {"c3a_kernel": "kernel"}
    settings = {"block_size": RANK, "block_size_pattern": RANK_PATTERN}
    inert = frozenset({"init_weights"})

    def settings_of(self, config: Config, module: Module) -> Settings:
        return C3aSettings(pattern_value(config.get("block_size_pattern"), module.name, config["block_size"]))

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        size = C3aSettings.of(update).size
        if any(of % size for of in shape):
            what = f"{update.module}.{update.parameter} is {list(shape)}"
            return [f"{what}, which blocks of {size} do not divide (block_size and block_size_pattern)"]
        expected = (shape[0] // size, shape[1] // size, size)
        return misshaped(update.factor("kernel"), expected, f"a kernel for every block of {size} × {size}")

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        size, rows = C3aSettings.of(update).size, window.rows
        first = rows.start // size
        kernel = factors.rows("kernel", RowRange(first, -(-rows.stop // size)))
        for row in range(rows.start, rows.stop):
            block, shift = divmod(row, size)
            part, out = kernel[block - first], scratch[row - rows.start].view(kernel.shape[1:])
            out[:, shift:] = part[:, : size - shift]
            out[:, :shift] = part[:, size - shift :]
        tile.add_(scratch.div_(update.columns).mul_(update.scaling))
