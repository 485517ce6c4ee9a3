"""BEFT: b' = b + v, a trained addition to the bias; the weight stays.

b is (out), v (1, out) in the file. PEFT cannot merge it into a layer without a bias either. Zhu et
al. 2025, arXiv:2509.15974. Source: peft/tuners/beft/layer.py, 0.21. The bits are those of PEFT's merge, for every
dtype of the base.
"""

from __future__ import annotations

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats.peft_method import Context, Module, PeftMethod
from shardmerge.adapters.methods.base import as_vector
from shardmerge.adapters.methods.lora import LoraBias


class Beft(LoraBias, PeftMethod):
    """``peft_type: BEFT``; the bias is added like that of LoRA's B."""

    name = "beft"
    scales_by_alpha = False
    peft_type = "BEFT"
    selectors = frozenset()
    title = "BEFT"
    paper = "arXiv:2509.15974"
    roles = {"beft_bias": "bias"}
    inert = frozenset({"init_weights"})

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        bias = module.factors["bias"]
        if len(bias.shape) == 2 and bias.shape[0] == 1:
            bias = as_vector(bias)
        claims.updates.append(ModuleUpdate(module.name, "bias", self.name, (("bias", bias),)))
