"""A base of three shards with an adapter, and what the formula says that their merge is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from tests.support.peft_oracle import make_config, random, write_adapter, write_base

TARGETS = [f"model.layers.{number}.mlp.down_proj" for number in range(3)]
SHARDS = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
INDEX, RECORD = "model.safetensors.index.json", "shardmerge.json"
RANK, ALPHA = 2, 3.0


@dataclass(frozen=True)
class ThreeShards:
    """A weight with an update in every shard, and one without."""

    folder: Path

    def weight(self, number: int) -> Tensor:
        return random(20, 12, seed=number)

    def factors(self) -> tuple[Tensor, Tensor]:
        return random(RANK, 12, seed=10), random(20, RANK, seed=20)

    def make(self) -> ThreeShards:
        tensors = [
            {f"{target}.weight": self.weight(number), f"norm.{number}": random(7, seed=number)}
            for number, target in enumerate(TARGETS)
        ]
        write_base(self.folder / "base", tensors)
        a, b = self.factors()
        write_adapter(self.folder / "adapter", dict.fromkeys(TARGETS, (a, b)), alpha=ALPHA)
        write_adapter(self.folder / "other", dict.fromkeys(TARGETS, (a, 2 * b)), alpha=ALPHA)
        write_adapter(self.folder / "infinite", {TARGETS[2]: (a / 0, b)}, alpha=ALPHA)
        return self

    def config(self, location: str, adapter: str = "adapter", **options: Any) -> dict[str, Any]:
        config = make_config(Path(), self.folder / "base", [self.folder / adapter], **options)
        return {**config, "output": {**config["output"], "path": location}}

    def check(self, files: Mapping[str, bytes]) -> None:
        """The shards hold W + α/r · B A, and what has no update as it was."""
        a, b = self.factors()
        for number, (name, target) in enumerate(zip(SHARDS, TARGETS, strict=True)):
            found = load(files[name])
            assert torch.equal(found[f"{target}.weight"], self.weight(number) + (b @ a) * (ALPHA / RANK))
            assert torch.equal(found[f"norm.{number}"], random(7, seed=number))
