"""OSF: W' = W + (U S V − U₀ S₀ V₀), the smaller singular values and vectors of W exchanged for trained ones.

W is (out, in), m = min(out, in). U₀ (out, m − k), S₀ (m − k), V₀ (m − k, in) are W's own without the k largest; they
are not in the file, so W is decomposed again, and they are rounded to W's dtype, as they were when training began.
The file has U, S and V of the same shapes; k is the config's ``effective_rank`` (a share of m, if it is a fraction;
half of m by default). Nayak et al. 2025, arXiv:2504.07097. Source: peft/tuners/osf/layer.py and utils.py, 0.21.

All of W is decomposed, which takes a multiple of its memory. The product does not depend on the signs that singular
vectors happen to have. The bits are those of PEFT's merge, for every dtype of the base.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

from shardmerge.adapters.claims import ModuleUpdate
from shardmerge.adapters.formats.checks import MISSING, Config, checked, is_number
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, all_misshaped, parts_of
from shardmerge.spec.tensors import MIN_TILE_ROWS
from shardmerge.spec.updates import Settings, Update, Window
from shardmerge.system.bounded_regex import first_match
from shardmerge.system.bounded_regex import problems as regex_problems


def _is_rank(value: Any) -> bool:
    return is_number(value) and value >= 0


def _check_patterns(key: str, value: Any) -> list[str]:
    if value is MISSING or not value:
        return []
    if not isinstance(value, dict):
        return [f"{key} must map regular expressions to ranks, found {reprlib.repr(value)}"]
    problems = []
    for name, of in value.items():
        if not _is_rank(of):
            problems.append(f"{key}[{name!r}] must be a rank, found {reprlib.repr(of)}")
    wrong = regex_problems(list(value))
    return [*problems, *(f"{key}: {reprlib.repr(name)} is not a regular expression: {why}" for name, why in wrong)]


@dataclass(frozen=True, slots=True)
class OsfSettings(Settings):
    """How many singular values are kept, or their share, if the config says it."""

    kept: float | None


class Osf(PeftFamily):
    name = "osf"
    builds = True
    by_rows = frozenset({"U"})
    peft_type = "OSF"
    selectors = frozenset()
    title = "OSF"
    updates = "Linear layers"
    mixes_weight = True  # the smaller part of W is taken away
    #: The factors of W's decomposition are rounded to W's 16 bits. On another CPU, or with another number of threads,
    #: LAPACK may differ from the merge in a last bit, and then some are rounded to the other side.
    sum_units = 1024
    paper = "arXiv:2504.07097"
    note = "makes a weight's whole update at once, in memory that grows with the weight"
    roles = {"osf_svd_params.U_low": "U", "osf_svd_params.S_low": "S", "osf_svd_params.V_low": "V"}
    settings = {
        "effective_rank": checked(_is_rank, "a number of singular values, or a share of them"),
        "rank_pattern": _check_patterns,
    }
    inert = frozenset({"init_weights", "target_svd_config"})

    def settings_of(self, config: Config, module: Module) -> Settings:
        return OsfSettings(_wanted(config, module.name))

    def update(self, module: Module, context: Context, **changes: Any) -> ModuleUpdate:
        return super().update(module, context, of_base=(("W", "weight"),), **changes)

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        rest = min(shape) - _rank(OsfSettings.of(update).kept, min(shape))
        meaning = f"as effective_rank and rank_pattern leave {rest} singular values"
        return all_misshaped(update, {"U": (shape[0], rest), "S": (rest,), "V": (rest, shape[1])}, meaning)

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        before = factors.kept("before", lambda: _smaller(factors.whole("W"), update))
        now = factors.rows("U", window.rows) * factors.whole("S").unsqueeze(0)
        scaled, right = before[window.rows.start : window.rows.stop], before[update.rows :].t().contiguous()
        for part, _ in parts_of(window.rows, MIN_TILE_ROWS):
            tile[part] += now[part] @ factors.whole("V") - scaled[part] @ right

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        smaller = min(update.rows, update.columns)
        both = (update.rows + update.columns) * smaller
        slab = 4 * MIN_TILE_ROWS * update.columns
        return svd_bytes(update) + (2 * both + update.rows * smaller + slab) * itemsize


def svd_bytes(update: Update) -> int:
    """Bytes to decompose W in float32: a copy, the three factors, and LAPACK's work space."""
    smaller = min(update.rows, update.columns)
    both = (update.rows + update.columns) * smaller
    return 4 * (2 * update.rows * update.columns + both + 6 * smaller * smaller)


def stored_dtype(update: Update) -> torch.dtype:
    """The dtype in which PEFT keeps factors of W: W's own."""
    return {"F16": torch.float16, "BF16": torch.bfloat16}.get(update.factor("W").dtype, torch.float32)


def _wanted(config: Config, module: str) -> float | None:
    """`OsfSettings.kept` of a module."""
    pattern = config.get("rank_pattern") or {}
    found = first_match(list(pattern), module, "search")
    value = config.get("effective_rank") if found is None else list(pattern.values())[found]
    return value if value is None or isinstance(value, float) else int(value)


def _rank(wanted: float | None, smaller: int) -> int:
    if wanted is None:
        return smaller // 2
    rank = int(smaller * wanted) if isinstance(wanted, float) and 0 < wanted <= 1 else int(wanted)
    return min(smaller, rank)


def _smaller(weight: Tensor, update: Update) -> Tensor:
    """U₀ ∘ S₀ (out, m − k), and below it V₀ᵀ (in, m − k)."""
    rest, dtype = update.factor("S").shape[0], stored_dtype(update)
    parts = torch.linalg.svd(weight.float(), full_matrices=False)
    first = len(parts[1]) - rest
    u, s, v = (of.to(dtype).to(weight.dtype) for of in (parts[0][:, first:], parts[1][first:], parts[2][first:]))
    return torch.cat((u * s.unsqueeze(0), v.t()))
