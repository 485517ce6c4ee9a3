"""The tensors of a GGUF file that no checkpoint stores: divisors of rotary frequencies, in float32.

Llama 3.1 divides a rotary frequency f of wavelength λ = 2π / f by 1 if λ is short, by ``factor`` if it is long, and in
between by 1 / ((1 - s) / factor + s), s = (context / λ - low) / (high - low).
Source: transformers' rope type ``llama3``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from shardmerge.gguf.model import Model


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """The parameters of Llama 3.1's divisors."""

    theta: float
    dimensions: int
    factor: float
    low: float
    high: float
    context: float


Values = tuple[float, ...] | RopeScaling


def generated(model: Model) -> Iterator[tuple[str, int, Values]]:
    """Name, number of elements, and the argument of `values_of`."""
    rope, name = model.rope, model.architecture.name
    if name == "llama" and rope.kind == "llama3":
        scaling = RopeScaling(
            rope.theta,
            model.rope_dimensions,
            rope.number("factor", 8.0),
            rope.number("low_freq_factor", 1.0),
            rope.number("high_freq_factor", 4.0),
            rope.number("original_max_position_embeddings", 8192),
        )
        yield "rope_freqs.weight", -(-scaling.dimensions // 2), scaling
    if name == "phi3" and rope.kind == "longrope":
        for reach in ("long", "short"):
            factors = rope.numbers(f"{reach}_factor")
            yield f"rope_factors_{reach}.weight", len(factors), factors


def values_of(values: Values) -> list[float]:
    """The elements, each a float32. Llama 3.1's are computed in torch, as transformers does."""
    if not isinstance(values, RopeScaling):
        return list(values)
    import torch

    scaling = values
    # One tensor of exponents: torch's power of a single number has other bits.
    exponents = torch.arange(0, scaling.dimensions, 2, dtype=torch.float32) / scaling.dimensions
    wavelengths = 2 * math.pi / (1.0 / scaling.theta**exponents)
    smooth = (scaling.context / wavelengths - scaling.low) / (scaling.high - scaling.low)
    divisors = 1 / ((1 - smooth) / scaling.factor + smooth)
    divisors = torch.where(wavelengths > scaling.context / scaling.low, scaling.factor, divisors)
    divisors = torch.where(wavelengths < scaling.context / scaling.high, 1.0, divisors)
    return [float(value) for value in divisors]
