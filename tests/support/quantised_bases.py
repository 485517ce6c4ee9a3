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
#: Divides every size of the models here; transformers cannot load others.
EVEN = (16, 32)
EXPERTS = 3
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
    #: Other files of settings, by name.
    beside: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2))
        for file, content in self.beside.items():
            (folder / file).write_text(json.dumps(content))
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


def fp8_moe() -> Quantised:
    """Qwen3-MoE's names, with experts stored one by one, and sizes that are whole blocks."""
    made, block = fp8_block(EVEN), EVEN
    tensors = {name: tensor for name, tensor in made.tensors.items() if ".mlp." not in name}
    values = {name: tensor for name, tensor in made.values.items() if ".mlp." not in name}
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.gate.weight"] = random(EXPERTS, HIDDEN, seed=layer).bfloat16()
        for norm in ("q_norm", "k_norm"):
            tensors[f"model.layers.{layer}.self_attn.{norm}.weight"] = torch.ones(HIDDEN // HEADS).bfloat16()
        for number, expert in enumerate(range(EXPERTS), start=EXPERTS * layer):
            shapes = {"gate_proj": (64, HIDDEN), "up_proj": (64, HIDDEN), "down_proj": (HIDDEN, 64)}
            for seed, (name, shape) in enumerate(shapes.items(), start=3 * number):
                weight = f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
                codes, scale, values[weight] = fp8_grid(random(*shape, seed=seed, scale=0.05), block, torch.float32)
                tensors |= {weight: codes, f"{weight}_scale_inv": scale}
    config = made.config | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "head_dim": HIDDEN // HEADS,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    return Quantised(config, tensors, values)


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


def fp8_modelopt() -> Quantised:
    """modelopt's: one scale, one for activations, scales of the cache, and settings in a file beside config.json."""
    made = fp8_static()
    tensors = {}
    for name, tensor in made.tensors.items():
        name = name.replace("weight_scale_inv", "weight_scale").replace("activation_scale", "input_scale")
        tensors[name] = tensor.float() if name.endswith("_scale") else tensor
    values = {}
    for name in made.values:
        scale = tensors[f"{name}_scale"]
        values[name] = tensors[name].float() * scale
    tensors |= {f"model.layers.{layer}.self_attn.k_proj.k_scale": torch.tensor(0.5) for layer in range(2)}
    settings = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    beside = {"hf_quant_config.json": {"producer": {"name": "modelopt"}, "quantization": settings}}
    config = {key: value for key, value in made.config.items() if key != "quantization_config"}
    return Quantised(config, tensors, values, beside=beside)


def fp8_stacked_experts() -> Quantised:
    """fbgemm's Llama-4: experts of a layer in one tensor (E, in, out), with a scale for each column of the last."""
    made = fp8_static()
    tensors = {name: tensor for name, tensor in made.tensors.items() if ".mlp." not in name}
    values = {name: tensor for name, tensor in made.values.items() if ".mlp." not in name}
    for layer in range(2):
        shapes = {"gate_up_proj": (EXPERTS, HIDDEN, 128), "down_proj": (EXPERTS, 64, HIDDEN)}
        for seed, (name, shape) in enumerate(shapes.items(), start=2 * layer):
            weight = f"model.layers.{layer}.feed_forward.experts.{name}"
            codes, scale, values[weight] = fp8_grid(random(*shape, seed=seed, scale=0.05), (shape[1], 1), torch.float32)
            # (E, 1, out), but Llama-4's files have that of down_proj as (E, out, 1).
            scale = scale if name == "gate_up_proj" else scale.transpose(1, 2).contiguous()
            tensors |= {weight: codes, f"{weight}_scale": scale}
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        module = name.removesuffix(".weight_scale_inv")
        scale = tensors.pop(name).float().view(1, 1)
        tensors[f"{module}.weight_scale"] = scale.expand(len(tensors[f"{module}.weight"]), 1)
    settings = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}
    return Quantised({**made.config, "quantization_config": settings}, tensors, values)


#: By name.
BASES: Mapping[str, Callable[[], Quantised]] = {
    "fp8-block": fp8_block,
    "fp8-block-bf16-scales": lambda: fp8_block(scales=torch.bfloat16),
    "fp8-block-e8m0-scales": lambda: fp8_block(scales=torch.float8_e8m0fnu, key="scale"),
    "fp8-channel": fp8_channel,
    "fp8-static": fp8_static,
}
