"""Rotations in blocks along W's columns, R = diag(R₁, …, R_n), each (b, b), for OFT, BOFT, PSOFT and RoAd.

PEFT multiplies by all of R, (in, in), which is nearly all zeros. Block by block the sums have the same terms in the
same order without the zeros, so the bits are the same, except where the product of the whole is cut within a block (MKL
cuts at a few hundred columns). Small blocks would go through another kernel, which rounds differently; so they are
joined to wider ones.
"""

from __future__ import annotations

from shardmerge.adapters.lazy_torch import Tensor, torch

#: The width that blocks are joined to, where possible.
_WIDTH = 64


def together(count: int, size: int) -> int:
    """How many of ``count`` blocks of this size are joined to one."""
    return max(many for many in range(1, max(1, _WIDTH // size) + 1) if count % many == 0)


def widened(blocks: Tensor, count: int) -> Tensor:
    """``count`` blocks (n, b, b) joined to fewer and wider ones; a repeated block stays a repeated one."""
    size, many = blocks.shape[1], together(count, blocks.shape[1])
    if many == 1:
        return blocks
    parts = blocks.expand(many, -1, -1) if len(blocks) == 1 else blocks
    wide = parts.new_zeros(len(parts) // many, many, size, many, size)
    for index in range(many):
        wide[:, index, :, index] = parts[index::many]
    return wide.view(-1, many * size, many * size)


def rotate(tile: Tensor, blocks: Tensor, scratch: Tensor) -> None:
    """``tile`` (rows, n·b) becomes tile · Rᵀ; ``blocks`` is (n, b, b), or (1, b, b) where all are the same."""
    size = blocks.shape[1]
    parts = tile.view(len(tile), -1, size)
    count = parts.shape[1]
    out = scratch.view(count, size, len(tile))
    if count == 1:  # a product of two matrices goes through the large kernel whatever its size
        torch.mm(blocks[0], tile.t(), out=out[0])
    else:
        torch.bmm(blocks.expand(count, -1, -1), parts.permute(1, 2, 0), out=out)
    parts.copy_(out.permute(2, 0, 1))


def rotate_back(tile: Tensor, blocks: Tensor, scratch: Tensor) -> None:
    """``tile`` (rows, n·b) becomes tile · R."""
    size = blocks.shape[1]
    parts = tile.view(len(tile), -1, size)
    count = parts.shape[1]
    out = scratch.view(count, len(tile), size)
    if count == 1:
        torch.mm(tile, blocks[0], out=out[0])
    else:
        torch.bmm(parts.transpose(0, 1), blocks.expand(count, -1, -1), out=out)
    parts.copy_(out.transpose(0, 1))


def rotate_rows(tile: Tensor, blocks: Tensor, scratch: Tensor) -> None:
    """``tile`` (n·b, columns) becomes R · tile."""
    parts, out = (of.view(len(blocks), blocks.shape[1], -1) for of in (tile, scratch))
    parts.copy_(torch.bmm(blocks, parts, out=out))


def cayley(skew: Tensor) -> Tensor:
    """(I + S)⁻¹ (I − S) of skew-symmetric matrices (n, b, b), which are rotations."""
    # There is no solver for 16-bit floats.
    wide = skew.to(torch.promote_types(skew.dtype, torch.float32))
    identity = torch.eye(skew.shape[-1], dtype=wide.dtype, device=skew.device).expand_as(wide)
    rotation: Tensor = torch.linalg.solve(identity + wide, identity - wide, left=False)
    return rotation.to(skew.dtype)


def neumann(skew: Tensor, terms: int) -> Tensor:
    """The first terms of (I + S)(I − S)⁻¹ = I + 2S + 2S² + …, the last of them once only; of 3 terms, those of 4."""
    rotation = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew).clone()
    if terms > 1:
        rotation.add_(skew, alpha=2.0)
    if terms > 2:
        power = skew @ skew
        rotation.add_(power, alpha=2.0)
        for _ in range(3, terms - 1):
            power = power @ skew
            rotation.add_(power, alpha=2.0)
        rotation.add_(power @ skew)
    return rotation


def block_bytes(count: int, repeated: int, size: int, itemsize: int) -> int:
    """The most bytes of ``count`` blocks, each ``repeated`` times, while they are built and when they are widened."""
    elements, many = count * size * size, together(count * repeated, size)
    return elements * 7 * max(itemsize, 4) + elements * many * (many if repeated > 1 else 1) * itemsize
