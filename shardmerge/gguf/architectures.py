"""The architectures that can be written, and llama.cpp's names of their tensors.

Every other architecture or tensor is refused by name: a model that loads and talks nonsense is worse than none.
Source: gguf-py's tensor_mapping.py, and the converter's class of each architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

#: Tensors outside the layers: transformers' names → GGUF's, both without ``.weight``.
_MODEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_NORM = {"post_attention_layernorm": "ffn_norm"}
_GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True, slots=True)
class Experts:
    """How a layer's experts are stored: one by one, or also fused in tensors of three dimensions."""

    #: The part of a tensor's name in a layer before the expert's number.
    prefix: str
    #: Projection of an expert → GGUF's stack, in the converter's order.
    stacks: Mapping[str, str]
    #: Whether (E, 2 f, d), gate and up, and (E, d, f), down, may be stored.
    fused: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """One class of transformers, in llama.cpp's terms."""

    #: The first of ``architectures`` in config.json.
    hf_class: str
    #: ``model_type`` in config.json, or in its text part.
    model_type: str
    #: ``general.architecture``.
    name: str
    #: A layer's tensors → GGUF's names, both without ``.weight`` or ``.bias`` and the layer's number.
    layer: Mapping[str, str]
    experts: Experts | None = None
    #: Tensors of a layer whose rows are reordered from halves to pairs within each head (rotary embeddings).
    permuted: frozenset[str] = frozenset()
    #: Whether 1 is added to every norm's weight, because the model multiplies by 1 + weight.
    shifts_norms: bool = False
    #: Whether there may be a separate output head.
    has_head: bool = True
    #: Rope types beside ``default`` that a file can express.
    rope_types: frozenset[str] = frozenset()
    #: llama.cpp's names of the pre-tokenizers that were tested with it. transformers may replace the pre-tokenizer of a
    #: tokenizer.json by the architecture's own, so the meaning of a name depends on both.
    pre_tokenizers: frozenset[str] = frozenset()
    #: Whether a tokenizer.model is used if there is one.
    sentencepiece: bool = True
    #: Whether it has vision or audio parts, which are left out.
    multimodal: bool = False
    #: Tensors outside the layers.
    model: Mapping[str, str] = field(default_factory=lambda: _MODEL)


_LLAMA_LAYER = {**_ATTENTION, **_NORM, **_MLP}
_LLAMA_PRE = frozenset({"smollm", "llama-bpe", "smaug-bpe"})
#: Arguments of `Architecture` that several rows share.
_LLAMA: Mapping[str, Any] = {
    "permuted": frozenset({"self_attn.q_proj", "self_attn.k_proj"}),
    "rope_types": frozenset({"linear", "yarn", "llama3"}),
}
_QWEN: Mapping[str, Any] = {"rope_types": frozenset({"linear", "yarn"}), "pre_tokenizers": frozenset({"qwen2"})}
_GEMMA3: Mapping[str, Any] = {
    "layer": {**_ATTENTION, **_HEAD_NORMS, **_GEMMA_NORMS, **_MLP},
    "shifts_norms": True,
    "rope_types": frozenset({"linear"}),
}

ARCHITECTURES: Mapping[str, Architecture] = {
    architecture.hf_class: architecture
    for architecture in (
        Architecture("LlamaForCausalLM", "llama", "llama", _LLAMA_LAYER, **_LLAMA, pre_tokenizers=_LLAMA_PRE),
        Architecture("MistralForCausalLM", "mistral", "llama", _LLAMA_LAYER, **_LLAMA),
        Architecture(
            "MixtralForCausalLM",
            "mixtral",
            "llama",
            {**_ATTENTION, **_NORM, "block_sparse_moe.gate": "ffn_gate_inp"},
            experts=Experts(
                "block_sparse_moe.experts", {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
            ),
            **_LLAMA,
        ),
        Architecture("Qwen2ForCausalLM", "qwen2", "qwen2", _LLAMA_LAYER, **_QWEN),
        Architecture("Qwen3ForCausalLM", "qwen3", "qwen3", {**_LLAMA_LAYER, **_HEAD_NORMS}, **_QWEN),
        Architecture(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            "qwen3moe",
            {**_ATTENTION, **_HEAD_NORMS, **_NORM, "mlp.gate": "ffn_gate_inp"},
            experts=Experts(
                "mlp.experts",
                {"down_proj": "ffn_down_exps", "gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps"},
                fused=True,
            ),
            **_QWEN,
            sentencepiece=False,
        ),
        Architecture(
            "Gemma2ForCausalLM",
            "gemma2",
            "gemma2",
            {**_ATTENTION, **_GEMMA_NORMS, **_MLP},
            shifts_norms=True,
            has_head=False,
        ),
        Architecture("Gemma3ForCausalLM", "gemma3_text", "gemma3", **_GEMMA3),
        Architecture("Gemma3ForConditionalGeneration", "gemma3_text", "gemma3", **_GEMMA3, multimodal=True),
        Architecture(
            "Phi3ForCausalLM",
            "phi3",
            "phi3",
            {
                "input_layernorm": "attn_norm",
                "self_attn.qkv_proj": "attn_qkv",
                "self_attn.o_proj": "attn_output",
                **_NORM,
                "mlp.gate_up_proj": "ffn_up",
                "mlp.down_proj": "ffn_down",
            },
            rope_types=frozenset({"longrope"}),
        ),
    )
}
