"""Key-values of a GGUF file against its own tensors, and against config.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from shardmerge.verification.gguf_header import GgufHeader

#: Without these no program loads the file, or it guesses. ``{}`` is the architecture.
_REQUIRED = (
    "general.file_type",
    "general.quantization_version",
    "{}.block_count",
    "{}.context_length",
    "{}.embedding_length",
    "{}.feed_forward_length",
    "{}.attention.head_count",
    "{}.attention.head_count_kv",
    "{}.attention.layer_norm_rms_epsilon",
    "tokenizer.ggml.model",
    "tokenizer.ggml.tokens",
)
#: A key without the architecture → what config.json calls it, the first that is there.
_CONFIG: Mapping[str, tuple[str, ...]] = {
    "block_count": ("num_hidden_layers",),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "feed_forward_length": ("intermediate_size",),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads",),
    "attention.key_length": ("head_dim",),
    "attention.value_length": ("head_dim",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps",),
    "attention.sliding_window": ("sliding_window",),
    "expert_count": ("num_local_experts", "num_experts"),
    "expert_used_count": ("num_experts_per_tok",),
}
#: What a float32 may be off.
_FLOAT32 = 2.0**-24


def contradictions(header: GgufHeader, config: Mapping[str, Any]) -> Iterator[str]:
    """What must be there and is not, what says other shapes than the tensors have, or other numbers than the config."""
    architecture = header.values.get("general.architecture", (0, None))[1]
    if not isinstance(architecture, str):
        yield "there is no general.architecture"
        return
    missing = [key for key in (key.format(architecture) for key in _REQUIRED) if key not in header.values]
    if missing:
        yield f"there is no {', '.join(missing)}"
        return
    yield from _against_config(header, architecture, config)
    layers = {name.split(".")[1] for name in header.tensors if name.startswith("blk.") and name.count(".") > 1}
    count = header.whole(f"{architecture}.block_count")
    if layers != {str(layer) for layer in range(len(layers))} or len(layers) != count:
        yield f"{architecture}.block_count is {count}, but there are tensors of {len(layers)} layers"
    shapes = _shapes(header, architecture)
    for name, info in header.tensors.items():
        wanted = shapes.get(_kind(name))
        if wanted is not None and None not in wanted and info.shape != wanted:
            yield f"{name} has shape {list(info.shape)}; the key-values make it {list(wanted)}"


def _against_config(header: GgufHeader, architecture: str, config: Mapping[str, Any]) -> Iterator[str]:
    text = config.get("text_config")
    settings = {**config, **(text if isinstance(text, dict) else {})}
    for key, names in _CONFIG.items():
        found = header.values.get(f"{architecture}.{key}", (0, None))[1]
        name = next((name for name in names if settings.get(name) is not None), None)
        if name is None or not isinstance(found, (int, float)) or not isinstance(settings[name], (int, float)):
            continue
        if abs(found - settings[name]) > abs(settings[name]) * _FLOAT32:
            yield f"{architecture}.{key} is {found}, but config.json says {name} {settings[name]}"


def _kind(name: str) -> str:
    """``blk.3.attn_q.weight`` → ``attn_q.weight``."""
    return name.split(".", 2)[2] if name.startswith("blk.") and name.count(".") > 1 else name


def _shapes(header: GgufHeader, architecture: str) -> dict[str, tuple[int | None, ...]]:
    """Shapes as torch has them, by `_kind`; None where nothing says a length."""

    def of(key: str) -> int | None:
        return header.whole(f"{architecture}.{key}")

    width, inner, experts = of("embedding_length"), of("feed_forward_length"), of("expert_count")
    heads, groups, vocabulary = of("attention.head_count"), of("attention.head_count_kv"), header.count(_TOKENS)
    each = of("attention.key_length")
    if each is None and width and heads:
        each = width // heads
    queries, keys = _times(heads, each), _times(groups, each)
    both = queries + 2 * keys if queries is not None and keys is not None else None
    expert_inner = of("expert_feed_forward_length") or inner
    up = _times(2, inner) if architecture == "phi3" else inner  # Phi-3 has gate and up in one
    shapes: dict[str, tuple[int | None, ...]] = {
        "token_embd.weight": (vocabulary, width),
        "output.weight": (vocabulary, width),
        "attn_q.weight": (queries, width),
        "attn_k.weight": (keys, width),
        "attn_v.weight": (keys, width),
        "attn_qkv.weight": (both, width),
        "attn_output.weight": (width, queries),
        "ffn_gate.weight": (inner, width),
        "ffn_up.weight": (up, width),
        "ffn_down.weight": (width, inner),
        "ffn_gate_inp.weight": (experts, width),
        "ffn_gate_exps.weight": (experts, expert_inner, width),
        "ffn_up_exps.weight": (experts, expert_inner, width),
        "ffn_down_exps.weight": (experts, width, expert_inner),
        "attn_q_norm.weight": (each,),
        "attn_k_norm.weight": (each,),
    }
    norms = ("output_norm", "attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")
    shapes |= {f"{name}.weight": (width,) for name in norms}
    return shapes | {f"{name.removesuffix('weight')}bias": shape[:1] for name, shape in shapes.items()}


_TOKENS = "tokenizer.ggml.tokens"


def _times(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one * other
