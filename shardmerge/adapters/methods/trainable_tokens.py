"""PEFT's trainable tokens by themselves: W'[index[k]] = V[k], see `shardmerge.adapters.methods.whole`.

Source: peft/tuners/trainable_tokens, 0.21.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from shardmerge.adapters.formats.peft import Check, Config, Context, Module, PeftMethod
from shardmerge.adapters.formats.peft_tokens import claim_tokens, token_problems
from shardmerge.adapters.methods.base import Claims
from shardmerge.spec.tensors import TensorRef


class TrainableTokensMethod(PeftMethod):
    """``peft_type: TRAINABLE_TOKENS``."""

    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    selectors: ClassVar[frozenset[str]] = frozenset()
    title: ClassVar[str] = "Trainable tokens"
    roles: ClassVar[Mapping[str, str]] = {"trainable_tokens_delta": "rows"}
    settings: ClassVar[Mapping[str, Check]] = {"token_indices": lambda key, value: token_problems(key, value)}
    inert: ClassVar[frozenset[str]] = frozenset({"init_weights"})

    def grouped(self, tensors: Mapping[str, TensorRef]) -> tuple[list[Module], dict[str, TensorRef]]:
        return [], {}

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        raise NotImplementedError

    def claim_rest(self, claims: Claims, tensors: Mapping[str, TensorRef], config: Config) -> None:
        claim_tokens(claims, tensors, config.get("token_indices"))
        super().claim_rest(claims, tensors, config)
