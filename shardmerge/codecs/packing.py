"""Codes of 1 to 8 bits in words of 32: a stream from the lowest bit on, of which a code may cross two words.

Importing this module imports torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardmerge.codecs import tables

WORD = 32


def read(stored: Tensor, bits: int, least: int, out: Tensor) -> None:
    """Words (rows, words) → ``out`` (float32: rows, columns): the codes, of which 0 is the number ``least``."""
    if _are_whole(bits, out.shape[1]):
        levels = tuple(float(code + least) for code in range(1 << bits))
        (tables.look_up_halves if bits == 4 else tables.look_up)(stored.view(torch.uint8), levels, out)
    else:
        out.copy_(unpack(stored.view(torch.int32), bits, out.shape[1]).add_(least))


def write(numbers: Tensor, bits: int, least: int, target: Tensor) -> None:
    """The reverse of `read`: whole ``numbers``, which are overwritten, → words in ``target``."""
    codes = numbers.sub_(least).to(torch.uint8)
    if not _are_whole(bits, codes.shape[1]):
        pack(codes, bits, target.view(torch.int32))
    elif bits == 4:
        pack_halves(codes, target.view(torch.uint8))
    else:
        target.view(torch.uint8).copy_(codes)


def _are_whole(bits: int, count: int) -> bool:
    """Whether the words of so many codes are halves of bytes, or bytes, and nothing else."""
    return bits in (4, 8) and count * bits % WORD == 0


def unpack(packed: Tensor, bits: int, count: int, first_bit: int = 0) -> Tensor:
    """Words (int32: rows, words) → ``count`` codes of each row (int64), from ``first_bit`` on."""
    word, shift = _places(bits, count, first_bit, packed.device)
    low = packed.long() & 0xFFFFFFFF
    high = torch.nn.functional.pad(low[:, 1:], (0, 1)) << WORD
    return ((low | high)[:, word] >> shift) & ((1 << bits) - 1)


def pack(codes: Tensor, bits: int, into: Tensor) -> None:
    """Codes of each row → words (int32: rows, words); the bits after the last code are 0."""
    word, shift = _places(bits, codes.shape[1], 0, codes.device)
    placed = codes.long() << shift
    sums = torch.zeros(len(codes), into.shape[1] + 1, dtype=torch.int64, device=codes.device)
    sums.index_add_(1, word, placed & 0xFFFFFFFF)
    sums.index_add_(1, word + 1, placed >> WORD)
    into.copy_(sums[:, :-1])


def _places(bits: int, count: int, first_bit: int, device: torch.device) -> tuple[Tensor, Tensor]:
    at = torch.arange(count, device=device) * bits + first_bit
    return at // WORD, at % WORD


def pack_halves(codes: Tensor, into: Tensor) -> None:
    """Codes of four bits (uint8: rows, columns) → bytes of two (uint8: rows, columns / 2), the first in the lower half.

    Two are looked at as one number of 16 bits: 2.7 times as fast as one by one.
    """
    pairs = codes.view(torch.int16)
    into.copy_((pairs >> 4).bitwise_or_(pairs))
