"""What codecs of quantised bases share: they write codes onto the base's own grid, whose scales stay as they are."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from shardmerge.codecs.codec import Codec, CodecMemory
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import Encoding

#: What a thread allocates to round a tile onto a grid; see `shardmerge.codecs.grids`. Measured.
ROUNDING_BYTES = 1 << 20


class GridCodec(Codec):
    """Codes of eight bits at most, with scales. Stochastic rounding is the setting ``seed``."""

    on_device: ClassVar[bool] = True

    def stochastic(self, encoding: Encoding, seed: int) -> Encoding | None:
        return dataclasses.replace(encoding, settings=(*encoding.settings, ("seed", seed)))

    def rounds_to(self, tensor: TensorPlan) -> str:
        """Codes of so few bits, whatever they are stored as."""
        return "U8"

    def largest(self, tensor: TensorPlan) -> float:
        """What is beyond the first or the last code becomes that."""
        return math.inf

    def memory(self, tensor: TensorPlan, tile_dtype: str) -> CodecMemory:
        return CodecMemory(between=ROUNDING_BYTES)
