"""A checkpoint with DeepSeek-V3's names and as many experts as one likes, and LoRA on every linear layer. All is tiny.

What a merge takes for each tensor, rather than for its bytes, shows with it.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.builders import peft_config, write_json

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ManyExperts:
    """Its first ``dense`` layers have no experts."""

    layers: int
    experts: int
    dense: int = 1
    hidden: int = 16
    inner: int = 8
    heads: int = 4
    rank: int = 2

    def linear_layers(self) -> dict[str, Shape]:
        """The linear layers by module, with the shape (rows, columns) of their weights."""
        found: dict[str, Shape] = {}
        out, inside = self.inner, self.hidden
        mlp = {"gate_proj": (out, inside), "up_proj": (out, inside), "down_proj": (inside, out)}
        attention = {
            "q_a_proj": (8, self.hidden),
            "q_b_proj": (8 * self.heads, 8),
            "kv_a_proj_with_mqa": (12, self.hidden),
            "kv_b_proj": (8 * self.heads, 8),
            "o_proj": (self.hidden, 4 * self.heads),
        }
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            found |= {f"{prefix}.self_attn.{name}": shape for name, shape in attention.items()}
            blocks = ["mlp"]
            if layer >= self.dense:
                blocks = [*(f"mlp.experts.{expert}" for expert in range(self.experts)), "mlp.shared_experts"]
            found |= {f"{prefix}.{block}.{name}": shape for block in blocks for name, shape in mlp.items()}
        return found

    def write(self, folder: Path, shards: int) -> Path:
        """Base, adapter and config.yaml with an output ``merged``; gives back the config's path."""
        base, adapter = folder / "base", folder / "adapter"
        for path in (base, adapter):
            path.mkdir(parents=True)
        linear = self.linear_layers()
        weights: dict[str, Shape] = {
            "model.embed_tokens.weight": (32, self.hidden),
            "lm_head.weight": (32, self.hidden),
        }
        weights["model.norm.weight"] = (self.hidden,)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            norms = {"input_layernorm": self.hidden, "post_attention_layernorm": self.hidden}
            norms |= {"self_attn.q_a_layernorm": 8, "self_attn.kv_a_layernorm": 8}
            weights |= {f"{prefix}.{name}.weight": (width,) for name, width in norms.items()}
            if layer >= self.dense:
                weights[f"{prefix}.mlp.gate.weight"] = (self.experts, self.hidden)
                weights[f"{prefix}.mlp.gate.e_score_correction_bias"] = (self.experts,)
        weights |= {f"{module}.weight": shape for module, shape in linear.items()}
        names = list(weights)
        files: dict[str, str] = {}
        each = -(-len(names) // shards)
        for number, start in enumerate(range(0, len(names), each), 1):
            file = f"model-{number:05}-of-{shards:05}.safetensors"
            here = names[start : start + each]
            _write_bfloat16(base / file, {name: weights[name] for name in here})
            files |= dict.fromkeys(here, file)
        write_json(base / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})
        write_json(base / "config.json", self._settings())
        factors: dict[str, Shape] = {}
        for module, (rows, columns) in linear.items():
            factors[f"base_model.model.{module}.lora_A.weight"] = (self.rank, columns)
            factors[f"base_model.model.{module}.lora_B.weight"] = (rows, self.rank)
        _write_bfloat16(adapter / "adapter_model.safetensors", factors)
        write_json(adapter / "adapter_config.json", peft_config(r=self.rank, lora_alpha=4, target_modules="all-linear"))
        config = {"base": str(base), "adapters": [str(adapter)], "output": {"path": str(folder / "merged")}}
        return write_json(folder / "config.yaml", config)

    def _settings(self) -> dict[str, object]:
        """Its config.json."""
        latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
        experts = {"n_routed_experts": self.experts, "n_shared_experts": 1, "num_experts_per_tok": 1}
        heads = {"num_attention_heads": self.heads, "num_key_value_heads": self.heads}
        sizes = {"hidden_size": self.hidden, "intermediate_size": self.inner, "moe_intermediate_size": self.inner}
        rest = {"num_hidden_layers": self.layers, "first_k_dense_replace": self.dense, "vocab_size": 32}
        kind = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "tie_word_embeddings": False}
        return {**kind, **latent, **experts, **heads, **sizes, **rest}


def _write_bfloat16(path: Path, shapes: Mapping[str, Shape]) -> None:
    """A safetensors file of numbers of about 0.01, of either sign."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * (shape[0] * shape[1] if len(shape) == 2 else shape[0])
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    chooser = random.Random(path.name)
    data = bytearray(chooser.randbytes(end))
    data[1::2] = bytes(0x3C | (byte & 0x80) for byte in data[1::2])
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
