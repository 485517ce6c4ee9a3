"""HRA: W' = W H, H a product of r Householder reflections: H = (I − 2 u₁u₁ᵀ) ⋯ (I − 2 u_r u_rᵀ).

W is (out, in), of a convolution with square kernels its flattening (out, in·k·k); U, whose columns are brought to
length one, is (in, r). With ``apply_GS`` the columns are first made orthogonal one after the other (Gram and
Schmidt), and H = I − 2 U Uᵀ. Yuan et al. 2024, arXiv:2405.17484. Source: peft/tuners/hra/layer.py, 0.21.

H is built whole, (in, in), as PEFT builds it: reflecting W's rows one vector after the other would need less memory,
but round otherwise. So the bits are PEFT's for every dtype of the base.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shardmerge.adapters.claims import ModuleUpdate
from shardmerge.adapters.formats.checks import FLAG, RANK, Config
from shardmerge.adapters.formats.peft_method import Module, PeftFamily
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, misshaped
from shardmerge.spec.updates import Settings, Update, Window

#: Rows of H that are reflected at a time.
_ROWS = 256


@dataclass(frozen=True, slots=True)
class HraSettings(Settings):
    """Whether the vectors are made orthogonal."""

    orthogonal: bool


class Hra(PeftFamily):
    name = "hra"
    builds = True
    mixes_weight = True  # W H, reflections
    rows_are_independent = True
    peft_type = "HRA"
    title = "HRA"
    updates = "Linear layers and convolutions of two dimensions with square kernels"
    dims = frozenset({2, 4})
    square_kernels = True
    paper = "arXiv:2405.17484"
    roles = {"hra_u": "U"}
    settings = {"r": RANK, "apply_GS": FLAG}
    inert = frozenset({"init_weights"})

    def settings_of(self, config: Config, module: Module) -> Settings:
        return HraSettings(bool(config.get("apply_GS")))

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        meaning = f"a vector for each of the {update.rank} reflections that the config's r names, as columns"
        return misshaped(update.factor("U"), (math.prod(shape[1:]), update.rank), meaning)

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        rotation = factors.kept("rotation", lambda: _rotation(factors.whole("U"), HraSettings.of(update).orthogonal))
        tile.copy_(torch.mm(tile, rotation, out=scratch))

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        return update.columns * (update.columns + 2 * min(update.columns, _ROWS) + 3 * update.rank) * itemsize


def _rotation(u: Tensor, orthogonal: bool) -> Tensor:
    """H, (in, in)."""
    if orthogonal:
        units = [(u[:, 0] / u[:, 0].norm()).view(-1, 1)]
        for index in range(1, u.shape[1]):
            rest = u[:, index].view(-1, 1)
            for unit in units:
                rest = rest - (unit.t() @ rest) * unit
            units.append((rest / rest.norm()).view(-1, 1))
        basis = torch.cat(units, dim=1)
        rotation = torch.mm(2 * basis, basis.t()).neg_().add_(0.0)  # 0 − x, where x = 0, is +0
        rotation.diagonal().add_(1)
        return rotation
    u = u / u.norm(dim=0)
    rotation = torch.eye(u.shape[0], dtype=u.dtype, device=u.device)
    for index in range(u.shape[1]):
        unit = u[:, index].view(-1, 1)
        lengths = rotation @ unit * 2  # 2 (H u) has the bits of (2 H) u
        for start in range(0, len(rotation), _ROWS):
            rows = slice(start, start + _ROWS)
            rotation[rows] -= lengths[rows] @ unit.t()
    return rotation
