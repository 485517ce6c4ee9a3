"""Every multimodal class of transformers whose text model has a causal class of its own, and checkpoints of the two.

Which module of the one is which of the other is asked of the models themselves: the text model is an instance of one
class in both, and both know their output head. So no table of ours is part of the oracle. The multimodal model is built
on the meta device from its default config; the text model is small and real.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers.initialization import no_init_weights
from transformers.modeling_utils import PreTrainedModel

from shardmerge.key_mapping import table as tables
from tests.support import names_zoo
from tests.support.names_zoo import State
from tools import bake_names

_ANSWERS = re.compile(r"ForConditionalGeneration$|ForCausalLM$|Reasoning_V3$")
#: Small sizes by the names that configs have for them.
_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "embed_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "block_ff_dim", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_intermediate_size"), 24),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), 61),
    **dict.fromkeys(("num_attention_heads", "attention_heads", "layers"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "top_k_experts", "moe_topk"), 2),
    **dict.fromkeys(("linear_num_key_heads",), 2),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 12),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank"), 8),
    **dict.fromkeys(("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups"), 4),
    "num_hidden_layers": 4,
    "max_position_embeddings": 64,
}
#: What some types demand besides.
_OF_TYPE: Mapping[str, Mapping[str, Any]] = {
    "deepseek_v3": {"num_key_value_heads": 4, "n_group": 1, "topk_group": 1},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16},
    "laguna": {"num_attention_heads_per_layer": [4, 4, 4, 4]},
    "zaya": {"num_experts_per_tok": 1},
    "qwen4_exp_text": {
        "indexer_kv_heads": 1,
        "indexer_n_heads": 2,
        "indexer_head_dim": 8,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
}


@dataclass(frozen=True)
class Pair:
    """A multimodal class and the class of its text model alone; paths of that model and of the output head in each."""

    around: Any
    alone: type
    model: tuple[str, str]
    head: tuple[str, str]

    def inside(self, name: str) -> str:
        """What the multimodal class calls a parameter of the text-only class."""
        for mine, theirs in (self.model, self.head):
            if mine and theirs and name.startswith(f"{mine}."):
                return theirs + name[len(mine) :]
        raise AssertionError(f"{name} is in neither the text model nor its head")

    def all_inside(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return {self.inside(name): tensor for name, tensor in state.items()}


@cache
def multimodal() -> tuple[str, ...]:
    """The classes that the table says have a text model inside and answer in text; it asks no library, so is quick."""
    found = tables.table().architectures
    return tuple(
        name
        for name, architecture in sorted(found.items())
        if _ANSWERS.search(name) and any(part.is_text for part in tables.parts(architecture, {}))
    )


def multimodal_of_transformers() -> set[str]:
    """The same, as transformers' classes themselves say."""
    found = bake_names.classes()
    with_text = {name for name, cls in found.items() if "text_config" in (_config_class(cls).sub_configs or {})}
    return {name for name in with_text if _ANSWERS.search(name) and _text_class(name) is not None}


def _config_class(cls: Any) -> Any:
    return bake_names._config_class(cls)


@cache
def _text_class(name: str) -> type | None:
    """The causal class of the default text config's class: by transformers' mapping, or beside the multimodal one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    cls = getattr(transformers, name)
    config = type(getattr(bake_names._default(_config_class(cls)), "text_config", None))
    if config in MODEL_FOR_CAUSAL_LM_MAPPING:
        found = MODEL_FOR_CAUSAL_LM_MAPPING[config]
        return found if _config_class(found) is config else None
    beside = vars(sys.modules[cls.__module__])
    causal = (of for key, of in beside.items() if key.endswith("ForCausalLM") and inspect.isclass(of))
    return next((of for of in causal if _config_class(of) is config), None)


@cache
def pair(name: str) -> Pair:
    """The two classes of a multimodal class, built on the meta device. `LookupError` where there is no such pair."""
    bake_names.quiet()
    around = bake_names.build(getattr(transformers, name))
    alone = _text_class(name)
    if alone is None:
        raise LookupError(f"transformers has no causal class of the text model of {name}")
    with torch.device("meta"), no_init_weights():
        text: Any = alone(around.config.text_config)
    path, module = next(
        (path, module) for path, module in text.named_modules() if path and isinstance(module, PreTrainedModel)
    )
    paths = [where for where, other in around.named_modules() if type(other) is type(module)]
    if len(paths) != 1:
        raise LookupError(f"{name} holds {type(module).__name__} {len(paths)} times")
    # A class that holds the text-only class whole need not say that its head is an output head.
    whole = [where for where, other in around.named_modules() if type(other) is alone]
    head = f"{whole[0]}.{_head(text)}" if whole else _head(around)
    return Pair(around, alone, (path, paths[0]), (_head(text), head))


def _head(model: Any) -> str:
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), "")


# --- names ------------------------------------------------------------------------------------------------------------


def spoken_alone(of: Pair, state: State) -> State:
    """The multimodal model's text tensors by the names of the text-only class."""
    found: State = {}
    for mine, theirs in (of.model, of.head):
        for name, tensor in state.items():
            if mine and theirs and name.startswith(f"{theirs}."):
                found[mine + name[len(theirs) :]] = tensor
    return found


# --- small models -----------------------------------------------------------------------------------------------------


def small(of: Pair) -> Any:
    """A small model of the text-only class with random weights, in float32."""
    return small_of(of.alone, of.around.config.text_config)


def small_of(cls: Any, config: Any) -> Any:
    """A small model of a class, with what its config says but of sizes."""
    settings = config.to_dict()
    changed: dict[str, Any] = {key: size for key, size in _SIZES.items() if settings.get(key)}
    layers = settings.get("layer_types")
    if isinstance(layers, list) and layers:
        changed["layer_types"] = _both_kinds(layers, changed["num_hidden_layers"])
    if "pad_token_id" in settings:
        changed["pad_token_id"] = 0
    made = type(config)(**{**_plain(settings), **changed, **_OF_TYPE.get(config.model_type, {})})
    made.tie_word_embeddings = False
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model: Any = cls(made)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.float().eval()


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Without what follows from other settings."""
    follows = (
        "layer_types",
        "mlp_layer_types",
        "per_layer_config",
        "no_rope_layers",
        "moe_layers",
        "layers_block_type",
    )
    others = ("dtype", "architectures", "activation_sparsity_pattern", "pad_token_id", "bos_token_id", "eos_token_id")
    return {key: value for key, value in settings.items() if key not in (*follows, *others)}


def _both_kinds(layers: list[str], count: int) -> list[str]:
    kinds = list(dict.fromkeys(layers))
    return [kinds[i % len(kinds)] for i in range(count)]


def write_around(folder: Path, of: Pair, text: Any, layout: str) -> State:
    """A multimodal checkpoint with that text model in it, as modules are called or as transformers stores it."""
    others = {
        name: tensor.float()
        for name, tensor in names_zoo.weights(of.around).items()
        if not any(path and name.startswith(f"{path}.") for path in (of.model[1], of.head[1]))
    }
    state = {**others, **of.all_inside(weights_of(text))}
    stored = names_zoo.on_disk(of.around, dict(state)) if layout == "disk" else state
    config = names_zoo.config_of(of.around)
    config["text_config"] = {**json.loads(text.config.to_json_string()), "tie_word_embeddings": False}
    config["tie_word_embeddings"] = False
    return write(folder, stored, config)


def write(folder: Path, stored: State, config: Mapping[str, Any]) -> State:
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.detach().clone().contiguous() for name, tensor in stored.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return stored


def weights_of(model: Any) -> State:
    """Parameters by name, without the buffers that some modules save."""
    return {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}
