"""LN tuning: γ' = V_γ and β' = V_β, the norms' own parameters, trained.

PEFT copies a layer (a LayerNorm as a rule), trains the copy and saves all of it; merging puts it in the place of the
base's. So the adapter's tensors have the base's shapes: γ (n) and β (n), or those of whatever layer was targeted.
Zhao et al. 2023, arXiv:2312.11420. Source: peft/tuners/ln_tuning/layer.py, 0.21.
"""

from __future__ import annotations

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.peft_method import Context, Module, PeftMethod
from shardmerge.adapters.methods.whole import Replacement


class LnTuning(PeftMethod):
    """``peft_type: LN_TUNING``; its tensors replace the base's."""

    peft_type = "LN_TUNING"
    selectors = frozenset({"exclude_modules"})
    title = "LN tuning"
    paper = "arXiv:2312.11420"
    roles = {"ln_tuning_layers.weight": "weight?", "ln_tuning_layers.bias": "bias?"}

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        for parameter, ref in module.factors.items():
            claims.updates.append(ModuleUpdate(module.name, parameter, Replacement.name, (("whole", ref),)))
