"""The tensors of a GGUF file that no checkpoint stores: their values, in float32. Torch, no I/O.

Llama 3.1 divides a rotary frequency f of wavelength λ = 2π / f by 1 where λ is short, by ``factor`` where it is long,
and in between by 1 / ((1 - s) / factor + s), s = (context / λ - low) / (high - low).
Source: transformers' rope type ``llama3``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shardmerge.gguf.layout import OutputTensor, RopeScaling


def values_of(tensor: OutputTensor) -> Tensor:
    """The elements (n,) of a tensor without parts, float32."""
    if isinstance(tensor.values, RopeScaling):
        return _divisors(tensor.values)
    return torch.tensor(tensor.values, dtype=torch.float32)


def _divisors(scaling: RopeScaling) -> Tensor:
    # The exponents as one tensor: torch's power of one number has other bits than that of many.
    exponents = torch.arange(0, scaling.dimensions, 2, dtype=torch.float32) / scaling.dimensions
    wavelengths = 2 * math.pi / (1.0 / scaling.theta**exponents)
    smooth = (scaling.context / wavelengths - scaling.low) / (scaling.high - scaling.low)
    divisors = 1 / ((1 - smooth) / scaling.factor + smooth)
    divisors = torch.where(wavelengths > scaling.context / scaling.low, scaling.factor, divisors)
    return torch.where(wavelengths < scaling.context / scaling.high, 1.0, divisors)
