"""PEFT's LoRA files → updates: plain, DoRA, embeddings, convolutions, fused experts, trained biases and tokens.

Source: peft/tuners/lora/config.py, model.py and layer.py, 0.21.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from shardmerge.adapters.formats import grouped_experts, peft_parameters
from shardmerge.adapters.formats.peft import (
    BELOW_WRAPPERS,
    FLAG,
    MISSING,
    NUMBER,
    NUMBER_PATTERN,
    RANK,
    RANK_PATTERN,
    SUBCONFIG,
    Check,
    Config,
    Context,
    Module,
    PeftMethod,
    checked,
    is_embedding,
    is_rank,
    is_strings,
    pattern_value,
)
from shardmerge.adapters.formats.peft_inits import initialisation_problems
from shardmerge.adapters.formats.peft_targets import NOT_COVERED
from shardmerge.adapters.formats.peft_tokens import claim_tokens, token_problems
from shardmerge.adapters.formats.peft_variants import TRAINING_STATE, variants
from shardmerge.adapters.methods.base import Claims, ModuleUpdate
from shardmerge.adapters.methods.lora import scaling_of
from shardmerge.key_mapping.naming import module_name
from shardmerge.spec.tensors import TensorRef

_CANNOT = "which cannot be merged"


class LoraMethod(PeftMethod):
    """``peft_type: LORA``."""

    peft_type: ClassVar[str] = "LORA"
    title: ClassVar[str] = "LoRA, rsLoRA, DoRA"
    note: ClassVar[str] = (
        "Linear, Conv1D, convolutions, embeddings, `nn.MultiheadAttention`, fused experts (`target_parameters`); "
        "BD-LoRA, MiCA, MonteCLoRA, VeLoRA, KaSA; `lora_bias`, trained biases and tokens, `modules_to_save`"
    )
    paper: ClassVar[str] = "arXiv:2106.09685, 2312.03732, 2402.09353"
    roles: ClassVar[Mapping[str, str]] = {
        "lora_A.weight": "A?",
        "lora_B.weight": "B?",
        "lora_B.bias": "bias?",
        "lora_diag": "diagonal?",
        "lora_embedding_A": "embedding_A?",
        "lora_embedding_B": "embedding_B?",
        "lora_magnitude_vector": "magnitude?",
        "lora_magnitude_vector.weight": "magnitude?",
    }
    settings: ClassVar[Mapping[str, Check]] = {
        "r": RANK,
        "lora_alpha": NUMBER,
        "rank_pattern": RANK_PATTERN,
        "alpha_pattern": NUMBER_PATTERN,
        "use_rslora": FLAG,
        "use_bdlora": lambda key, value: _blocks_problems(key, value),
        "use_dora": FLAG,
        "lora_bias": FLAG,
        "target_parameters": checked(is_strings, "a list of strings"),
        "lora_B_layout": peft_parameters.flat_problems,
        "unsloth_fused_expert_lora": peft_parameters.marker_problems,
        "ensure_weight_tying": FLAG,
        "trainable_token_indices": token_problems,
        "init_lora_weights": initialisation_problems,
        "kasa_config": SUBCONFIG,
        # The one that PEFT takes for "not set" where it is false.
        "monteclora_config": lambda key, value: [] if value is False else SUBCONFIG(key, value),
        "velora_config": SUBCONFIG,
    }
    ignorable: ClassVar[frozenset[str]] = frozenset({"init_lora_weights"})
    inert: ClassVar[frozenset[str]] = frozenset(
        {
            "corda_config",
            "eva_config",
            "loftq_config",
            "lora_dropout",
            "lora_ga_config",
            "megatron_config",
            "megatron_core",
            "merge_weights",  # of PEFT 0.2: when it merges by itself
            "qalora_group_size",
        }
    )
    refused: ClassVar[Mapping[str, str]] = {
        "layer_replication": "replicated layers: the model has layers that the base does not store; build that base "
        "first",
        "alora_invocation_tokens": f"activated LoRA acts on the tokens after its invocation only, {_CANNOT}; serve it "
        "with PEFT or vLLM",
        "arrow_config": f"Arrow routing chooses an adapter per token, {_CANNOT}",
        "enable_lora": "LoRA of a part of a layer's outputs, of PEFT 0.2, whose factors are of another form",
        "use_qalora": "QALoRA pools the input by groups, so B A is not the update; PEFT cannot merge it either",
    }

    def check_config(self, config: Config) -> list[str]:
        if len(names := variants(config)) > 1:
            return [f"adapter_config.json sets {' and '.join(names)}, but PEFT knows no adapter that is more than one"]
        return peft_parameters.contradictions(config)

    def left_out(self, module: str, context: Context) -> str:
        """A module is a target, or holds parameters that are, or is an output head that was tied to one."""
        name = peft_parameters.bare(module)[0]
        if peft_parameters.targeted(name, context):
            return ""
        if context.config.get("ensure_weight_tying") and is_embedding(name):
            return ""
        if context.config.get("target_parameters") and not context.config.get("target_modules"):
            return NOT_COVERED
        why = super().left_out(name, context)
        # Other trainers' targets may be the experts as a whole, or a part of them by its usual name.
        by_other_names = why == NOT_COVERED and any(
            not super(LoraMethod, self).left_out(other, context) for other in grouped_experts.names_of(name)
        )
        return "" if by_other_names else why

    def unwrap(self, module: Module, context: Context) -> str:
        """Each ``.base_layer.`` is of wrappers of the enclosing module's parameters, or of nn.MultiheadAttention's.

        The wrapper of nn.MultiheadAttention is the only one that PEFT makes of a module with modules in it. It brings
        along one of ``out_proj``, with its own rank and alpha.
        """
        names = BELOW_WRAPPERS.split(module_name(module.prefix))  # part, wrappers, part …
        for place in range(1, len(names), 2):
            around, depth = "".join(names[:place:2]), names[place].count(".base_layer")
            parameters = peft_parameters.targeted(around, context)
            if len(parameters) == depth:
                continue
            if parameters or names[place:] != [".base_layer", ".out_proj"] or not self._is_attention(around, context):
                return (
                    f"{around} is wrapped {depth} times, but adapter_config.json's target_parameters name "
                    f"{len(parameters)} of its parameters, and it is no nn.MultiheadAttention that is a target"
                )
            module.asked = around
        return ""

    def _is_attention(self, module: str, context: Context) -> bool:
        """Whether PEFT takes a module for an nn.MultiheadAttention: it is a target, and has q, k and v as one."""
        stored = context.stored
        known = stored is None or all(stored(module, name) for name in ("in_proj_weight", "out_proj.weight"))
        return known and not self.left_out(module, context)

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        """One of the forms that LoRA takes, told by the factors that are there and the config."""
        factors = module.factors
        if "embedding_A" in factors or "embedding_B" in factors:
            _claim_embedding(claims, module, context.config)
            return
        if not _paired(claims, module, "A", "B"):
            return
        name, depth = peft_parameters.bare(module.name)
        if grouped_experts.is_stacked(name, factors):
            scale = rank_and_scaling(context.config, name)
            grouped_experts.claim_stacked(claims, name, factors, *scale, context.weight)
        elif depth or peft_parameters.targeted(name, context):
            parameter = peft_parameters.owner(module.name, context)
            scale = rank_and_scaling(context.config, f"{name}.{parameter}")
            peft_parameters.claim_parameter(claims, module, *scale, context)
        else:
            _claim_matrix(claims, module, context.config)

    def claim(self, tensors: Mapping[str, TensorRef], context: Context) -> Claims:
        claims = super().claim(tensors, context)
        if not claims.refused:
            scaled = partial(rank_and_scaling, context.config)
            grouped_experts.claim_grouped(claims, tensors, scaled, context.weight)
            say_no_alpha(claims, context.config)
        return claims

    def claim_rest(self, claims: Claims, tensors: Mapping[str, TensorRef], config: Config) -> None:
        claim_tokens(claims, tensors, config.get("trainable_token_indices"))
        for key, state in TRAINING_STATE.items():
            if config.get(key) not in (None, False):
                claims.told |= {name for name in tensors if f".{state}." in f"{name}."}
        super().claim_rest(claims, tensors, config)


# --- the forms of LoRA ------------------------------------------------------------------------------------------------


def rank_and_scaling(config: Config, key: str) -> tuple[int, float]:
    """Rank and scaling of a module or parameter, by its name."""
    rank: int = pattern_value(config.get("rank_pattern"), key, config["r"])
    alpha: float = pattern_value(config.get("alpha_pattern"), key, config["lora_alpha"])
    return rank, scaling_of(alpha, rank, bool(config.get("use_rslora")))


def say_no_alpha(claims: Claims, config: Config) -> None:
    """Refuse what would write the base again and call it a merge: 0 is no alpha, and a module has no other."""
    if config["lora_alpha"] == 0 and any(update.scaling == 0 for update in claims.updates):
        claims.problems.append(
            "lora_alpha in adapter_config.json is 0, so the adapter would change nothing; some exporters write 0 for "
            "what they do not know. Give the alpha of the training as alpha beside the adapter's path"
        )


def _paired(claims: Claims, module: Module, one: str, other: str) -> bool:
    """Whether both factors are there; says which is not."""
    names = {role.removesuffix("?"): key for key, role in reversed(list(LoraMethod.roles.items()))}
    missing = [role for role in (one, other) if role not in module.factors]
    if missing:
        claims.half(next(iter(module.factors.values())), module.key(names[missing[0]]))
        claims.told |= {ref.name for ref in module.factors.values()}
    return not missing


def _claim_matrix(claims: Claims, module: Module, config: Config) -> None:
    """LoRA on a Linear layer, a Conv1D or a convolution."""
    rank, scaling = rank_and_scaling(config, module.asked)
    if module.asked != module.name:
        # The out_proj of nn.MultiheadAttention: PEFT adds its update twice, when it merges and when it runs.
        scaling *= 2
    a, b = module.factors["A"], module.factors["B"]
    settings = (("fan_in_fan_out", True),) if config.get("fan_in_fan_out") else ()
    update = ModuleUpdate(module.name, "weight", "lora", (("A", a), ("B", b)), scaling, rank, settings=settings)
    if isinstance(config.get("use_bdlora"), dict):
        _claim_blocks(claims, module, config["use_bdlora"], update)
        return
    update = _with_magnitude(claims, module, config, update)
    claims.updates.append(_with_diagonal(claims, module, config, update))
    if 0 in a.shape or 0 in b.shape:
        return  # an empty tensor is told of as such
    if len(a.shape) < 2 or len(b.shape) != len(a.shape) or any(size != 1 for size in b.shape[2:]):
        claims.misfit(
            f"{a.name} {list(a.shape)} and {b.name} {list(b.shape)} are no factors: expected (r, in) and (out, r), or "
            "of a convolution (r, in, k…) and (out, r, 1…)"
        )
    else:
        _check_ranks(claims, a, b, rank, module.name)
    _claim_bias(claims, module, config, scaling)


def _claim_blocks(claims: Claims, module: Module, blocks: Mapping[str, Any], update: ModuleUpdate) -> None:
    """BD-LoRA: which factor is block-diagonal goes by the module's own name."""
    last = module.name.rpartition(".")[2]
    diagonal = [
        role
        for role, key in (("A", "target_modules_bd_a"), ("B", "target_modules_bd_b"))
        if any(pattern in last for pattern in blocks.get(key) or ())
    ]
    claims.updates.append(update)
    if extra := [ref for role, ref in module.factors.items() if role not in ("A", "B")]:
        claims.told |= {ref.name for ref in extra}
        claims.problems.append(f"{extra[0].name}: BD-LoRA knows neither DoRA nor biases")
    if len(diagonal) == 2:
        claims.misfit(f"{module.name}: use_bdlora says that both its factors are block-diagonal")
    elif len(update.factor("A").shape) != 2 or len(update.factor("B").shape) != 2:
        claims.misfit(f"{update.first} is no matrix: BD-LoRA is of Linear layers")
    elif diagonal:
        settings = (("blocks", blocks.get("nblocks", 1)), ("diagonal", diagonal[0]))
        claims.updates[-1] = update.changed(family="lora-blocks", settings=settings)


def _blocks_problems(key: str, value: Any) -> list[str]:
    if value is MISSING or value in (None, False):
        return []
    if not isinstance(value, dict) or not is_rank(value.get("nblocks", 1)):
        return [f"{key} must hold nblocks, a whole number above zero, found {reprlib.repr(value)}"]
    patterns = (value.get("target_modules_bd_a"), value.get("target_modules_bd_b"))
    if not all(of is None or (isinstance(of, list) and all(isinstance(item, str) for item in of)) for of in patterns):
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
        claims.misfit(
            f"{a.name} {list(a.shape)} and {b.name} {list(b.shape)} disagree on the rank: expected (r, in) and (out, r)"
            + hint
        )
    elif a.shape[0] != rank:
        claims.misfit(
            f"{a.name} has rank {a.shape[0]}, but adapter_config.json says {rank} for {name} (r and rank_pattern)"
        )


def _with_magnitude(claims: Claims, module: Module, config: Config, update: ModuleUpdate) -> ModuleUpdate:
    """DoRA, where the config says so and the lengths are there."""
    magnitude, wanted = module.factors.get("magnitude"), bool(config.get("use_dora"))
    if wanted and magnitude is None:
        claims.problems.append(
            f"adapter_config.json says use_dora, but {module.key('lora_magnitude_vector')} is missing"
        )
    if magnitude is None:
        return update
    if not wanted:
        claims.told.add(magnitude.name)
        claims.problems.append(
            f"{magnitude.name} is a length of DoRA, but adapter_config.json does not say use_dora; PEFT would ignore it"
        )
        return update
    # A convolution's is (1, out, 1…).
    flat = (
        dataclasses.replace(magnitude, shape=(math.prod(magnitude.shape),)) if magnitude.strides is None else magnitude
    )
    return dataclasses.replace(update, family="dora", factors=(*update.factors, ("magnitude", flat)))


def _with_diagonal(claims: Claims, module: Module, config: Config, update: ModuleUpdate) -> ModuleUpdate:
    """KaSA, where the config says so and d is there."""
    diagonal, wanted = module.factors.get("diagonal"), config.get("kasa_config") is not None
    if wanted and diagonal is None:
        claims.problems.append(f"adapter_config.json says kasa_config, but {module.key('lora_diag')} is missing")
    elif diagonal is not None and not wanted:
        claims.told.add(diagonal.name)
        claims.problems.append(
            f"{diagonal.name} is a diagonal of KaSA, but adapter_config.json does not say kasa_config; PEFT would "
            "ignore it"
        )
    elif diagonal is not None:
        factors = (*update.factors, ("diagonal", diagonal))
        return update.changed(family="kasa", factors=factors, of_base=(("W", "weight"),))
    return update


def _claim_bias(claims: Claims, module: Module, config: Config, scaling: float) -> None:
    bias = module.factors.get("bias")
    if bias is not None and config.get("lora_bias"):
        update = ModuleUpdate(module.name, "bias", "lora-bias", (("bias", bias),), scaling)
        claims.updates.insert(len(claims.updates) - 1, update)
    elif bias is not None:
        claims.told.add(bias.name)
        claims.problems.append(
            f"{bias.name} is a trained bias of lora_B, but adapter_config.json does not say lora_bias; PEFT would "
            "ignore it"
        )
    elif config.get("lora_bias"):
        claims.problems.append(f"adapter_config.json says lora_bias, but {module.key('lora_B.bias')} is missing")


def _claim_embedding(claims: Claims, module: Module, config: Config) -> None:
    """A is (r, V), B is (D, r), and the weight (V, D): B A is the update's transpose."""
    if not _paired(claims, module, "embedding_A", "embedding_B"):
        return
    for role in ("A", "B", "bias"):
        if role in module.factors:
            claims.told.add(module.factors[role].name)
            claims.problems.append(f"{module.factors[role].name} is there beside the factors of an embedding")
    rank, scaling = rank_and_scaling(config, module.name)
    a, b = module.factors["embedding_A"], module.factors["embedding_B"]
    update = ModuleUpdate(module.name, "weight", "lora", (("A", a), ("B", b)), scaling, rank, transposes=True)
    update = _with_magnitude(claims, module, config, update)
    claims.updates.append(_with_diagonal(claims, module, config, update))
    if 0 in a.shape or 0 in b.shape:
        return
    if len(a.shape) != 2 or len(b.shape) != 2:
        claims.misfit(f"{a.name} {list(a.shape)} and {b.name} {list(b.shape)}: expected (r, V) and (D, r)")
    else:
        _check_ranks(claims, a, b, rank, module.name)
