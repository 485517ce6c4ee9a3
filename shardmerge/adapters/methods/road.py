"""RoAd: W' = R W and b' = R b, R a rotation and scaling of pairs of outputs.

W is (out, in), b (out). Outputs come in groups of g, the config's ``group_size``; in a group output i and its partner
i + g/2 make a pair: y'ᵢ = c₁ᵢ yᵢ − c₂ᵢ y_{i+g/2}, y'_{i+g/2} = c₁_{i+g/2} y_{i+g/2} + c₂_{i+g/2} yᵢ, with c₁ = α cos
θ and c₂ = α sin θ. θ and α are (out/2), one for each pair (``road_1``), (out), one for each output (``road_2``), or
(2·out), where of every 2·g numbers the first g belong to c₁ and the others to c₂ (``road_4``). Liu et al. 2024,
arXiv:2409.00119. Source: peft/tuners/road/layer.py, 0.21.

A group needs all its rows, so tiles hold whole groups. PEFT merges with R rounded to the base's dtype, and multiplies
by all of R, (out, out): in float32 the bits of W' are the same (see `adapters.methods.blocks`), on 16-bit bases ours
are nearer. The last bit of b' depends on the processor: its product with all of R may fuse what a block's rounds apart.
"""

from __future__ import annotations

from dataclasses import dataclass

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.checks import Config, checked, is_rank
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily
from shardmerge.adapters.lazy_torch import Tensor
from shardmerge.adapters.methods.base import Factors, all_misshaped
from shardmerge.adapters.methods.blocks import rotate_rows, widened
from shardmerge.spec.tensors import RowRange
from shardmerge.spec.updates import Settings, Update, Window

#: Rows that are rotated at a time, or a group if that has more.
_ROWS = 256
#: Angles, in halves of the number of outputs.
_VARIANTS = {"road_1": 1, "road_2": 2, "road_4": 4}


@dataclass(frozen=True, slots=True)
class RoadSettings(Settings):
    """How angles are shared, and g."""

    variant: str
    group: int


class Road(PeftFamily):
    name = "road"
    mixes_weight = True  # pairs of W's rows are rotated
    peft_type = "ROAD"
    selectors = frozenset()
    title = "RoAd"
    updates = "Linear layers"
    dims = frozenset({1, 2})
    paper = "arXiv:2409.00119"
    roles = {"road_theta": "theta", "road_alpha": "alpha"}
    settings = {
        "variant": checked(lambda value: value in tuple(_VARIANTS), f"one of {', '.join(_VARIANTS)}", required=True),
        "group_size": checked(
            lambda value: is_rank(value) and value % 2 == 0, "an even number above zero", required=True
        ),
    }
    inert = frozenset({"init_weights"})

    def settings_of(self, config: Config, module: Module) -> Settings:
        return RoadSettings(config["variant"], config["group_size"])

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        update = self.update(module, context)
        claims.updates += [update, update.changed(parameter="bias", optional=True)]

    def row_unit(self, update: Update | ModuleUpdate) -> int:
        return RoadSettings.of(update).group

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        of = RoadSettings.of(update)
        group, variant = of.group, of.variant
        if shape[0] % group:
            return [f"{update.module} has {shape[0]} outputs, which groups of {group} do not divide (group_size)"]
        size = (shape[0] // 2 * _VARIANTS[variant],)
        return all_misshaped(update, {"theta": size, "alpha": size}, f"as {variant} has it for {shape[0]} outputs")

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        group = RoadSettings.of(update).group
        first = window.rows.start // group
        count, step = len(tile) // group, max(1, _ROWS // group)
        for start in range(0, count, step):
            stop = min(start + step, count)
            blocks = widened(_rotations(factors, update, RowRange(first + start, first + stop)), stop - start)
            rows = slice(start * group, stop * group)
            rotate_rows(tile[rows], blocks, scratch[rows])

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        # The blocks of some rows, by themselves and joined, and their angles.
        group = RoadSettings.of(update).group
        return max(_ROWS, group) * (group + max(64, group) + 8) * itemsize


def _rotations(factors: Factors, update: Update, groups: RowRange) -> Tensor:
    """R's blocks for these groups, (groups, g, g)."""
    variant, group = RoadSettings.of(update).variant, RoadSettings.of(update).group
    half = group // 2
    count = update.rows // group
    theta, alpha = (factors.whole(role).view(count, -1)[groups.start : groups.stop] for role in ("theta", "alpha"))
    if variant == "road_4":
        own = alpha[:, :group] * theta[:, :group].cos()
        partner = alpha[:, group:] * theta[:, group:].sin()
    else:
        if variant == "road_1":
            theta, alpha = (of.repeat(1, 2) for of in (theta, alpha))
        own, partner = alpha * theta.cos(), alpha * theta.sin()
    blocks = own.new_zeros(len(own), group, group)
    blocks.diagonal(dim1=1, dim2=2).copy_(own)
    blocks.diagonal(half, dim1=1, dim2=2).copy_(-partner[:, :half])
    blocks.diagonal(-half, dim1=1, dim2=2).copy_(partner[:, half:])
    return blocks
