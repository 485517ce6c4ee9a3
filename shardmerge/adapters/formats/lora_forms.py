"""The forms that LoRA takes in PEFT's files: matrices and convolutions, blocks, embeddings, DoRA, KaSA, biases.

Source: peft/tuners/lora/model.py and layer.py, 0.21.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from shardmerge.adapters.claims import Claims, ModuleUpdate, shown
from shardmerge.adapters.formats.checks import MISSING, Config, is_rank, is_strings, pattern_value, rank_of
from shardmerge.adapters.formats.peft_method import Module, contradiction, key_of
from shardmerge.adapters.methods.kasa import Kasa
from shardmerge.adapters.methods.lora import BlockSettings, Dora, Lora, LoraBias, LoraBlocks, pair_problem, scaling_of
from shardmerge.spec.tensors import Orientation, TensorRef, transposed_if

#: The end of a key → the factor's role.
ROLES: Mapping[str, str] = {
    "lora_A.weight": "A?",
    "lora_B.weight": "B?",
    "lora_B.bias": "bias?",
    "lora_diag": "diagonal?",
    "lora_embedding_A": "embedding_A?",
    "lora_embedding_B": "embedding_B?",
    "lora_magnitude_vector": "magnitude?",
    "lora_magnitude_vector.weight": "magnitude?",
}
#: Variants, by the setting, → tensors that only training reads; PEFT's merge ignores them. MonteCLoRA draws
#: perturbations, VeLoRA compresses the input of the backward pass.
TRAINING_STATE = {"monteclora_config": "lora_monteclora_sampler", "velora_config": "lora_velora_embed"}
#: Settings that choose a variant of LoRA, at most one for an adapter.
_VARIANTS = ("use_dora", "use_bdlora", "kasa_config", *TRAINING_STATE)


def variants(config: Config) -> list[str]:
    """The variants of an adapter, by the settings that choose them. An empty sub-config counts."""
    chosen = [name for name in _VARIANTS if config.get(name) not in (None, False)]
    return [*chosen, *(["init_lora_weights: mica"] if config.get("init_lora_weights") == "mica" else [])]


def rank_and_scaling(config: Config, key: str) -> tuple[int, float]:
    rank = rank_of(config, key)
    alpha: float = pattern_value(config.get("alpha_pattern"), key, config["lora_alpha"])
    return rank, scaling_of(alpha, rank, bool(config.get("use_rslora")))


def report_zero_alpha(claims: Claims, config: Config) -> None:
    """Refuse an alpha of 0, with which the merge would only write the base again."""
    if config["lora_alpha"] == 0 and any(update.scaling == 0 for update in claims.updates):
        claims.problems.append(
            "lora_alpha in adapter_config.json is 0, so the adapter would change nothing; some exporters write 0 for "
            "what they do not know. Give the alpha of the training as alpha beside the adapter's path"
        )


def paired(claims: Claims, module: Module, one: str, other: str) -> bool:
    """Whether both factors are there. A missing one is reported."""
    missing = [role for role in (one, other) if role not in module.factors]
    if missing:
        claims.half(module.first, module.key(key_of(ROLES, missing[0])), module.refs)
    return not missing


def claim_matrix(claims: Claims, module: Module, config: Config) -> None:
    """LoRA on a Linear layer, a Conv1D or a convolution."""
    rank, scaling = rank_and_scaling(config, module.configured)
    if module.configured != module.name:
        # The out_proj of nn.MultiheadAttention: PEFT adds its update twice, when it merges and when it runs.
        scaling *= 2
    a, b = module.factors["A"], module.factors["B"]
    has_blocks = isinstance(config.get("use_bdlora"), dict)
    factors, in_memory = (("A", a), ("B", b)), transposed_if(config.get("fan_in_fan_out") and not has_blocks)
    update = ModuleUpdate(module.name, "weight", Lora.name, factors, scaling, rank, in_memory=in_memory)
    if has_blocks:
        _claim_blocks(claims, module, config["use_bdlora"], update)
        return
    is_plain = len(module.factors) == 2 and not _has_more(config)
    if not is_plain:
        update = _with_diagonal(claims, module, config, _with_magnitude(claims, module, config, update))
    claims.updates.append(update)
    if problem := pair_problem(a, b):
        claims.misfit(problem)
    elif a.shape[0] != b.shape[1] or a.shape[0] != rank:
        _check_ranks(claims, a, b, rank, module.name)
    if not is_plain:
        _claim_bias(claims, module, config, scaling)


def _has_more(config: Config) -> bool:
    """Whether modules have more factors than A and B."""
    return bool(config.get("use_dora") or config.get("lora_bias") or config.get("kasa_config") is not None)


def _claim_blocks(claims: Claims, module: Module, blocks: Mapping[str, Any], update: ModuleUpdate) -> None:
    """BD-LoRA: the module's own name decides which factor is block-diagonal."""
    last = module.name.rpartition(".")[2]
    diagonal = [
        role
        for role, key in (("A", "target_modules_bd_a"), ("B", "target_modules_bd_b"))
        if any(pattern in last for pattern in blocks.get(key) or ())
    ]
    claims.updates.append(update)
    if extra := [ref for role, ref in module.factors.items() if role not in ("A", "B")]:
        claims.reject(extra, f"{extra[0].name}: BD-LoRA knows neither DoRA nor biases")
    if len(diagonal) == 2:
        claims.misfit(f"{module.name}: use_bdlora says that both its factors are block-diagonal")
    elif len(update.factor("A").shape) != 2 or len(update.factor("B").shape) != 2:
        claims.misfit(f"{update.first} is not a matrix: BD-LoRA is of Linear layers")
    elif diagonal:
        settings = BlockSettings(blocks.get("nblocks", 1), diagonal[0])
        claims.updates[-1] = update.changed(family=LoraBlocks.name, settings=settings)


def blocks_problems(key: str, value: Any) -> list[str]:
    if value is MISSING or value in (None, False):
        return []
    if not isinstance(value, dict) or not is_rank(value.get("nblocks", 1)):
        return [f"{key} must hold nblocks, a whole number above zero, found {reprlib.repr(value)}"]
    patterns = (value.get("target_modules_bd_a"), value.get("target_modules_bd_b"))
    if not all(of is None or is_strings(of) for of in patterns):
        return [f"{key}: target_modules_bd_a and target_modules_bd_b must be lists of strings"]
    return []


def _check_ranks(claims: Claims, a: TensorRef, b: TensorRef, rank: int, name: str) -> None:
    if a.shape[0] != b.shape[1]:
        hint = ""
        if len(b.shape) > 2 and b.shape[1] and not a.shape[0] % b.shape[1]:
            hint = "; they may be of a convolution of several groups, which PEFT cannot merge either"
        elif a.shape[0] and a.shape[0] < b.shape[1] and not b.shape[1] % a.shape[0]:
            hint = (
                f"; A has 1/{b.shape[1] // a.shape[0]} of its rows, as where one process of several (FSDP, ZeRO-3) "
                "saved only its own part of every factor: save the adapter again from the full, gathered state dict"
            )
        claims.misfit(f"{shown(a, b)} disagree on the rank: expected (r, in) and (out, r){hint}")
    elif a.shape[0] != rank:
        claims.misfit(
            f"{a.name} has rank {a.shape[0]}, but adapter_config.json says {rank} for {name} (r and rank_pattern)"
        )


def _agreed(claims: Claims, module: Module, role: str, setting: str, wanted: bool) -> TensorRef | None:
    """A factor, if the setting agrees with it. A contradiction is reported."""
    ref = module.factors.get(role)
    problem = contradiction(ROLES, module, role, setting, wanted)
    if problem and ref is not None:
        claims.reject([ref], problem)
    elif problem:
        claims.problems.append(problem)
    return None if problem else ref


def _with_magnitude(claims: Claims, module: Module, config: Config, update: ModuleUpdate) -> ModuleUpdate:
    """As DoRA, if the config says so."""
    magnitude = _agreed(claims, module, "magnitude", "use_dora", bool(config.get("use_dora")))
    if magnitude is None:
        return update
    # A convolution's is (1, out, 1…).
    flat = (
        dataclasses.replace(magnitude, shape=(math.prod(magnitude.shape),)) if magnitude.strides is None else magnitude
    )
    return update.changed(family=Dora.name, factors=(*update.factors, ("magnitude", flat)))


def _with_diagonal(claims: Claims, module: Module, config: Config, update: ModuleUpdate) -> ModuleUpdate:
    """As KaSA, if the config says so."""
    diagonal = _agreed(claims, module, "diagonal", "kasa_config", config.get("kasa_config") is not None)
    if diagonal is None:
        return update
    factors = (*update.factors, ("diagonal", diagonal))
    return update.changed(family=Kasa.name, factors=factors, of_base=(("W", "weight"),))


def _claim_bias(claims: Claims, module: Module, config: Config, scaling: float) -> None:
    bias = _agreed(claims, module, "bias", "lora_bias", bool(config.get("lora_bias")))
    if bias is not None:
        update = ModuleUpdate(module.name, "bias", LoraBias.name, (("bias", bias),), scaling)
        claims.updates.insert(len(claims.updates) - 1, update)


def claim_embedding(claims: Claims, module: Module, config: Config) -> None:
    """A is (r, V), B is (D, r), and the weight (V, D): B A is the update's transpose."""
    if not paired(claims, module, "embedding_A", "embedding_B"):
        return
    for role in ("A", "B", "bias"):
        if role in module.factors:
            ref = module.factors[role]
            claims.reject([ref], f"{ref.name} is there beside the factors of an embedding")
    rank, scaling = rank_and_scaling(config, module.name)
    a, b = module.factors["embedding_A"], module.factors["embedding_B"]
    update = ModuleUpdate(
        module.name, "weight", Lora.name, (("A", a), ("B", b)), scaling, rank, orientation=Orientation.TRANSPOSED
    )
    update = _with_magnitude(claims, module, config, update)
    claims.updates.append(_with_diagonal(claims, module, config, update))
    if len(a.shape) != 2 or len(b.shape) != 2:
        claims.misfit(f"{shown(a, b)}: expected (r, V) and (D, r)")
    else:
        _check_ranks(claims, a, b, rank, module.name)
