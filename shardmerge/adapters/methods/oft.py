"""OFT: W' = W Rᵀ, R = diag(R₁, …, R_n) rotations of blocks of b inputs; of an embedding, whose W is (V, D), W' = W R.

W is (out, in), in = n·b. Each R_i is made of a skew-symmetric matrix Q_i, (b, b), of which the file has the b (b − 1)
/ 2 numbers above the diagonal: the factor is (n, b (b − 1) / 2), or (1, b (b − 1) / 2) with ``block_share``. R_i is
Cayley's (I + Q)⁻¹ (I − Q), or with ``use_cayley_neumann`` the first terms of its series, I + 2Q + 2Q² + … + Qᵐ. With
``coft`` a Q that is longer than ε / √n is first brought to that length. Qiu et al. 2023, arXiv:2306.07280. Source:
peft/tuners/oft/layer.py, 0.21.

On a convolution of more than one point PEFT's forward sums patches that overlap, so that what an adapter computes
there differs from its merge and from every other weight; such are refused. On bits, see `adapters.methods.blocks`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.checks import (
    COUNT,
    FLAG,
    OPTIONAL_NUMBER,
    Config,
    checked,
    is_count,
    one_or_other,
    up_to,
)
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, misshaped
from shardmerge.adapters.methods.blocks import block_bytes, cayley, neumann, rotate, rotate_back, widened
from shardmerge.spec.notices import Warned
from shardmerge.spec.updates import Settings, Update, Window

_TERMS = 5
_EPS = 6e-5


@dataclass(frozen=True, slots=True)
class OftSettings(Settings):
    """The number of blocks and their size in the config, or 0, and how R is made of Q."""

    blocks: int
    size: int
    shared: bool
    #: ε; None without ``coft``.
    most: float | None
    #: Terms of the series; 0 for Cayley's formula itself.
    terms: int
    embedding: bool


class Oft(PeftFamily):
    name = "oft"
    builds = True
    mixes_weight = True  # W R, rotations
    rows_are_independent = True
    neutral_if_zero = frozenset({"Q"})
    peft_type = "OFT"
    title = "OFT, COFT"
    paper = "arXiv:2306.07280"
    roles = {"oft_R.weight": "Q?", "oft_embedding_R.weight": "embedding_Q?"}
    settings = {
        "r": COUNT,
        "oft_block_size": checked(
            is_count,
            "a whole number (adapters of PEFT before 0.14 have none; they mean other rotations, and must be "
            "trained again)",
            required=True,
        ),
        "coft": FLAG,
        "eps": OPTIONAL_NUMBER,
        "block_share": FLAG,
        "use_cayley_neumann": FLAG,
        "num_cayley_neumann_terms": up_to(1000),
    }
    # alpha_pattern was a setting of all LyCORIS methods up to PEFT 0.14; OFT has no alpha.
    inert = frozenset({"alpha_pattern", "init_weights", "module_dropout"})
    refused = {
        "rank_pattern": "OFT of PEFT 0.14 and older, with another number of blocks for some modules; it means other "
        "rotations, and must be trained again"
    }

    def check_config(self, config: Config) -> list[str]:
        return one_or_other(config, "r", "oft_block_size")

    def settings_of(self, config: Config, module: Module) -> OftSettings:
        series = config.get("use_cayley_neumann")
        series = True if series is None else series  # as PEFT's class has it
        return OftSettings(
            blocks=config.get("r") or 0,
            size=config["oft_block_size"],
            shared=bool(config.get("block_share")),
            most=(_EPS if config.get("eps") is None else config["eps"]) if config.get("coft") else None,
            terms=(config.get("num_cayley_neumann_terms") or _TERMS) if series else 0,
            embedding="embedding_Q" in module.factors,
        )

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        config = context.config
        if len(module.factors) > 1:
            claims.reject(module.refs, f"{module.name} has the factors both of an embedding and of another layer")
            return
        update = self.update(module, context, factors=(("Q", module.first),))
        claims.updates.append(update)
        version = re.match(r"0\.(\d{1,4})\.", str(config.get("peft_version") or "0.0."))
        if OftSettings.of(update).terms and version and int(version[1]) < 18 and not claims.warnings:
            claims.warnings.append(
                Warned(
                    "it may be of a PEFT before 0.18, which took the last term of the Cayley-Neumann series twice; as "
                    "PEFT does since, it is merged by the new series"
                )
            )

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        factor, of = update.factor("Q"), OftSettings.of(update)
        if len(shape) not in (2, 4) or (of.embedding and len(shape) != 2):
            return [f"{update.module}.{update.parameter} is {list(shape)}; OFT rotates the inputs of matrices"]
        if math.prod(shape[2:]) != 1:
            return [
                f"{update.module}.{update.parameter} is {list(shape)}: on a convolution of more than one point "
                "PEFT's OFT sums patches that overlap, and no weight is equal to that; keep the adapter beside the base"
            ]
        columns = math.prod(shape[1:])
        size = nearest_divisor(columns, of.size or of.blocks)
        size = size if of.size else columns // size
        rows = 1 if of.shared else columns // size
        meaning = (
            f"as block size {size} of the {columns} inputs of {update.module} makes it (r, oft_block_size and "
            "block_share in adapter_config.json)"
        )
        return misshaped(factor, (rows, size * (size - 1) // 2), meaning)

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        blocks = factors.kept("blocks", lambda: _rotations(factors.whole("Q"), update))
        if OftSettings.of(update).embedding:
            rotate_back(tile, blocks, scratch)
        else:
            rotate(tile, blocks, scratch)

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        count, numbers = update.factor("Q").shape
        size = _block_size(numbers)
        return block_bytes(count, update.columns // size // count, size, itemsize)


def nearest_divisor(columns: int, wanted: int) -> int:
    """The divisor of ``columns`` that PEFT takes for a number that does not divide them."""
    if wanted >= columns:
        return columns
    higher = next(number for number in range(wanted, columns + 1) if columns % number == 0)
    lower = next(number for number in range(wanted, 0, -1) if columns % number == 0)
    return lower if wanted - lower <= higher - wanted else higher


def _block_size(numbers: int) -> int:
    """b, of b (b − 1) / 2 numbers."""
    return (1 + math.isqrt(1 + 8 * numbers)) // 2


def _rotations(numbers: Tensor, update: Update) -> Tensor:
    """R₁, …, R_n, (n, b, b), joined; see `widened`."""
    size, of = _block_size(numbers.shape[1]), OftSettings.of(update)
    rows, columns = torch.triu_indices(size, size, 1, device=numbers.device)

    def skew(upper: Tensor) -> Tensor:
        matrix = torch.zeros(len(upper), size, size, dtype=upper.dtype, device=upper.device)
        matrix[:, rows, columns] = upper
        return matrix - matrix.transpose(1, 2)

    if of.most is not None:
        matrix = skew(numbers)
        most = of.most / torch.sqrt(torch.tensor(len(matrix)))
        lengths = torch.norm(matrix, dim=(1, 2), keepdim=True)
        matrix = torch.where(lengths <= most, matrix, most * (matrix / lengths))
        numbers = matrix[:, rows, columns].to(numbers.dtype)
    matrix = skew(numbers)
    rotations = neumann(matrix, of.terms) if of.terms else cayley(matrix)
    return widened(rotations, update.columns // size)
