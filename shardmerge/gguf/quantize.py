"""float32 → GGML's types, bit for bit as the ``gguf`` package (and so llama.cpp's converter) makes them.

A block is 32 elements x of a row. With d and m as float16 in the file, and q as integers:

    Q8_0   d = max|x| / 127       q = round(x / d), halves away from zero          34 bytes: d, 32 × q
    Q4_0   d = x̂ / -8             q = min(trunc(x / d + 8.5), 15)                  18 bytes: d, 16 × 2 q
    Q5_0   d = x̂ / -16            q = min(trunc(x / d + 16.5), 31)                 22 bytes: d, h, 16 × 2 q
    Q4_1   d = (max - min) / 15   q = min(trunc((x - m) / d + 0.5), 15), m = min   20 bytes: d, m, 16 × 2 q
    Q5_1   d = (max - min) / 31   q = min(trunc((x - m) / d + 0.5), 31), m = min   24 bytes: d, m, h, 16 × 2 q

x̂ is the first of the elements of the largest magnitude, with its sign. d divides in float32, before it is rounded to
float16; 1 / d is rounded and then multiplied with, and is 0 where d is 0. Byte i of 16 holds the low four bits of q[i]
and q[i + 16]; bit i of h is the fifth bit of q[i].
In F16 and BF16 values are rounded to nearest, ties to even. Only the sign of an m of 0 may be another than numpy's
where it is the least of zeros of both signs: which of them numpy takes depends on the processor.
Source: gguf-py's quants.py and ggml-quants.c of llama.cpp.

Everything is done in slabs that stay in a core's cache, each step in its own pass so that no two are contracted into
one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from shardmerge.gguf.formats import TYPES
from shardmerge.spec import even_rows

#: Elements at a time: 1 MiB of float32. Smaller ones spend their time between torch's calls.
_SLAB = 1 << 18
_BLOCK = 32
_PLAIN: Mapping[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: The largest float32 below one half: x + copysign(this, x), truncated, is x rounded with halves away from zero.
#: One half itself would carry the number just below one half up to 1.
_HALF = 0.49999997
#: The least magnitude that rounds to infinity in float16.
_F16_LIMIT = 65520.0


def quantize_into(out: Tensor, tile: Tensor, kind: str) -> None:
    """Write a tile (rows, columns) of finite float32 as GGML type ``kind`` into ``out``.

    ``out`` is uint8, flat, dense and of `GgmlType.size` bytes; of types that are no blocks it must be aligned to an
    element. What is not finite, or too large for the type's float16 (see `overflow_limit`), gives a block that is not
    finite either: the caller looks for that. The scratch space does not grow with the tile.
    """
    rows, columns = tile.shape
    if out.numel() != TYPES[kind].size((rows, columns)):
        raise ValueError(
            f"{kind} of {rows} × {columns} takes {TYPES[kind].size((rows, columns))} bytes, not {len(out)}"
        )
    if kind in _PLAIN:
        out.view(_PLAIN[kind]).view(rows, columns).copy_(tile)
        return
    blocks = out.view(rows, columns // _BLOCK, TYPES[kind].nbytes)
    # Rows longer than a slab are cut as well: blocks know nothing of rows.
    wide = max(1, -(-columns // _SLAB))
    for part in even_rows(rows, min(rows, max(1, rows * columns // _SLAB)) or 1):
        for span in even_rows(columns // _BLOCK, min(wide, columns // _BLOCK) or 1):
            slab = tile[part.start : part.stop, span.start * _BLOCK : span.stop * _BLOCK]
            target = blocks[part.start : part.stop, span.start : span.stop]
            _QUANTIZERS[kind](target, slab.to(torch.float32).contiguous().view(len(part), len(span), _BLOCK))


def overflow_limit(kind: str) -> float:
    """The least magnitude that type ``kind`` may be unable to hold: it, or its block's d or m, becomes infinite."""
    if kind == "F32":
        return float("inf")
    if kind == "BF16":
        return 2.0**128 - 2.0**119
    # d is a fraction of the largest magnitude in the block; m is not.
    return _F16_LIMIT * {"Q8_0": 127, "Q4_0": 8, "Q5_0": 16}.get(kind, 1)


def _put(target: Tensor, value: Tensor) -> None:
    """One float32 a block, as float16 in two bytes."""
    target.copy_(value.to(torch.float16).unsqueeze(-1).view(torch.uint8))


def _inverse(d: Tensor) -> Tensor:
    """1 / d, but 0 where d is 0; (…, 1)."""
    return torch.where(d == 0, 0.0, d.reciprocal()).unsqueeze_(-1)


def _q8_0(out: Tensor, x: Tensor) -> None:
    d = x.abs().amax(-1).div_(127)
    q = x.mul(_inverse(d))
    q.add_(torch.sign(q), alpha=_HALF)
    _put(out[..., :2], d)
    out[..., 2:] = q.to(torch.int8).view(torch.uint8)


def _symmetric(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """d, and q below 2 · ``levels``."""
    low, high = x.amin(-1), x.amax(-1)
    largest = torch.where(high > -low, high, low)
    # Of two of one magnitude the first counts, also of two zeros. They are rare enough to look for one by one.
    if (tied := high == -low).any():
        among = x[tied]
        largest[tied] = among.gather(-1, among.abs().argmax(-1, keepdim=True)).squeeze(-1)
    d = largest.div_(-levels)
    return d, _integers(x.mul(_inverse(d)), levels + 0.5, 2 * levels - 1)


def _asymmetric(x: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """d, m, and q up to ``levels``."""
    low, high = x.amin(-1), x.amax(-1)
    d = (high - low).div_(levels)
    return d, low, _integers(x.sub(low.unsqueeze(-1)).mul_(_inverse(d)), 0.5, levels)


def _integers(scaled: Tensor, offset: float, largest: int) -> Tensor:
    # By way of int8, which torch does in vectors: the bytes are the same.
    return scaled.add_(offset).to(torch.int8).view(torch.uint8).clamp_(max=largest)


def _nibbles(q: Tensor) -> Tensor:
    """q (…, 32) → 16 bytes: of each the low four bits of q[i] and of q[i + 16]."""
    eight = q.view(torch.int64) & 0x0F0F0F0F0F0F0F0F
    return (eight[..., :2] | (eight[..., 2:] << 4)).view(torch.uint8)


def _fifth_bits(q: Tensor) -> Tensor:
    """q (…, 32) → 4 bytes of its fifth bits, the first lowest."""
    # Eight bytes of one bit each, times this, hold the eight bits in their highest byte.
    ones = (q >> 4).view(torch.int64)
    return (ones.mul_(0x0102040810204080) >> 56).to(torch.uint8)


def _q4_0(out: Tensor, x: Tensor) -> None:
    d, q = _symmetric(x, 8)
    _put(out[..., :2], d)
    out[..., 2:] = _nibbles(q)


def _q5_0(out: Tensor, x: Tensor) -> None:
    d, q = _symmetric(x, 16)
    _put(out[..., :2], d)
    out[..., 2:6] = _fifth_bits(q)
    out[..., 6:] = _nibbles(q)


def _q4_1(out: Tensor, x: Tensor) -> None:
    d, m, q = _asymmetric(x, 15)
    _put(out[..., :2], d)
    _put(out[..., 2:4], m)
    out[..., 4:] = _nibbles(q)


def _q5_1(out: Tensor, x: Tensor) -> None:
    d, m, q = _asymmetric(x, 31)
    _put(out[..., :2], d)
    _put(out[..., 2:4], m)
    out[..., 4:8] = _fifth_bits(q)
    out[..., 8:] = _nibbles(q)


_QUANTIZERS: Mapping[str, Callable[[Tensor, Tensor], None]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
}
