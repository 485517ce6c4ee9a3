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

Everything is done in slabs that stay in a core's cache, in place and in scratch that the caller may bring, each step in
its own pass so that no two are contracted into one rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from shardmerge.codecs.ggml import BLOCKS, nbytes
from shardmerge.codecs.rounding import TORCH_DTYPES
from shardmerge.spec.tensors import Encoding, even_rows

#: Elements at a time: 1 MiB of float32. Smaller ones spend their time between torch's calls.
_SLAB = 1 << 18
_BLOCK = 32
#: The largest float32 below one half: x + copysign(this, x), truncated, is x rounded with halves away from zero.
#: One half itself would carry the number just below one half up to 1.
_HALF = 0.49999997
#: Blocks that are looked at together where the largest magnitude is there with both signs.
_TIED = 1 << 10


def quantize_into(out: Tensor, tile: Tensor, kind: str, scratch: Tensor | None = None) -> None:
    """Write a tile (rows, columns) of finite float32 as GGML type ``kind`` into ``out``.

    ``out`` is uint8, flat, dense and of `ggml.nbytes` bytes; of types that are not blocks it must be aligned to an
    element. A value that is not finite, or too large for the type's float16 (see `ggml.overflow_limit`), makes a block
    that is not finite; the caller checks for such values.

    With ``scratch``, another tile of dense float32, the tile is overwritten, and what is allocated does not grow with
    it. Without, both are made here.
    """
    rows, columns = tile.shape
    size = nbytes(kind, (rows, columns))
    if out.numel() != size:
        raise ValueError(f"{kind} of {rows} × {columns} takes {size} bytes, not {len(out)}")
    if kind in TORCH_DTYPES:
        out.view(TORCH_DTYPES[kind]).view(rows, columns).copy_(tile)
        return
    if scratch is None:
        tile = tile.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        scratch = torch.empty_like(tile)
    blocks, values, space = out.view(-1, BLOCKS[kind][1]), tile.view(-1, _BLOCK), scratch.view(-1, _BLOCK)
    for part in even_rows(len(blocks), max(1, -(-tile.numel() // _SLAB))):
        here = slice(part.start, part.stop)
        _QUANTIZERS[kind](blocks[here], values[here], space[here])


def arrange(encoding: Encoding | None, tile: Tensor, space: Tensor | None = None) -> Tensor:
    """Merged rows (rows, columns), as a checkpoint would hold them → rows of the file, in float32.

    ``rows`` is a multiple of the encoding's row unit; of a vector every element is a row. The rows are put into
    ``space``, dense float32 of the tile's shape; where nothing is to be done, the tile is given back.
    """
    shuffle = encoding.setting("shuffle") if encoding else None
    addend = encoding.setting("addend", 0.0) if encoding else 0.0
    if tile.dtype == torch.float32 and not shuffle and not addend:
        return tile
    if addend and tile.dtype == torch.float16:
        # The converter adds in the stored dtype if that is float16, and in float32 if it is not. (Vectors only.)
        tile, addend = tile + addend, 0.0
    if space is None:
        space = torch.empty(tile.shape, dtype=torch.float32, device=tile.device)
    if shuffle:
        _, a, b = shuffle
        turned = tile.reshape(-1, a, b, tile.shape[1]).transpose(1, 2)
        space.view(turned.shape).copy_(turned)
    else:
        space.copy_(tile)
    return space.add_(addend) if addend else space


# Blocks (n, bytes) to write, their values x (n, 32), and scratch s of the same size. x and s are overwritten.


def _q8_0(out: Tensor, x: Tensor, s: Tensor) -> None:
    d = torch.abs(x, out=s).amax(-1).div_(127)
    q = x.mul_(_inverse(d))
    q.add_(torch.sign(q, out=s), alpha=_HALF)
    _put(out[:, :2], d)
    out[:, 2:] = _bytes(q, s)


def _q4_0(out: Tensor, x: Tensor, s: Tensor) -> None:
    d, q = _symmetric(x, s, 8)
    _put(out[:, :2], d)
    out[:, 2:] = _nibbles(q)


def _q5_0(out: Tensor, x: Tensor, s: Tensor) -> None:
    d, q = _symmetric(x, s, 16)
    _put(out[:, :2], d)
    out[:, 2:6] = _fifth_bits(q, x)
    out[:, 6:] = _nibbles(q)


def _q4_1(out: Tensor, x: Tensor, s: Tensor) -> None:
    d, m, q = _asymmetric(x, s, 15)
    _put(out[:, :2], d)
    _put(out[:, 2:4], m)
    out[:, 4:] = _nibbles(q)


def _q5_1(out: Tensor, x: Tensor, s: Tensor) -> None:
    d, m, q = _asymmetric(x, s, 31)
    _put(out[:, :2], d)
    _put(out[:, 2:4], m)
    out[:, 4:8] = _fifth_bits(q, x)
    out[:, 8:] = _nibbles(q)


def _put(target: Tensor, value: Tensor) -> None:
    """One float32 a block, as float16 in two bytes."""
    target.copy_(value.to(torch.float16).unsqueeze(-1).view(torch.uint8))


def _inverse(d: Tensor) -> Tensor:
    """1 / d, but 0 where d is 0; (n, 1)."""
    return torch.where(d == 0, 0.0, d.reciprocal()).unsqueeze_(-1)


def _symmetric(x: Tensor, s: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """d, and q below 2 · ``levels``, which is stored in ``s``."""
    low, high = x.amin(-1), x.amax(-1)
    largest = torch.where(high > -low, high, low)
    # Of two of one magnitude, also of two zeros, the first counts. They are rare, so each is looked for by itself.
    for tied in torch.split((high == -low).nonzero().squeeze(-1), _TIED):
        among = x[tied]
        largest[tied] = among.gather(-1, among.abs().argmax(-1, keepdim=True)).squeeze(-1)
    d = largest.div_(-levels)
    return d, _integers(x.mul_(_inverse(d)), s, levels + 0.5, 2 * levels - 1)


def _asymmetric(x: Tensor, s: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """d, m, and q up to ``levels``, which is stored in ``s``."""
    low, high = x.amin(-1), x.amax(-1)
    d = (high - low).div_(levels)
    return d, low, _integers(x.sub_(low.unsqueeze(-1)).mul_(_inverse(d)), s, 0.5, levels)


def _integers(scaled: Tensor, s: Tensor, offset: float, largest: int) -> Tensor:
    return _bytes(scaled.add_(offset), s).clamp_(max=largest)


def _bytes(q: Tensor, s: Tensor) -> Tensor:
    """q truncated, as bytes in ``s``. By way of int8, which torch does in vectors: the bytes are the same."""
    return s.view(torch.int8).view(-1)[: q.numel()].view(q.shape).copy_(q).view(torch.uint8)


def _nibbles(q: Tensor) -> Tensor:
    """q (n, 32) → 16 bytes: of each the low four bits of q[i] and of q[i + 16]. They overwrite q."""
    eight = q.view(torch.int64).bitwise_and_(0x0F0F0F0F0F0F0F0F)
    return eight[:, :2].bitwise_or_(eight[:, 2:].bitwise_left_shift_(4)).view(torch.uint8)


def _fifth_bits(q: Tensor, s: Tensor) -> Tensor:
    """q (n, 32) → 4 bytes of its fifth bits, the first lowest."""
    fifths = torch.bitwise_right_shift(q, 4, out=s.view(torch.uint8).view(-1)[: q.numel()].view(q.shape))
    # Eight bytes of one bit each, times this, hold the eight bits in their highest byte.
    return fifths.view(torch.int64).mul_(0x0102040810204080).bitwise_right_shift_(56).to(torch.uint8)


_QUANTIZERS: Mapping[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
}
