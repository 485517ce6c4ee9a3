"""PEFT's LoRA keys without adapter_config.json, as diffusers, ComfyUI's trainers and plain scripts save them.

The rank follows from the shapes, DoRA and biases from the keys, the scale as in `adapters.formats.scales`. Where the
header has PEFT's config, as diffusers writes it, the adapter is read by that.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

from shardmerge.adapters.claims import Claims, ModuleUpdate
from shardmerge.adapters.formats import grouped_experts, parts
from shardmerge.adapters.formats.checks import Config
from shardmerge.adapters.formats.peft_lora import LoraMethod
from shardmerge.adapters.formats.peft_method import Context, Module
from shardmerge.adapters.formats.scales import Scales, stated_config, stated_numbers
from shardmerge.adapters.methods.base import FAMILIES
from shardmerge.key_mapping.naming import unwrapped
from shardmerge.spec.tensors import TensorRef

_ALPHA = ".alpha"
_UNKNOWN = (
    "there is no adapter_config.json beside it, and neither tensors nor the metadata of the file say its alpha, so its "
    "scale is unknown: give alpha (or scaling)"
)


class _OfPart(LoraMethod):
    """LoRA of one part of a pipeline, whose config names modules without the part."""

    def grouped(self, tensors: Mapping[str, TensorRef]) -> tuple[list[Module], dict[str, TensorRef]]:
        modules, shared = super().grouped(tensors)
        return [
            dataclasses.replace(
                module,
                name=module.name.removeprefix(parts.part_of(module.name)),
                configured=module.configured.removeprefix(parts.part_of(module.configured)),
            )
            for module in modules
        ], shared


def claim(tensors: Mapping[str, TensorRef], scales: Scales, context: Context) -> Claims:
    """Updates of the factors; ``context`` has no config."""
    modules = LoraMethod().grouped(tensors)[0]
    names = [module.name for module in modules]
    if problem := parts.mixed_modules_problem(names, context.base.weight):
        return Claims.refusal(problem)
    said = stated_config(scales.metadata, names)
    if isinstance(said, str) and not scales.given:
        return Claims.refusal(said)
    numbers = alphas_in(tensors)
    if isinstance(said, dict):
        claims = _by_config(tensors, said, scales, context, numbers)
    else:
        claims = _by_shapes(modules, scales, context, numbers)
    for module, number in numbers.items():
        if number.name not in claims.accounted:
            claims.half(number, f"{module}.lora_A.weight")
    return claims


def alphas_in(tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
    """The tensors that hold α, by the prefix of their module."""
    return {unwrapped(name).removesuffix(_ALPHA): ref for name, ref in tensors.items() if name.endswith(_ALPHA)}


# --- without any config -----------------------------------------------------------------------------------------------


def _by_shapes(modules: list[Module], scales: Scales, context: Context, numbers: Mapping[str, TensorRef]) -> Claims:
    claims = Claims()
    method = LoraMethod()
    for module in modules:
        first = module.factors.get("A") or module.factors.get("embedding_A")
        of_experts = (
            first is not None and len(first.shape) == 3 and grouped_experts.is_stacked(module.name, module.factors)
        )
        rank = max((first.shape[of_experts:][:1] if first else ()) or (1,))
        config = {
            "r": max(rank, 1),
            "lora_alpha": max(rank, 1),
            "use_dora": "magnitude" in module.factors,
            "lora_bias": "bias" in module.factors,
        }
        before, number = len(claims.updates), numbers.get(module.prefix)
        if number is not None:
            claims.account_for([number])
        given = Context(config, context.base)
        configured, why = method.configured_name(module, given)
        if why:
            claims.reject(module.refs, f"{module.first.name}: {why}")
            continue
        method.claim_module(claims, dataclasses.replace(module, configured=configured), given)
        if len(claims.updates) == before:
            continue
        # GPT-2 calls its own modules `transformer.…`; then nothing says that the file is diffusers'.
        of_part = parts.part_of(module.name) != "" and not parts.is_own(module.name, context.base.weight)
        scaling = scales.of(claims, max(rank, 1), number, one_if_unsaid=of_part)
        claims.updates[before:] = [_scaled(update, scaling, scales) for update in claims.updates[before:]]
    scales.finish(claims, _UNKNOWN, "diffusers and ComfyUI")
    claims.refused = claims.unscaled
    return claims


def _scaled(update: ModuleUpdate, scaling: float, scales: Scales) -> ModuleUpdate:
    """With α / r in place of 1, twice that for nn.MultiheadAttention's out_proj; our ``scaling`` is s itself."""
    return update.changed(scaling=scaling if scales.scaling is not None else scaling * update.scaling)


# --- by the config in the header --------------------------------------------------------------------------------------


def _by_config(
    tensors: Mapping[str, TensorRef], said: Config, scales: Scales, context: Context, numbers: Mapping[str, TensorRef]
) -> Claims:
    if problems := list(_contradictions(said, scales)):
        return Claims.refusal(*problems)
    config = _with_ours(said, scales)
    factors = {name: ref for name, ref in tensors.items() if not name.endswith(_ALPHA)}
    claims = _OfPart().claim(factors, dataclasses.replace(context, config=config))
    claims.problems = [problem.replace("adapter_config.json", "lora_adapter_metadata") for problem in claims.problems]
    if scales.scaling is not None:
        claims.updates = [
            update.changed(scaling=scales.scaling) if FAMILIES[update.family].scales_by_alpha else update
            for update in claims.updates
        ]
    _compare(claims, scales, numbers)
    return claims


def _contradictions(said: Config, scales: Scales) -> Iterator[str]:
    kind = said.get("peft_type")
    if kind not in (None, "LORA"):
        yield f"the lora_adapter_metadata in its header is of peft_type {str(kind)[:80]!r}; expected LORA"
    if scales.alpha is not None and said.get("use_rslora"):
        yield "the lora_adapter_metadata in its header says use_rslora: give scaling rather than alpha"
    numbers = stated_numbers(scales.metadata)
    if not scales.given and not isinstance(numbers, str):
        alpha = numbers[0]
        if alpha is not None and alpha != said.get("lora_alpha"):
            yield (
                f"its metadata says alpha {alpha:g}, and its lora_adapter_metadata lora_alpha "
                f"{said.get('lora_alpha')!r:.80}, which contradict each other: give alpha (or scaling)"
            )


def _with_ours(said: Config, scales: Scales) -> dict[str, Any]:
    """The config with our config's α in place of its own."""
    config = {**said}
    if scales.scaling is not None:
        config |= {"lora_alpha": 1.0, "alpha_pattern": {}}
    elif scales.alpha is not None:
        config |= {"lora_alpha": scales.alpha, "alpha_pattern": {}}
    return config


def _compare(claims: Claims, scales: Scales, numbers: Mapping[str, TensorRef]) -> None:
    """Check that tensors of α beside such a config agree with it."""
    for update in claims.updates:
        prefix = re.sub(r"\.lora_[A-Za-z_]+\b.*", "", unwrapped(update.first))
        number = numbers.get(prefix)
        if number is None or not FAMILIES[update.family].scales_by_alpha:
            continue
        claims.account_for([number])
        if number.shape not in ((), (1,)):
            claims.problems.append(f"{number.name} is {list(number.shape)}; expected one number")
        if scales.given or number.shape not in ((), (1,)):
            continue
        wanted = scales.read(number) / max(update.rank, 1)
        if wanted != update.scaling:
            claims.problems.append(
                f"{number.name} makes a scale of {wanted:g}, and the lora_adapter_metadata in its header one of "
                f"{update.scaling:g}: give alpha (or scaling)"
            )
