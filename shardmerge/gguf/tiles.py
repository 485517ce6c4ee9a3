"""Merged tiles → rows of a GGUF tensor in float32, and the tensors that no checkpoint stores. Torch, no I/O.

Llama 3.1 divides a rotary frequency f of wavelength λ = 2π / f by 1 where λ is short, by ``factor`` where it is long,
and in between by 1 / ((1 - s) / factor + s), s = (context / λ - low) / (high - low).
Source: transformers' rope type ``llama3``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shardmerge.gguf.layout import OutputTensor, RopeScaling
from shardmerge.spec.plans import Finish


def arrange(finish: Finish, tile: Tensor, space: Tensor | None = None) -> Tensor:
    """Merged rows (rows, columns) in the stored dtype → rows of the file, in float32.

    ``rows`` is a multiple of `Finish.group`; of a vector every element is a row. They are put into ``space``, dense
    float32 of the tile's shape; where nothing is to be done, the tile is given back.
    """
    if tile.dtype == torch.float32 and not finish.shuffle and not finish.addend:
        return tile
    if finish.addend and tile.dtype == torch.float16:
        # The converter adds in the stored dtype if that is float16, and in float32 if it is not. (Vectors only.)
        tile, addend = tile + finish.addend, 0.0
    else:
        addend = finish.addend
    if space is None:
        space = torch.empty(tile.shape, dtype=torch.float32, device=tile.device)
    if finish.shuffle:
        _, a, b = finish.shuffle
        turned = tile.reshape(-1, a, b, tile.shape[1]).transpose(1, 2)
        space.view(turned.shape).copy_(turned)
    else:
        space.copy_(tile)
    return space.add_(addend) if addend else space


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
