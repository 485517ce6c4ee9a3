"""Second decoders of packed integers, of MLX's too, and FP4: from the definitions, bit by bit, without the codecs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from shardmerge.spec.tensors import RowRange
from shardmerge.verification.quantised import byte_rows, float32, scales_of
from shardmerge.verification.reading import Decoder, Files, StoredWeight


def _bits(data: Tensor) -> Tensor:
    """Bytes of each row → bits, the lowest of a byte first."""
    return (data[:, :, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten(1)


def _numbers(stream: Tensor, bits: int) -> Tensor:
    """Bits of each row, as many as are whole numbers of ``bits`` → these numbers."""
    return stream.view(len(stream), -1, bits).double() @ torch.exp2(torch.arange(bits).double())


def _codes(files: Files, stored: StoredWeight, rows: RowRange, bits: int) -> Tensor:
    """Codes of rows that begin with a byte: as bits, from the lowest on."""
    each = stored.values.nbytes // math.prod(stored.values.shape[:-1])
    data = byte_rows(files, stored.values, rows.start, len(rows), each)
    return _numbers(_bits(data)[:, : stored.columns * bits], bits)


def packed_int(files: Files, stored: StoredWeight, rows: RowRange) -> Tensor:
    """float32((code − zero code) · scale); without a zero point that is 2^(bits−1)."""
    assert stored.encoding is not None
    bits = stored.encoding.setting("bits")
    zeros = torch.tensor(2.0 ** (bits - 1)).double()
    if "zeros" in stored.parts:
        zeros = _packed_zeros(files, stored, rows, bits)
    return _scaled(files, stored, rows, _codes(files, stored, rows, bits), zeros)


def _packed_zeros(files: Files, stored: StoredWeight, rows: RowRange, bits: int) -> Tensor:
    """Zero points are streams of bits down the rows, one for each group of columns."""
    ref = stored.parts["zeros"]
    words = byte_rows(files, ref, 0, ref.shape[0], ref.shape[1] * 4).view(ref.shape[0], ref.shape[1], 4)
    stream = _bits(words.transpose(0, 1).flatten(1))
    return _numbers(stream[:, rows.start * bits : rows.stop * bits], bits).T


def plain_int(files: Files, stored: StoredWeight, rows: RowRange) -> Tensor:
    """float32((code − zero code) · scale)."""
    codes = byte_rows(files, stored.values, rows.start, len(rows), stored.columns).view(torch.int8).double()
    zeros = torch.zeros(1, 1).double()
    if "zeros" in stored.parts:
        zeros = _of_rows(files, stored, "zeros", rows)
    return _scaled(files, stored, rows, codes, zeros)


def _of_rows(files: Files, stored: StoredWeight, role: str, rows: RowRange) -> Tensor:
    """Scales or zero points of rows, or the one of all."""
    ref = stored.parts[role]
    is_one = stored.encoding is not None and stored.encoding.setting("scales") == "tensor"
    of = RowRange(0, 1) if is_one else rows
    return files.rows(ref, of, ref.shape[1]).double()


def _scaled(files: Files, stored: StoredWeight, rows: RowRange, codes: Tensor, zeros: Tensor) -> Tensor:
    scales, columns = _of_rows(files, stored, "scale", rows), torch.arange(stored.columns)
    group = columns // (stored.columns // scales.shape[1])
    if "order" in stored.parts:
        order = files.rows(stored.parts["order"], RowRange(0, stored.columns), 1).flatten().long()
        group = group if int(order.max()) < 0 else order
    zeros = zeros[:, group] if zeros.ndim == 2 and zeros.shape[1] > 1 else zeros
    return float32((codes - zeros) * scales[:, group])


def fp4(files: Files, stored: StoredWeight, rows: RowRange) -> Tensor:
    """float32(q · scale), where the scale may be float32(s · g) or float32(s / g)."""
    assert stored.encoding is not None
    codes = _codes(files, stored, rows, 4).long()
    sign, power, fraction = codes >> 3, codes >> 1 & 3, (codes & 1).double()
    size = torch.where(power == 0, fraction / 2, torch.exp2(power.double() - 1) * (1 + fraction / 2))
    scales = scales_of(files, stored.parts["scale"], rows.start, len(rows))
    if (does := stored.encoding.setting("of_all")) is not None:
        ref = stored.parts["of_all"]
        of_all = files.rows(ref, RowRange(0, ref.shape[0]), 1).double()
        height = stored.encoding.setting("height", rows.stop)
        of_all = of_all[torch.arange(rows.start, rows.stop) // height]
        scales = float32(scales / of_all if does == "divides" else scales * of_all)
    group = torch.arange(stored.columns) // stored.encoding.setting("group")
    return float32(torch.where(sign == 1, -size, size) * scales[:, group])


def mlx_affine(files: Files, stored: StoredWeight, rows: RowRange) -> Tensor:
    """float32(float32(code · scale) + bias)."""
    assert stored.encoding is not None
    codes = _codes(files, stored, rows, stored.encoding.setting("bits"))
    scales, biases = (scales_of(files, stored.parts[role], rows.start, len(rows)) for role in ("scales", "biases"))
    group = torch.arange(stored.columns) // (stored.columns // scales.shape[1])
    return float32(float32(codes * scales[:, group]) + biases[:, group])


PACKS: Mapping[str, Decoder] = {
    "packed-int": packed_int,
    "plain-int": plain_int,
    "fp4": fp4,
    "mlx-affine": mlx_affine,
}
