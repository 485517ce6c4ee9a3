"""Models as ComfyUI stores them in FP8: one file, no config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.peft_oracle import random
from tests.support.quantised_bases import Quantised, fp8_grid

#: Modules of a diffusion model → (out, in).
SHAPES = {
    "diffusion_model.blocks.0.attn.to_q": (96, 96),
    "diffusion_model.blocks.0.attn.to_v": (96, 96),
    "diffusion_model.blocks.1.ff.up": (160, 96),
}
TO_Q, UP = "diffusion_model.blocks.0.attn.to_q", "diffusion_model.blocks.1.ff.up"
FP8 = {"format": "float8_e4m3fn"}


@dataclass
class OneFile(Quantised):
    """A base of one file, whose header has metadata."""

    metadata: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, folder / "model.safetensors", metadata=self.metadata)
        return folder


def as_bytes(settings: Any) -> Tensor:
    return torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8)


def comfy(kind: str, formats: dict[str, Any] | None = None) -> OneFile:
    """``tensors``, ``metadata`` or ``old``: where it is said what is quantised."""
    tensors, values, layers = {"diffusion_model.norm.weight": torch.ones(96).bfloat16()}, {}, {}
    for seed, (module, shape) in enumerate(SHAPES.items()):
        codes, scale, value = fp8_grid(random(*shape, seed=seed, scale=0.05), shape, torch.float32)
        key = "scale_weight" if kind == "old" else "weight_scale"
        tensors |= {f"{module}.weight": codes, f"{module}.{key}": scale.view(1) if kind == "old" else scale.view(())}
        layers[module] = (formats or {}).get(module, FP8)
        if kind == "tensors":
            tensors[f"{module}.comfy_quant"] = as_bytes(layers[module])
        values[f"{module}.weight"] = value
    metadata = {"format": "pt"}
    if kind == "old":
        tensors["diffusion_model.scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
        tensors[f"{TO_Q}.scale_input"] = torch.tensor([0.5])
    if kind == "metadata":
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": layers})
    return OneFile({}, tensors, values, metadata=metadata)
