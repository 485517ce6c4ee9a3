"""PEFT's trainable tokens by themselves: W'[index[k]] = V[k], see `shardmerge.adapters.methods.whole`.

Source: peft/tuners/trainable_tokens, 0.21.
"""

from __future__ import annotations

from collections.abc import Mapping

from shardmerge.adapters.claims import Claims
from shardmerge.adapters.formats.checks import Config
from shardmerge.adapters.formats.peft_method import Context, Module, PeftMethod
from shardmerge.adapters.formats.wholes import claim_tokens, token_problems
from shardmerge.spec.tensors import TensorRef


class TrainableTokensMethod(PeftMethod):
    peft_type = "TRAINABLE_TOKENS"
    selectors = frozenset()
    title = "Trainable tokens"
    roles = {"trainable_tokens_delta": "rows"}
    settings = {"token_indices": token_problems}
    inert = frozenset({"init_weights"})

    def grouped(self, tensors: Mapping[str, TensorRef]) -> tuple[list[Module], dict[str, TensorRef]]:
        return [], {}

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        raise NotImplementedError

    def claim_rest(self, claims: Claims, tensors: Mapping[str, TensorRef], config: Config) -> None:
        claim_tokens(claims, tensors, config.get("token_indices"), for_both_sides=True)
        super().claim_rest(claims, tensors, config)
