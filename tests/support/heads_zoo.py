"""Tiny models of every architecture whose head a merge may write, and adapters that PEFT trained with such a head.

A config is made small by what its numbers are called, whatever the architecture is. Those that cannot be built so, or
that transformers itself does not load again from what it saves, are named with the reason (`Unbuilt`).
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardmerge.key_mapping import table as tables
from tests.support import zoo
from tests.support.peft_oracle import _new_folder as new_folder

LABELS = 3
#: Patterns of a config's keys → what makes the model small. The first that fits is taken.
_SMALL: tuple[tuple[str, Any], ...] = (
    (r"(num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_decoder_layers|num_encoder_layers)", 2),
    (r"(num_key_value_heads|num_kv_heads|n_kv_heads|kv_n_heads)", 2),
    (r"(num_attention_heads|n_heads?|num_heads|(en|de)coder_attention_heads|num_(en|de)coder_attention_heads)", 4),
    (r"(hidden_size|d_model|dim|n_embd|embed_dim|hidden_dim|embedding_size|word_embed_proj_dim|emb_dim|d_embed)", 32),
    (r"(head_dim|d_kv|d_head|attention_head_dim|global_head_dim|rotary_dim)", 8),
    (r"(intermediate_size|ffn_dim|d_ff|d_inner|n_inner|(en|de)coder_ffn_dim|ffn_hidden_size|inner_dim)", 48),
    (
        r"(moe_intermediate_size|shared_expert_intermediate_size|expert_dim|intermediate_size_mlp|expert_ffn_hidden_size)",
        28,
    ),
    (r"vocab_size", 64),
    (r"(max_position_embeddings|n_positions|max_sequence_length|max_seq_len|seq_length)", 64),
    # Every expert sees every token: which ones are chosen would hang on the last bit of a router's weight.
    (
        r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_experts_per_tok|moe_k|moe_topk|top_k_experts)",
        4,
    ),
    (r"(q_lora_rank|kv_lora_rank)", 16),
    (r"(qk_rope_head_dim|qk_nope_head_dim|v_head_dim)", 8),
    (r"(n_shared_experts|num_shared_experts|n_group|topk_group|first_k_dense_replace|moe_num_shared_experts)", 1),
)


_WHOLE = "ForConditionalGeneration"
#: What has no default, and numbers that must go together, by config class.
_GIVEN: Mapping[str, Mapping[str, Any]] = {
    "EsmConfig": {"vocab_size": 64},
    "EsmcConfig": {"num_key_value_heads": 4},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "HunYuanDenseV1Config": {"head_dim": 8},
    "HunYuanMoEV1Config": {"head_dim": 8},
    "MinistralConfig": {"head_dim": 8},
    "NemotronConfig": {"num_key_value_heads": 2, "head_dim": 8},
}
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "decoder_start_token_id": 0}


class UnbuiltError(Exception):
    """A model of this architecture cannot be built tiny, and why."""


@dataclass(frozen=True)
class Case:
    """A base's class, and the class that does the task over its checkpoint."""

    base: str
    task: str
    head: str


def cases() -> Iterator[Case]:
    """Every class of the table that does a task, over what checkpoints of its type are of."""
    known = tables.table()
    for model_type, tasks in sorted(known.tasks.items()):
        roles = known.roles.get(model_type, {})
        # Of a model in two halves, the checkpoint with both.
        whole = (name for name, of in known.architectures.items() if of.model_type == model_type and _WHOLE in name)
        base = next(whole, None) or roles.get("head") or roles["model"]
        for task, head in sorted(tasks.items()):
            if base != head:
                yield Case(base, task, head)


def _small(config: dict[str, Any]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            changed[key] = _small(value)
        elif type(value) is int:
            wanted = next((size for pattern, size in _SMALL if re.fullmatch(pattern, key)), None)
            if wanted is not None and value:
                changed[key] = wanted
    if "kv_lora_rank" in config:  # latent attention has as many keys as queries
        changed["num_key_value_heads"] = 4
    for key in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if isinstance(config.get(key), list):
            changed[key] = config[key][-2:]
    return changed


@cache
def base_folder(base: str) -> Path:
    """A random checkpoint of a class, as transformers saves it."""
    library = zoo.transformers()
    cls = getattr(library, base)
    kind = cls.config_class
    try:
        config = kind(**{**_small(kind().to_dict()), **_SPECIAL, **_GIVEN.get(kind.__name__, {})})
        with torch.random.fork_rng():
            torch.manual_seed(5)
            model = cls(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
    except Exception as error:  # whatever a modeling file raises
        raise UnbuiltError(f"{base}: {type(error).__name__}: {' '.join(str(error).split())[:150]}") from error
    folder = new_folder(f"headless-{base}")
    model.save_pretrained(folder)
    return folder


def inputs() -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[*range(3, 14), _SPECIAL["eos_token_id"]]])}


def answers(model: Any) -> list[Tensor]:
    """Everything that a head computes: logits, or the two ends of a span."""
    with torch.inference_mode():
        found = model.eval()(**inputs())
    keys = ("logits", "start_logits", "end_logits")
    return [found[key] for key in keys if key in found]


def loaded(head: str, folder: Path, **settings: Any) -> tuple[Any, list[str]]:
    """A model, and the names of weights that transformers made up."""
    model, info = getattr(zoo.transformers(), head).from_pretrained(folder, output_loading_info=True, **settings)
    return model, sorted(info["missing_keys"])


def train(case: Case, folder: Path, labels: int = LABELS) -> tuple[list[Tensor], list[str]]:
    """Write an adapter with its head; what base + adapter compute, and the weights that nobody stores."""
    peft = zoo.peft_library()
    number = {} if case.task == "QUESTION_ANS" else {"num_labels": labels}
    saved = sorted({name.split(".")[0] for name in tables.table().architectures[case.head].head})
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(6)
        try:
            model, _ = loaded(case.head, base_folder(case.base), **number)
            config = peft.LoraConfig(
                task_type=case.task, r=4, lora_alpha=10, target_modules="all-linear", modules_to_save=saved
            )
            config.exclude_modules = saved
            trained = peft.get_peft_model(model, config)
            with torch.no_grad():
                for parameter in trained.parameters():
                    if parameter.requires_grad:
                        parameter += 0.1 * torch.randn_like(parameter)
            trained.save_pretrained(folder)
            again, missing = loaded(case.head, base_folder(case.base), **number)
            wrapped = peft.PeftModel.from_pretrained(again, folder)
            expected = answers(wrapped)
        except UnbuiltError:
            raise
        except Exception as error:
            raise UnbuiltError(f"{case.head}: {type(error).__name__}: {' '.join(str(error).split())[:150]}") from error
    return expected, [name for name in missing if name.split(".")[0] not in saved]


def config_of(folder: Path) -> Mapping[str, Any]:
    return dict(json.loads((folder / "config.json").read_text()))
