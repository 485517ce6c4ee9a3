"""BOFT: W' = s ∘ (W Rᵀ), R a product of m sparse rotations, R = F_{m−1} ⋯ F₁ F₀, F_i = P_i diag(R_{i1}, …, R_in) P_iᵀ.

W is (out, in), of a convolution with square kernels its flattening (out, in·k·k); in = n·b. The factor is (m, n, b,
b): of each (b, b) its skew-symmetric part S = (X − Xᵀ) / 2 is taken, and Cayley's (I + S)⁻¹ (I − S) is the rotation.
s is (out, 1), or (1, out) on a convolution, and scales the outputs without the bias. P_i permutes the inputs as the
butterflies of the fast Fourier transform do: within b·2ⁱ inputs, seen as rows of b/2, the even rows go before the
odd. Liu et al. 2023, arXiv:2311.06243. Source: peft/tuners/boft/layer.py, 0.21.

Where PEFT cannot build its CUDA kernel it trains, saves and loads m = 1, where P is the identity, though the config
keeps the ``boft_n_butterfly_factor`` that was asked for; so one factor in the file is all that there is. For larger m
it multiplies the F_i first, we rotate W by one after the other, so the last bits may differ. Else on bits, see
`shardmerge.adapters.methods.blocks`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.checks import COUNT, RANK, Config, one_or_other
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily
from shardmerge.adapters.lazy_torch import Tensor
from shardmerge.adapters.methods.base import Factors, all_misshaped, as_vector
from shardmerge.adapters.methods.blocks import block_bytes, cayley, rotate, widened
from shardmerge.spec.updates import Settings, Update, Window


@dataclass(frozen=True, slots=True)
class BoftSettings(Settings):
    """b and n in the config, or 0, and m."""

    size: int
    count: int
    butterflies: int


class Boft(PeftFamily):
    name = "boft"
    builds = True
    mixes_weight = True  # W R, R a product of rotations
    by_rows = frozenset({"scale"})
    rows_are_independent = True
    peft_type = "BOFT"
    title = "BOFT"
    updates = "Linear layers and convolutions of two dimensions with square kernels"
    dims = frozenset({2, 4})
    square_kernels = True
    paper = "arXiv:2311.06243"
    roles = {"boft_R": "blocks", "boft_s": "scale"}
    settings = {"boft_block_size": COUNT, "boft_block_num": COUNT, "boft_n_butterfly_factor": RANK}
    inert = frozenset({"boft_dropout", "init_weights"})

    def check_config(self, config: Config) -> list[str]:
        return one_or_other(config, "boft_block_size", "boft_block_num")

    def settings_of(self, config: Config, module: Module) -> Settings:
        # Without its kernel PEFT makes and loads one factor, whatever the config says.
        alone = module.factors["blocks"].shape[:1] == (1,)
        size, count = config.get("boft_block_size") or 0, config.get("boft_block_num") or 0
        return BoftSettings(size, count, 1 if alone else config["boft_n_butterfly_factor"])

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        scale = module.factors["scale"]
        # Dense, (out, 1) and (1, out) are the same bytes.
        if len(scale.shape) == 2 and 1 in scale.shape and scale.strides is None:
            scale = as_vector(scale)
        factors = (("blocks", module.factors["blocks"]), ("scale", scale))
        claims.updates.append(self.update(module, context, factors=factors))

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        wanted, columns = BoftSettings.of(update), math.prod(shape[1:])
        many = wanted.butterflies
        # Clipped: the power of a hostile count takes long, and more butterflies than columns fit no shape.
        reach = 1 << min(many - 1, columns.bit_length())
        size = wanted.size or columns // wanted.count
        if not size or columns % size or (many > 1 and (columns % (size * reach) or size % 2)):
            return [
                f"{update.module}: blocks of {size}, {wanted.count or columns // max(size, 1)} of them and "
                f"{many} butterfly factors (boft_block_size, boft_block_num and boft_n_butterfly_factor) do not "
                f"divide its {columns} inputs"
            ]
        expected = {"blocks": (many, columns // size, size, size), "scale": (shape[0],)}
        return all_misshaped(update, expected, f"(butterfly factors, blocks, b, b) or (out) of {update.module}")

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        many, _, size, _ = update.factor("blocks").shape
        blocks = factors.kept("blocks", lambda: _rotations(factors.whole("blocks")))
        for index, part in enumerate(blocks.chunk(many)):
            even, odd = (len(tile), -1, 1 << index, 2, size // 2), (len(tile), -1, 2, 1 << index, size // 2)
            if index:
                tile.copy_(scratch.view(even).copy_(tile.view(odd).transpose(2, 3)).view(tile.shape))
            rotate(tile, part, scratch)
            if index:
                tile.copy_(scratch.view(odd).copy_(tile.view(even).transpose(2, 3)).view(tile.shape))
        tile.mul_(factors.rows("scale", window.rows).view(-1, 1))

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        many, count, size, _ = update.factor("blocks").shape
        return block_bytes(many * count, 1, size, itemsize)


def _rotations(blocks: Tensor) -> Tensor:
    """The rotations of all butterflies, (m·n, b, b), joined within each; see `widened`."""
    _, count, size, _ = blocks.shape
    rotations = blocks.view(-1, size, size)
    return widened(cayley(0.5 * (rotations - rotations.transpose(1, 2))), count)
