"""AdaLoRA: W' = W + α / (r₀ + 1e-5) · B (A ∘ E), a singular value for every rank, of which training drops some.

W is (out, in), or of a convolution (out, in, k…), kernels flattened; A (r, in · k…), E (r, 1), B (out, r). A module
begins with rank r₀ (``init_r``) and is saved with the rank r that is left, which ``rank_pattern`` has; the scale
stays that of r₀. One whose rank went to zero is saved with empty factors and changes nothing. An α that is not above
zero counts as r.
Zhang et al. 2023, arXiv:2303.10512. Source: peft/tuners/adalora/layer.py and model.py, 0.21.

On a bf16 or fp16 base PEFT makes the factors of pruned modules anew in the base's dtype, and rounds them and what it
computes of them; we round the sum, once. Everything else has the bits of PEFT's merge.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shardmerge.adapters.claims import Claims, ModuleUpdate, shown
from shardmerge.adapters.formats.checks import FLAG, MISSING, NUMBER, RANK, Config
from shardmerge.adapters.formats.peft_lora import LoraMethod
from shardmerge.adapters.formats.peft_method import Context, Module, PeftFamily
from shardmerge.adapters.formats.wholes import claim_tokens, token_problems
from shardmerge.adapters.lazy_torch import Tensor, torch
from shardmerge.adapters.methods.base import Factors, all_misshaped
from shardmerge.key_mapping.naming import module_name
from shardmerge.spec.tensors import TensorRef
from shardmerge.spec.updates import Settings, Update, Window

_EPS = 1e-5


def _pattern_problems(key: str, value: Any) -> list[str]:
    if value is MISSING or value is None:
        return []
    if not isinstance(value, dict):
        return [f"{key} must map names of lora_E to what is left of them, found {reprlib.repr(value)}"]
    return [
        f"{key}[{name!r}] must be a list of true and false, found {reprlib.repr(item)}"
        for name, item in value.items()
        if not (isinstance(item, list) and all(isinstance(flag, bool) for flag in item))
    ]


@dataclass(frozen=True, slots=True)
class AdaLoraSettings(Settings):
    """r₀."""

    init_r: int


class AdaLora(PeftFamily):
    name = "adalora"
    sides = ("B", "A")
    builds = True
    by_rows = frozenset({"B"})
    neutral_if_zero = frozenset({"E"})
    by_column_windows = True
    rows_are_independent = True
    adds = True
    peft_type = "ADALORA"
    title = "AdaLoRA"
    updates = "matrices and convolutions"
    dims = frozenset({2, 3, 4, 5})
    paper = "arXiv:2303.10512"
    roles = {"lora_A": "A", "lora_B": "B", "lora_E": "E"}
    settings = {
        "init_r": RANK,
        "lora_alpha": NUMBER,
        "rank_pattern": _pattern_problems,
        "fan_in_fan_out": FLAG,
        "trainable_token_indices": token_problems,
    }
    # AdaLoRA inherits LoRA's settings, but does not read these.
    inert = LoraMethod.inert | {
        *("alpha_pattern", "beta1", "beta2", "deltaT", "ensure_weight_tying", "kasa_config", "lora_bias"),
        *("monteclora_config", "orth_reg_weight", "r", "target_r", "tfinal", "tinit", "total_step", "use_rslora"),
        *("velora_config", "init_lora_weights"),  # whatever the last is, A and B are drawn at random
    }
    refused = {
        **LoraMethod.refused,
        "target_parameters": "AdaLoRA updates layers, not single parameters; PEFT would ignore it",
        "use_bdlora": "AdaLoRA has no block-diagonal factors; PEFT would ignore it",
        "use_dora": "AdaLoRA has no DoRA; PEFT does not load it either",
    }

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        config, found = context.config, module.factors
        started, kept = config["init_r"], _kept(config, module.name)
        rank = started if kept is None else sum(kept)
        empty = [ref for role, ref in found.items() if ref.shape == _empty_shape(role, ref)]
        if rank == 0 and len(empty) == len(found):
            claims.account_for(module.refs)
            return
        alpha = config["lora_alpha"]
        scaling, settings = alpha if alpha > 0 else rank, AdaLoraSettings(started)
        claims.updates.append(self.update(module, context, scaling=scaling, rank=rank, settings=settings))
        if kept is not None and len(kept) != started:
            claims.misfit(
                f"adapter_config.json: rank_pattern has {len(kept)} ranks of {module.name}, but init_r is {started}"
            )
            return
        a, b, e = (found[role] for role in "ABE")
        source = "init_r" if kept is None else "what rank_pattern keeps"
        if len(a.shape) != 2 or a.shape[0] != rank or len(b.shape) != 2 or b.shape[1] != rank or e.shape != (rank, 1):
            claims.misfit(
                f"{shown(a, b, e)}: expected (r, in), (out, r) and (r, 1) with r = {rank}, {source} of {module.name} "
                "in adapter_config.json"
            )

    def claim_rest(self, claims: Claims, tensors: Mapping[str, TensorRef], config: Config) -> None:
        claim_tokens(claims, tensors, config.get("trainable_token_indices"))
        super().claim_rest(claims, tensors, config)

    def misfits(self, update: ModuleUpdate, shape: tuple[int, ...]) -> list[str]:
        expected = {"A": (update.rank, math.prod(shape[1:])), "B": (shape[0], update.rank)}
        return all_misshaped(update, expected, f"(r, in · k…) or (out, r) of {update.module} {list(shape)}")

    def apply(self, tile: Tensor, factors: Factors, update: Update, window: Window, scratch: Tensor) -> None:
        right = factors.kept("A E", lambda: factors.whole("A") * factors.whole("E"))
        if len(window.columns) < update.columns:
            right = right[:, window.columns.start : window.columns.stop]
        torch.mm(factors.rows("B", window.rows), right, out=scratch)
        # The sum first, as in PEFT, in the compute dtype.
        rank = torch.full((1,), AdaLoraSettings.of(update).init_r, dtype=tile.dtype, device=tile.device) + _EPS
        tile.add_(scratch.mul_(update.scaling).div_(rank))

    def kept_bytes(self, update: Update, itemsize: int) -> int:
        return update.rank * update.columns * itemsize


def _empty_shape(role: str, ref: TensorRef) -> tuple[int, ...]:
    """A factor's shape when no rank is left."""
    return (*ref.shape[:1], 0) if role == "B" else (0, *ref.shape[1:2])


def _kept(config: Config, module: str) -> list[bool] | None:
    """Which of a module's initial ranks are left, if the config says so."""
    for key, value in (config.get("rank_pattern") or {}).items():
        owner, found, _ = module_name(key).rpartition(".lora_E")
        if found and owner == module:
            kept: list[bool] = value
            return kept
    return None
