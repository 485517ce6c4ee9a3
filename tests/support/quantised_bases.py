"""Small bases that are stored quantised, made from float weights by the formats' own rules."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.peft_oracle import random

Tensors = dict[str, Tensor]
HIDDEN, INNER, HEADS, VOCABULARY = 96, 160, 4, 64
BLOCK = (32, 64)
ATTENTION = {"q_proj": (96, HIDDEN), "k_proj": (48, HIDDEN), "v_proj": (48, HIDDEN), "o_proj": (HIDDEN, 96)}
MLP = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


def llama_config(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        **changes,
    }


def linears(layers: int = 2) -> dict[str, tuple[int, int]]:
    """The Linear layers of a small Llama: module → (out, in)."""
    modules: dict[str, tuple[int, int]] = {}
    for layer in range(layers):
        modules |= {f"model.layers.{layer}.self_attn.{name}": shape for name, shape in ATTENTION.items()}
        modules |= {f"model.layers.{layer}.mlp.{name}": shape for name, shape in MLP.items()}
    return modules


def others(layers: int = 2) -> Tensors:
    """All that is never quantised."""
    tensors = {"model.embed_tokens.weight": random(VOCABULARY, HIDDEN, seed=90)}
    for layer in range(layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = torch.ones(HIDDEN)
    tensors |= {"model.norm.weight": torch.ones(HIDDEN), "lm_head.weight": random(VOCABULARY, HIDDEN, seed=91)}
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


@dataclass
class Quantised:
    """A base as it is stored, and what its weights are: the values of those that are quantised, in float32."""

    config: dict[str, Any]
    tensors: Tensors
    values: Tensors
    #: Which tensors go into the second file of two; scales may be in another than their weight.
    second: Callable[[str], bool] = field(default=lambda name: ".layers.1." in name)

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2))
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        weight_map = {name: names[self.second(name)] for name in self.tensors}
        for file in names:
            part = {name: tensor.contiguous() for name, tensor in self.tensors.items() if weight_map[name] == file}
            save_file(part, folder / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder


def fp8_grid(weight: Tensor, block: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and values of a weight (…, rows, columns): the largest magnitude of each block becomes 448."""
    rows, columns = weight.shape[-2:]
    high, wide = (math.ceil(size / of) for size, of in zip((rows, columns), block, strict=True))
    padded = torch.zeros(*weight.shape[:-2], high * block[0], wide * block[1])
    padded[..., :rows, :columns] = weight
    blocks = padded.view(*weight.shape[:-2], high, block[0], wide, block[1])
    scale = blocks.abs().amax((-3, -1)) / 448
    if dtype == torch.float8_e8m0fnu:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    scale = scale.to(dtype)
    each = scale.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., :rows, :columns]
    codes = (weight / each).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scale, codes.float() * each


def fp8_block(
    block: tuple[int, int] = BLOCK, scales: torch.dtype = torch.float32, key: str = "weight_scale_inv"
) -> Quantised:
    """As DeepSeek's and Qwen's: one scale a block."""
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    tensors, values = others(), {}
    for seed, (module, shape) in enumerate(linears().items()):
        codes, scale, value = fp8_grid(random(*shape, seed=seed, scale=0.05), block, scales)
        tensors |= {f"{module}.weight": codes, f"{module}.{key}": scale}
        values[f"{module}.weight"] = value
    config = llama_config(quantization_config={**settings, "modules_to_not_convert": ["lm_head"]})
    return Quantised(config, tensors, values, lambda name: ".layers.1." in name or name.endswith("q_proj." + key))


def fp8_channel() -> Quantised:
    """compressed-tensors ``float-quantized``: one scale a row."""
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    tensors, values = others(), {}
    for seed, (module, shape) in enumerate(linears().items()):
        codes, scale, value = fp8_grid(random(*shape, seed=seed, scale=0.05), (1, shape[1]), torch.float32)
        tensors |= {f"{module}.weight": codes, f"{module}.weight_scale": scale}
        values[f"{module}.weight"] = value
    return Quantised(llama_config(quantization_config={**settings, "ignore": ["lm_head"]}), tensors, values)


def fp8_static() -> Quantised:
    """Mistral's: one scale, and one for activations."""
    settings = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
    tensors, values = others(), {}
    for seed, (module, shape) in enumerate(linears().items()):
        codes, scale, value = fp8_grid(random(*shape, seed=seed, scale=0.05), shape, torch.bfloat16)
        scales = {"weight_scale_inv": scale.view(()), "activation_scale": torch.tensor(0.02).bfloat16()}
        tensors |= {f"{module}.weight": codes, **{f"{module}.{key}": part for key, part in scales.items()}}
        values[f"{module}.weight"] = value
    config = llama_config(quantization_config={**settings, "modules_to_not_convert": ["lm_head"]})
    return Quantised(config, tensors, values)


#: By name.
BASES: Mapping[str, Callable[[], Quantised]] = {
    "fp8-block": fp8_block,
    "fp8-block-bf16-scales": lambda: fp8_block(scales=torch.bfloat16),
    "fp8-block-e8m0-scales": lambda: fp8_block(scales=torch.float8_e8m0fnu, key="scale"),
    "fp8-channel": fp8_channel,
    "fp8-static": fp8_static,
}
