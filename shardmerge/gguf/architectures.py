"""The architectures that can be written, and what llama.cpp calls their tensors.

A row of the table is what llama.cpp and its converter agree on for one class of transformers: the name in the file,
which stored tensor becomes which, which of them are permuted or shifted, and which must be there. All else is refused
by name: a model that loads and talks nonsense is worse than none.
Source: gguf-py's tensor_mapping.py, and the converter's class of each architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: Tensors outside the layers, as transformers names them → as GGUF does, both without ``.weight``.
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
    """How a layer's experts are stored: one by one, and maybe also all of them in tensors of three dimensions."""

    #: Before an expert's number, within a layer.
    prefix: str
    #: Projection of an expert → GGUF's stack of them, in the order in which the converter writes these.
    stacks: Mapping[str, str]
    #: (E, 2 f, d) and (E, d, f): gate and up in one tensor, and down.
    fused: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """One class of transformers as llama.cpp has it."""

    #: transformers' class, the first of ``architectures`` in config.json.
    hf_class: str
    #: ``model_type`` in config.json (of its text part where there is one).
    model_type: str
    #: ``general.architecture``.
    name: str
    #: A layer's tensors → GGUF's, both without ``.weight`` or ``.bias`` and the layer's number.
    layer: Mapping[str, str]
    experts: Experts | None = None
    #: Tensors of a layer whose rows are turned from halves into pairs within each head: rotary embeddings.
    permuted: frozenset[str] = frozenset()
    #: 1 is added to every norm's weight: what the model multiplies with is 1 + weight.
    shifts_norms: bool = False
    #: Whether there may be an output head of its own.
    has_head: bool = True
    #: Rope types beside ``default`` that the file can say.
    rope_types: frozenset[str] = frozenset()
    #: llama.cpp's names of the pre-tokenizers that were tested with it. transformers may give a tokenizer.json of
    #: another family the pre-tokenizer of the architecture's own, so that what a name means depends on both.
    pre_tokenizers: frozenset[str] = frozenset()
    #: Whether a tokenizer.model counts, where there is one.
    sentencepiece: bool = True
    #: Vision and sound are left out; the text model's tensors have this in their names.
    multimodal: bool = False
    #: Tensors outside the layers.
    model: Mapping[str, str] = field(default_factory=lambda: _MODEL)


_LLAMA_ROPE = frozenset({"linear", "yarn", "llama3"})
_QWEN_ROPE = frozenset({"linear", "yarn"})
_LLAMA_LAYER = {**_ATTENTION, **_NORM, **_MLP}
_GEMMA3 = {**_ATTENTION, **_HEAD_NORMS, **_GEMMA_NORMS, **_MLP}
_QWEN_PRE = frozenset({"qwen2"})
_QK = frozenset({"self_attn.q_proj", "self_attn.k_proj"})

ARCHITECTURES: Mapping[str, Architecture] = {
    architecture.hf_class: architecture
    for architecture in (
        Architecture(
            "LlamaForCausalLM",
            "llama",
            "llama",
            _LLAMA_LAYER,
            permuted=_QK,
            rope_types=_LLAMA_ROPE,
            pre_tokenizers=frozenset({"smollm", "llama-bpe", "smaug-bpe"}),
        ),
        Architecture("MistralForCausalLM", "mistral", "llama", _LLAMA_LAYER, permuted=_QK, rope_types=_LLAMA_ROPE),
        Architecture(
            "MixtralForCausalLM",
            "mixtral",
            "llama",
            {**_ATTENTION, **_NORM, "block_sparse_moe.gate": "ffn_gate_inp"},
            experts=Experts(
                "block_sparse_moe.experts", {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
            ),
            permuted=_QK,
            rope_types=_LLAMA_ROPE,
        ),
        Architecture(
            "Qwen2ForCausalLM", "qwen2", "qwen2", _LLAMA_LAYER, rope_types=_QWEN_ROPE, pre_tokenizers=_QWEN_PRE
        ),
        Architecture(
            "Qwen3ForCausalLM",
            "qwen3",
            "qwen3",
            {**_LLAMA_LAYER, **_HEAD_NORMS},
            rope_types=_QWEN_ROPE,
            pre_tokenizers=_QWEN_PRE,
        ),
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
            rope_types=_QWEN_ROPE,
            pre_tokenizers=_QWEN_PRE,
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
        Architecture(
            "Gemma3ForCausalLM", "gemma3_text", "gemma3", _GEMMA3, shifts_norms=True, rope_types=frozenset({"linear"})
        ),
        Architecture(
            "Gemma3ForConditionalGeneration",
            "gemma3_text",
            "gemma3",
            _GEMMA3,
            shifts_norms=True,
            rope_types=frozenset({"linear"}),
            multimodal=True,
        ),
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
