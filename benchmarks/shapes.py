"""What is merged: checkpoints and adapters of real shapes, as names and sizes. `benchmarks.making` writes them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

DEFAULT_RANK = 16
ALPHA = 32
BF16_BYTES = 2

#: A tensor's name and shape.
Tensor = tuple[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama: untied, bf16, with an adapter on all of its linear layers."""

    name: str
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    shards: int = 1
    rank: int = DEFAULT_RANK

    def with_rank(self, rank: int) -> Shape:
        return dataclasses.replace(self, rank=rank)

    @property
    def is_small(self) -> bool:
        """Whether it is there to try things with: too small to fill buffers, so what it takes says little."""
        return self.name.startswith(("tiny-", "index-")) or self.name == "tiny"

    @property
    def rounds_once(self) -> bool:
        """Whether PEFT rounds the merged values once, as shardmerge does, so that bits are the same."""
        return True

    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one layer that have an adapter, each as (out, in)."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.ffn, self.hidden),
            "mlp.up_proj": (self.ffn, self.hidden),
            "mlp.down_proj": (self.hidden, self.ffn),
        }

    def others(self) -> dict[str, tuple[int, ...]]:
        """The other weights of one layer."""
        return {"input_layernorm": (self.hidden,), "post_attention_layernorm": (self.hidden,)}

    def base_tensors(self) -> Iterator[Tensor]:
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            for module, shape in {**self.linears(), **self.others()}.items():
                yield f"model.layers.{layer}.{module}.weight", shape
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    def adapter_tensors(self) -> Iterator[Tensor]:
        for layer in range(self.layers):
            for module, (out, into) in self.linears().items():
                prefix = f"base_model.model.model.layers.{layer}.{module}"
                yield f"{prefix}.lora_A.weight", (self.rank, into)
                yield f"{prefix}.lora_B.weight", (out, self.rank)

    def config(self) -> dict[str, object]:
        """config.json of the base."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-05,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }

    def adapter_config(self) -> dict[str, object]:
        """adapter_config.json."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": self.rank,
            "lora_alpha": ALPHA,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
            "target_modules": sorted(module.rpartition(".")[2] for module in self.linears()),
        }

    def base_bytes(self) -> int:
        """Bytes of the base's tensors."""
        return total_bytes(self.base_tensors())

    def adapter_bytes(self) -> int:
        return total_bytes(self.adapter_tensors())


@dataclass(frozen=True, slots=True)
class MoeShape(Shape):
    """A Qwen3-MoE, its experts stored one by one; the adapter is on attention and on all experts (``ffn`` wide)."""

    experts: int = 128
    chosen: int = 8
    head_dim: int = 128

    @property
    def rounds_once(self) -> bool:
        return False  # of experts PEFT rounds the update, then the sum

    def linears(self) -> dict[str, tuple[int, int]]:
        inner, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (inner, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, inner),
        }

    def others(self) -> dict[str, tuple[int, ...]]:
        # Not super(): of a class with slots it does not know the one that the decorator has made.
        norms = {**Shape.others(self), **dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), (self.head_dim,))}
        wide, narrow = (self.ffn, self.hidden), (self.hidden, self.ffn)
        kinds = {"gate_proj": wide, "up_proj": wide, "down_proj": narrow}
        stored = {f"mlp.experts.{n}.{kind}": shape for n in range(self.experts) for kind, shape in kinds.items()}
        return {**norms, "mlp.gate": (self.experts, self.hidden), **stored}

    def adapter_tensors(self) -> Iterator[Tensor]:
        yield from Shape.adapter_tensors(self)
        ranks = self.experts * self.rank
        for layer in range(self.layers):
            prefix = f"base_model.model.model.layers.{layer}.mlp.experts"
            # PEFT puts one wrapper around the other: the inner one is gate_up_proj's, the outer one down_proj's.
            yield f"{prefix}.base_layer.lora_A.weight", (ranks, self.hidden)
            yield f"{prefix}.base_layer.lora_B.weight", (2 * self.ffn, ranks)
            yield f"{prefix}.lora_A.weight", (ranks, self.ffn)
            yield f"{prefix}.lora_B.weight", (self.hidden, ranks)

    def config(self) -> dict[str, object]:
        return {
            **Shape.config(self),
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "head_dim": self.head_dim,
            "moe_intermediate_size": self.ffn,
            "num_experts": self.experts,
            "num_experts_per_tok": self.chosen,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }

    def adapter_config(self) -> dict[str, object]:
        parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        return {**Shape.adapter_config(self), "target_parameters": parameters}


def nbytes(shape: tuple[int, ...]) -> int:
    return math.prod(shape) * BF16_BYTES


def total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(nbytes(shape) for _, shape in tensors)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", layers=2, hidden=256, ffn=512, heads=4, kv_heads=2, vocab=1000, shards=2),
        MoeShape("tiny-moe", 2, hidden=128, ffn=96, heads=4, kv_heads=2, vocab=1000, experts=8, chosen=2, head_dim=64),
        Shape("tinyllama", layers=22, hidden=2048, ffn=5632, heads=32, kv_heads=4, vocab=32000),
        # Two layers of Qwen3-30B-A3B.
        MoeShape("qwen3-moe", layers=2, hidden=2048, ffn=768, heads=32, kv_heads=4, vocab=151936),
        # One layer of Llama-3.1-405B. Of its 128,256 tokens a few are enough: they are copied as they are.
        Shape("llama3-405b", layers=1, hidden=16384, ffn=53248, heads=128, kv_heads=8, vocab=4096),
        Shape("llama3-8b", layers=32, hidden=4096, ffn=14336, heads=32, kv_heads=8, vocab=128256, shards=4),
        # 63 small tensors a shard: what counts is how many headers there are.
        Shape("index-1000", layers=1000, hidden=16, ffn=16, heads=2, kv_heads=1, vocab=64, shards=1000),
        Shape("index-1000-wide", layers=7000, hidden=16, ffn=16, heads=2, kv_heads=1, vocab=64, shards=1000),
    )
}
#: What can be merged by all tools.
MERGED = [name for name in SHAPES if not name.startswith("index-")]
#: What ``--shape all`` stands for, from small to large.
REAL = [name for name in MERGED if not SHAPES[name].is_small]
