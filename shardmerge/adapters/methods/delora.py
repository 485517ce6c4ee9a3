"""DeLoRA: W' = W + (B D A) ∘ w, D = diag(λ / r / (‖A_i‖ ‖B^i‖)), so that no rank's update is larger than λ lets it be.

W is (out, in), A (r, in), B (out, r), λ one number, w (in) the lengths of W's columns as they were before training,
which the file has. ‖A_i‖ is the length of a row, ‖B^i‖ that of a column, neither taken to be less than 1e-4.
Bini et al. 2025, arXiv:2503.18225. Source: peft/tuners/delora/layer.py, 0.21.

In float32 the bits are those of PEFT's merge. On a bf16 or fp16 base PEFT rounds the update and then the sum; we
round once.
"""

from __future__ import annotations

from shardmerge.adapters.claims import ModuleUpdate
from shardmerge.adapters.formats.checks import NUMBER_PATTERN, OPTIONAL_NUMBER, RANK, RANK_PATTERN
from shardmerge.adapters.formats.peft_method import PeftFamily
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, add_scaled, all_misshaped
from shardmerge.spec.updates import Update, Window

_LEAST = 1e-4


class Delora(PeftFamily):
    name = "delora"
    builds = True
    neutral_if_zero = frozenset({"B"})
    adds = True
    peft_type = "DELORA"
    title = "DeLoRA"
    updates = "matrices"
    paper = "arXiv:2503.18225"
    roles = {"delora_A": "A", "delora_B": "B", "delora_lambda": "lambda", "delora_w_norm": "w"}
    # λ in the config is the initial one.
    settings = {
        "r": RANK,
        "rank_pattern": RANK_PATTERN,
        "delora_lambda": OPTIONAL_NUMBER,
        "lambda_pattern": NUMBER_PATTERN,
    }
    inert = frozenset({"init_weights", "module_dropout"})

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        meaning = f"for {update.module} {list(shape)} with r = {update.rank} in adapter_config.json"
        expected = {"A": (update.rank, shape[1]), "B": (shape[0], update.rank), "lambda": (1,), "w": (shape[1],)}
        return all_misshaped(update, expected, meaning)

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        def left() -> Tensor:
            a, b = factors.whole("A"), factors.whole("B")
            lengths = torch.clamp(a.norm(dim=1), min=_LEAST) * torch.clamp(b.norm(dim=0), min=_LEAST)
            # PEFT's product with a diagonal matrix only adds zeros to this.
            return b * (factors.whole("lambda") / update.rank / lengths)

        scaled = factors.kept("B D", left)
        torch.mm(scaled[window.rows.start : window.rows.stop], factors.whole("A"), out=scratch)
        add_scaled(tile, scratch.mul_(factors.whole("w")), update.scaling)

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        return (update.rank * update.rows + 4 * update.rank) * itemsize
