"""Models of the GGUF zoo with adapters, merged straight into a GGUF file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import shardmerge
from tests.support.builders import peft_config, read_tensors, write_peft
from tests.support.gguf_zoo import make

_EXPERT_OR_LINEAR = re.compile(r".*(_proj|\.w[123])\.weight")


class GgufModels:
    """Models of the zoo by name, each made once, with an adapter of its own beside it."""

    def __init__(self, root: Path, smollm2: Path) -> None:
        self._root, self._smollm2 = root, smollm2
        self._made: dict[str, tuple[Path, Path]] = {}

    def __call__(self, name: str) -> tuple[Path, Path]:
        """Base and adapter."""
        if name not in self._made:
            base = make(name, self._root / name / "base", self._smollm2)
            self._made[name] = (base, write_adapter(base, self._root / name / "adapter"))
        return self._made[name]


def write_adapter(base: Path, folder: Path) -> Path:
    """LoRA on every linear layer that the base stores as one, experts included."""
    factors: dict[str, torch.Tensor] = {}
    torch.manual_seed(3)
    for name, weight in read_tensors(base).items():
        if _EXPERT_OR_LINEAR.fullmatch(name) and weight.dim() == 2 and "vision" not in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{module}.lora_A.weight"] = 0.2 * torch.randn(4, weight.shape[1])
            factors[f"{module}.lora_B.weight"] = 0.2 * torch.randn(weight.shape[0], 4)
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in factors})
    return write_peft(folder, factors, config=peft_config(r=4, lora_alpha=8, target_modules=targets))


def config(base: Path, adapter: Path, output: Path, **options: Any) -> dict[str, Any]:
    compute = {"max_memory": options.pop("max_memory", "auto")}
    tied = {"tied": options.pop("tied")} if "tied" in options else {}
    output_options = {"path": str(output), **options}
    return {"base": str(base), "adapters": [str(adapter)], "output": output_options, "compute": compute, **tied}


def as_gguf(base: Path, adapter: Path, output: Path, quantization: str, **options: Any) -> Path:
    """The file's path."""
    shardmerge.merge(config(base, adapter, output, format="gguf", quantization=quantization, **options))
    return output / f"{output.name}-{quantization}.gguf"
