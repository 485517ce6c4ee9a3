"""PEFT's LoRA files → updates: plain, DoRA, embeddings, convolutions, fused experts, trained biases and tokens.

Source: peft/tuners/lora/config.py, model.py and layer.py, 0.21.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from functools import partial
from typing import Any

from shardmerge.adapters.claims import Claims
from shardmerge.adapters.formats import checks, grouped_experts, lora_forms, peft_parameters
from shardmerge.adapters.formats.peft_method import BELOW_WRAPPERS, Context, Module, PeftMethod
from shardmerge.adapters.formats.peft_targets import NOT_COVERED
from shardmerge.adapters.formats.wholes import claim_tokens, is_embedding, token_problems
from shardmerge.key_mapping.naming import module_name
from shardmerge.spec.tensors import TensorRef

_CANNOT = "which cannot be merged"
#: Initialisations that leave the base as it is, compared as PEFT compares them.
_PLAIN = frozenset({"eva", "orthogonal"})
#: Those that PEFT takes in any case.
_PLAIN_IN_ANY_CASE = frozenset({"gaussian", "mica"})
_PISSA = re.compile(r"pissa(_niter_\d+)?")
_GIVE_BASE = (
    "give as base the weights that the training had beside the factors, and name init_lora_weights in the adapter's "
    "ignore_keys"
)
_CONVERT = (
    "Convert the adapter with PEFT where it was trained (save_pretrained with "
    f"path_initial_model_for_weight_conversion), which sets init_lora_weights to true; or {_GIVE_BASE}"
)


def initialisation_problems(key: str, value: Any) -> list[str]:
    """A check of ``init_lora_weights``, which refuses an initialisation that moves the base, or an unknown one.

    An initialisation that takes the first B A out of W trains B A beside W - s · B₀ A₀, so W + s · B A is not what was
    trained. PEFT repeats it when it loads the adapter (pissa, olora), cannot (corda: B₀ A₀ come from data), or does not
    (lora_ga: from gradients). Source: `update_layer`, peft/tuners/lora/layer.py, 0.21.2.
    """
    if value is checks.MISSING or value is None or isinstance(value, bool):
        return []
    if not isinstance(value, str):
        return [_unknown_init(key, value)]
    if value in _PLAIN or value.lower() in _PLAIN_IN_ANY_CASE:
        return []
    if value == "loftq":
        return [
            f"{key}: 'loftq' puts quantised weights in the place of the base's, in training and whenever PEFT loads "
            "the adapter, so that these weights plus s·B·A are not what was trained. No conversion undoes that: "
            f"{_GIVE_BASE} (PEFT's unload() returns them once it has loaded the adapter on this base)"
        ]
    if _PISSA.fullmatch(value) or value.startswith("corda") or value.lower() == "olora" or value == "lora_ga":
        return [
            f"{key}: {value!r:.80} takes the first B·A out of the base's weights, so that these weights plus s·B·A are "
            f"not what was trained. {_CONVERT}"
        ]
    return [_unknown_init(key, value)]


def _unknown_init(key: str, value: Any) -> str:
    return (
        f"{key}: {reprlib.repr(value)} is an initialisation that is unknown to this version, and to PEFT 0.21.2, which "
        "does not load it; whether it moves the base's weights is not known"
    )


class LoraMethod(PeftMethod):
    peft_type = "LORA"
    title = "LoRA, rsLoRA, DoRA"
    note = (
        "Linear, Conv1D, convolutions, embeddings, `nn.MultiheadAttention`, fused experts (`target_parameters`); "
        "BD-LoRA, MiCA, MonteCLoRA, VeLoRA, KaSA; `lora_bias`, trained biases and tokens, `modules_to_save`"
    )
    paper = "arXiv:2106.09685, 2312.03732, 2402.09353"
    roles = lora_forms.ROLES
    settings = {
        "r": checks.RANK,
        "lora_alpha": checks.NUMBER,
        "rank_pattern": checks.RANK_PATTERN,
        "alpha_pattern": checks.NUMBER_PATTERN,
        "use_rslora": checks.FLAG,
        "use_bdlora": lora_forms.blocks_problems,
        "use_dora": checks.FLAG,
        "lora_bias": checks.FLAG,
        "target_parameters": checks.checked(checks.is_strings, "a list of strings"),
        "lora_B_layout": peft_parameters.flat_problems,
        "unsloth_fused_expert_lora": peft_parameters.marker_problems,
        "ensure_weight_tying": checks.FLAG,
        "trainable_token_indices": token_problems,
        "init_lora_weights": initialisation_problems,
        "kasa_config": checks.SUBCONFIG,
        # The one that PEFT takes for "not set" where it is false.
        "monteclora_config": lambda key, value: [] if value is False else checks.SUBCONFIG(key, value),
        "velora_config": checks.SUBCONFIG,
    }
    ignorable = frozenset({"init_lora_weights"})
    inert = frozenset(
        {
            *("corda_config", "eva_config", "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config"),
            *("megatron_core", "merge_weights", "qalora_group_size"),  # merge_weights is when PEFT 0.2 merges by itself
        }
    )
    refused = {
        "layer_replication": "replicated layers: the model has layers that the base does not store; build that base "
        "first",
        "alora_invocation_tokens": f"activated LoRA acts on the tokens after its invocation only, {_CANNOT}; serve it "
        "with PEFT or vLLM",
        "arrow_config": f"Arrow routing chooses an adapter per token, {_CANNOT}",
        "enable_lora": "LoRA of a part of a layer's outputs, of PEFT 0.2, whose factors are of another form",
        "use_qalora": "QALoRA pools the input by groups, so B A is not the update; PEFT cannot merge it either",
    }

    def check_config(self, config: checks.Config) -> list[str]:
        if len(names := lora_forms.variants(config)) > 1:
            return [f"adapter_config.json sets {' and '.join(names)}, but PEFT knows no adapter that is more than one"]
        return peft_parameters.contradictions(config)

    def left_out(self, module: str, context: Context) -> str:
        """A target is a module, one with targeted parameters, or an output head that was tied to a target."""
        name = peft_parameters.bare(module)[0]
        parameters_alone = context.config.get("target_parameters") and not context.config.get("target_modules")
        why = NOT_COVERED if parameters_alone else super().left_out(name, context)
        if not why or peft_parameters.targeted(name, context):
            return ""
        if context.config.get("ensure_weight_tying") and is_embedding(name):
            return ""
        # Other trainers' targets may be the experts as a whole, or a part of them by its usual name.
        by_other_names = (
            not parameters_alone
            and why == NOT_COVERED
            and any(not super(LoraMethod, self).left_out(other, context) for other in grouped_experts.names_of(name))
        )
        return "" if by_other_names else why

    def weighs(self, config: checks.Config) -> bool:
        return not config.get("use_dora")

    def composes(self, config: checks.Config) -> bool:
        return not config.get("use_dora")

    def configured_name(self, module: Module, context: Context) -> tuple[str, str]:
        """Each ``.base_layer.`` is of wrappers of the enclosing module's parameters, or of an nn.MultiheadAttention.

        Of modules with modules in them PEFT wraps only nn.MultiheadAttention, and with it ``out_proj``, with the same
        rank and alpha.
        """
        configured = module.configured
        names = BELOW_WRAPPERS.split(module_name(module.prefix))  # part, wrappers, part …
        for index in range(1, len(names), 2):
            around, depth = "".join(names[:index:2]), names[index].count(".base_layer")
            parameters = peft_parameters.targeted(around, context)
            if len(parameters) == depth:
                continue
            if parameters or names[index:] != [".base_layer", ".out_proj"] or not self._is_attention(around, context):
                return "", (
                    f"{around} is wrapped {depth} times, but adapter_config.json's target_parameters name "
                    f"{len(parameters)} of its parameters, and it is not an nn.MultiheadAttention that is a target"
                )
            configured = around
        return configured, ""

    def _is_attention(self, module: str, context: Context) -> bool:
        """Whether PEFT takes a module for an nn.MultiheadAttention: a target that has q, k and v as one."""
        base = context.base
        fits = not base.is_known or all(base.stored(module, name) for name in ("in_proj_weight", "out_proj.weight"))
        return fits and not self.left_out(module, context)

    def claim_module(self, claims: Claims, module: Module, context: Context) -> None:
        """The factors and the config decide which form of LoRA it is."""
        factors = module.factors
        if "embedding_A" in factors or "embedding_B" in factors:
            lora_forms.claim_embedding(claims, module, context.config)
            return
        if not lora_forms.paired(claims, module, "A", "B"):
            return
        name, depth = peft_parameters.bare(module.name)
        if grouped_experts.is_stacked(name, factors):
            scale = lora_forms.rank_and_scaling(context.config, name)
            grouped_experts.claim_stacked(claims, name, factors, *scale, context.base.weight)
        elif depth or peft_parameters.targeted(name, context):
            parameter = peft_parameters.owner(module.name, context)
            scale = lora_forms.rank_and_scaling(context.config, f"{name}.{parameter}")
            peft_parameters.claim_parameter(claims, module, *scale, context)
        else:
            lora_forms.claim_matrix(claims, module, context.config)

    def claim(self, tensors: Mapping[str, TensorRef], context: Context) -> Claims:
        claims = super().claim(tensors, context)
        if not claims.refused:
            scaled = partial(lora_forms.rank_and_scaling, context.config)
            grouped_experts.claim_grouped(claims, tensors, scaled, context.base.weight)
            lora_forms.report_zero_alpha(claims, context.config)
        return claims

    def claim_rest(self, claims: Claims, tensors: Mapping[str, TensorRef], config: checks.Config) -> None:
        claim_tokens(claims, tensors, config.get("trainable_token_indices"))
        for key, state in lora_forms.TRAINING_STATE.items():
            if config.get(key) not in (None, False):
                claims.account_for(ref for name, ref in tensors.items() if f".{state}." in f"{name}.")
        super().claim_rest(claims, tensors, config)
