"""Weights that MLX has quantised: integers of 1 to 8 bits with a scale and a bias for some columns, FP4, and FP8.

config.json has ``quantization``, and since 2025 a copy of it as ``quantization_config``: ``group_size``, ``bits``,
``mode``, and for single modules, by name, other settings, or ``false``. By ``mode``:

- ``affine``: ``weight`` U32 (rows, columns · bits / 32), codes as a stream of each row from the lowest bit on;
  ``scales`` and ``biases`` in the model's dtype (rows, groups of columns). A value is float32(float32(q · scale) +
  bias); where scales have 16 bits the product is exact;
- ``mxfp4``, ``mxfp8``: ``weight`` U32 with the bytes of E2M1 or E4M3, ``scales`` U8 (E8M0) for 32 columns;
- ``nvfp4``: ``weight`` U32 with the bytes of E2M1, ``scales`` U8 (E4M3) for 16 columns.

Experts of a layer are in one tensor (experts, rows, …). Embeddings are quantised like all else, and heads, too.
Source: MLX's ``mlx.core.quantize`` and ``dequantize`` on a CPU, with scales in float32: in 16 bits MLX rounds the
product and the sum to 16 bits. mlx-lm's ``load_model`` for what config.json says.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shardmerge.codecs.codec import Output, ReadPart, StoredTensors, TileSlot
from shardmerge.codecs.grid_codec import GridCodec
from shardmerge.codecs.quantization import MLX_METHOD, described, quantization, shard_of
from shardmerge.spec.tensors import FLOAT_DTYPES, Encoding, RowRange, TensorRef, Weight, tensor_nbytes

if TYPE_CHECKING:
    from torch import Tensor

_WORD = 32
_SCALES, _BIASES, _SCALE_OF_ALL = "scales", "biases", "global_scale"


@dataclass(frozen=True, slots=True)
class _Mode:
    """What a mode allows; the first of each is what it means where config.json does not say."""

    bits: tuple[int, ...]
    groups: tuple[int, ...]
    #: The codec, and what the bytes of its scales are; none of affine, which has floats.
    codec: str
    scales: str = ""


_MODES: Mapping[str, _Mode] = {
    "affine": _Mode((4, 1, 2, 3, 5, 6, 8), (64, 32, 128), "mlx-affine"),
    "mxfp4": _Mode((4,), (32,), "fp4", "F8_E8M0"),
    "mxfp8": _Mode((8,), (32,), "fp8", "F8_E8M0"),
    "nvfp4": _Mode((4,), (16,), "fp4", "F8_E4M3"),
}


class MlxAffine(GridCodec):
    """Settings: ``bits``, and maybe ``seed``. It claims the weights of MLX's other modes, too, for their codecs."""

    name = "mlx-affine"
    title = "MLX's integers of 1 to 8 bits (affine)"
    methods = (MLX_METHOD,)

    def claims(self, tensors: StoredTensors, config: Mapping[str, Any]) -> Iterator[Weight | str]:
        settings = quantization(config)
        if settings.get("quant_method") != MLX_METHOD:
            return
        for name, scales in tensors.items():
            module, _, last = name.rpartition(".")
            codes = tensors.get(f"{module}.weight")
            if last != _SCALES or codes is None:
                continue
            try:
                yield _claim(tensors, module, codes, scales, settings)
            except ValueError as error:
                yield f"{codes.name} is stored by MLX as {described(codes)}, but {error}"

    def outputs(self, name: str, shape: tuple[int, ...], encoding: Encoding) -> tuple[Output, ...]:
        """The codes; scales and biases stay as they are."""
        stored = (*shape[:-1], shape[-1] * encoding.setting("bits") // _WORD)
        return (Output("values", name, "U32", stored, tensor_nbytes("U32", stored)),)

    # --- computing ----------------------------------------------------------------------------------------------------

    def decode(self, slot: TileSlot, stored: Tensor, tile: Tensor) -> None:
        import torch

        from shardmerge.codecs import grids, packing

        assert slot.tensor.decoding is not None
        bits = slot.tensor.decoding.setting("bits")
        scales, biases = slot.part(_SCALES, slot.rows), slot.part(_BIASES, slot.rows)
        for here in grids.slabs(tile):
            values = grids.float32_like(tile[here])
            packing.read(stored[here], bits, 0, values)
            grids.by_groups(torch.Tensor.mul_, values, scales[here].to(values.dtype))
            grids.by_groups(torch.Tensor.add_, values, biases[here].to(values.dtype))
            if values.dtype != tile.dtype:
                tile[here] = values

    def encode(self, slot: TileSlot, tile: Tensor, target: Tensor) -> bool:
        """The nearest code on the base's own grid, ties to even, or one of the two neighbours."""
        import torch

        from shardmerge.codecs import grids, packing, rounding

        if not slot.is_checked and not rounding.is_finite(tile):
            return False
        assert slot.tensor.encoding is not None
        bits = slot.tensor.encoding.setting("bits")
        scales, biases = slot.part(_SCALES, slot.rows), slot.part(_BIASES, slot.rows)
        grids.check_divisors(slot, _SCALES, scales, slot.rows.start)
        for here, share in grids.shares(tile, slot):
            scale, bias = scales[here].to(tile.dtype), biases[here].to(tile.dtype)
            position = grids.by_groups(torch.Tensor.sub_, tile[here], bias)
            grids.by_groups(torch.Tensor.div_, position, scale).clamp_(0, (1 << bits) - 1)
            off = (bias / scale).abs_().add_(1 << bits).mul_(grids.ROUNDINGS)
            packing.write(grids.whole(position, share, _spread(off, position)), bits, 0, target[here])
        return True

    def rounding_bound(self, encoding: Encoding, values: Tensor, rows: RowRange, part: ReadPart) -> Tensor:
        """Half a step, or a whole one where rounding is stochastic, and all of what is beyond the last code."""
        import torch

        from shardmerge.codecs import grids

        bits, step = encoding.setting("bits"), 0.5 if encoding.setting("seed") is None else 1.0
        scales, biases = (part(role, rows).to(values.dtype) for role in (_SCALES, _BIASES))
        position = grids.by_groups(torch.Tensor.sub_, values.clone(), biases)
        grids.by_groups(torch.Tensor.div_, position, scales)
        beyond = position.sub_(position.clamp(0, (1 << bits) - 1)).abs_()
        bound = grids.by_groups(torch.Tensor.mul_, beyond.add_(step), scales.abs())
        # What float32 rounds is as large as the product, the bias and the value are.
        rounded = biases.abs().add_(scales.abs(), alpha=1 << bits).mul_(grids.ROUNDINGS)
        return grids.by_groups(torch.Tensor.add_, bound, rounded).add_(values.abs(), alpha=grids.ROUNDINGS)


# --- what a checkpoint says -------------------------------------------------------------------------------------------


def _claim(
    tensors: Mapping[str, TensorRef], module: str, codes: TensorRef, scales: TensorRef, settings: Mapping[str, Any]
) -> Weight:
    """The weight of a module; `ValueError` says what does not fit."""
    mode, bits, group = _scheme(settings, module)
    if codes.dtype != "U32" or len(codes.shape) not in (2, 3) or not all(codes.shape):
        raise ValueError(f"{scales.name} is beside it; expected is a matrix of U32, or one for each expert")
    *experts, rows, words = codes.shape
    columns, over = divmod(words * _WORD, bits)
    if over or columns % group or scales.shape != (*experts, rows, columns // group):
        raise ValueError(f"{scales.name} is {described(scales)}, and config.json says {bits} bits in groups of {group}")
    if (of_all := tensors.get(f"{module}.{_SCALE_OF_ALL}")) is not None:
        raise ValueError(f"{of_all.name} is beside it, which cannot be read")
    biases = tensors.get(f"{module}.{_BIASES}")
    parts = [
        ("values", dataclasses.replace(codes, shape=(*experts, rows, columns))),
        (_SCALES if mode.codec == MLX_AFFINE.name else "scale", _as_matrix(scales, mode.scales or scales.dtype)),
    ]
    if mode.scales:
        if scales.dtype != "U8" or biases is not None:
            found = f" and has {biases.name}" if biases else ""
            raise ValueError(f"its scales are {scales.dtype}{found}; expected are U8 and no biases")
    elif scales.dtype not in FLOAT_DTYPES or biases is None or biases.shape != scales.shape:
        raise ValueError(
            f"its scales are {described(scales)}, its biases are {described(biases)}; expected are floats, of each "
            "as many"
        )
    elif biases.dtype not in FLOAT_DTYPES:
        raise ValueError(f"its biases are {described(biases)}; expected are floats")
    else:
        parts.append((_BIASES, _as_matrix(biases, biases.dtype)))
    encoding = Encoding(mode.codec, _settings(mode, bits, group, rows), len(codes.shape) - 1)
    return Weight(codes.name, tuple(parts), shard_of(codes), encoding)


def _settings(mode: _Mode, bits: int, group: int, height: int) -> tuple[tuple[str, Any], ...]:
    """The settings of the mode's codec."""
    if mode.codec == "fp4":
        return ("group", group), ("codes", "U32"), ("suffix", "")
    if mode.codec == "fp8":
        return ("block", (1, group)), ("height", height), ("codes", "U32")
    return (("bits", bits),)


def _scheme(settings: Mapping[str, Any], module: str) -> tuple[_Mode, int, int]:
    """Mode, bits and the columns of a group that config.json gives a module; `ValueError` where it has none."""
    of_module = settings.get(module, True)
    given = settings if of_module is True else of_module
    if not isinstance(given, dict):
        raise ValueError(f"config.json's quantization has {of_module!r:.100} for {module}, and its scales are stored")
    name = given.get("mode") or "affine"
    mode = _MODES.get(name) if isinstance(name, str) else None
    if mode is None:
        raise ValueError(f"config.json gives it the mode {name!r:.100}; expected is {', '.join(_MODES)}")
    found = []
    for key, allowed in (("bits", mode.bits), ("group_size", mode.groups)):
        value = given.get(key)
        value = allowed[0] if value is None else value
        if type(value) is not int or value not in allowed:
            known = ", ".join(map(str, sorted(allowed)))
            raise ValueError(f"config.json gives it {key} {value!r:.100}; expected of {name} is {known}")
        found.append(value)
    return mode, found[0], found[1]


def _as_matrix(ref: TensorRef, dtype: str) -> TensorRef:
    """Those of experts one after the other."""
    return dataclasses.replace(ref, dtype=dtype, shape=(math.prod(ref.shape[:-1]), ref.shape[-1]))


def _spread(of_groups: Tensor, columns: Tensor) -> Tensor:
    """Numbers of groups (rows, groups) as numbers of their columns."""
    return of_groups.repeat_interleave(columns.shape[1] // of_groups.shape[1], 1)


MLX_AFFINE = MlxAffine()
