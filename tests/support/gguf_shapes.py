"""A small Llama, as a layout of a GGUF file sees it: its config and its tensors' shapes."""

from __future__ import annotations

from typing import Any

from shardmerge.spec.tensors import TensorRef

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (96, 64),
    "model.norm.weight": (64,),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.0.post_attention_layernorm.weight": (64,),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.self_attn.k_proj.weight": (32, 64),
    "model.layers.0.self_attn.v_proj.weight": (32, 64),
    "model.layers.0.self_attn.o_proj.weight": (64, 64),
    "model.layers.0.mlp.gate_proj.weight": (80, 64),
    "model.layers.0.mlp.up_proj.weight": (80, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 80),
}


def refs(shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> list[TensorRef]:
    return [TensorRef(name, "file", dtype, shape, 0, 0) for name, shape in shapes.items()]
