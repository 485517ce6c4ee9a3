"""What every codec promises. A codec passes by being listed in `CASES`, with an oracle that is not its own code."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from torch import Tensor

from shardmerge.codecs.codec import Codec, Output
from shardmerge.codecs.ggml import BLOCKS
from shardmerge.codecs.registry import CODECS
from shardmerge.codecs.rounding import NUMBER_DTYPES, TORCH_DTYPES
from shardmerge.spec.plans import SmallPart, TensorPlan
from shardmerge.spec.tensors import Encoding, RowRange, TensorInfo, TensorRef
from shardmerge.verification.decoders import DECODERS
from tests.support import quantised_bnb, quantised_mlx, quantised_packs
from tests.support.toy_codec import ROWS, TOYS

#: The parts of a weight as a file has them, by role.
Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A codec with its settings, and what somebody else reads of the parts that it writes: (rows, columns), float64.

    ``arranged``: where the format turns rows or adds to them, what becomes of exact values.
    """

    codec: Codec
    read: Callable[[Parts, tuple[int, int]], Tensor]
    settings: tuple[tuple[str, object], ...] = ()
    arranged: Callable[[Tensor], Tensor] = lambda values: values
    #: What tiles may be kept in.
    tiles: tuple[str, ...] = ("F32", "F64")
    #: Whether rows may end within a unit.
    may_be_ragged: bool = True
    #: Of a codec that writes onto the base's grid: the parts of a base's weight of a shape that stay as they are.
    base: Callable[[tuple[int, int]], Parts] = lambda shape: {}

    @property
    def encoding(self) -> Encoding:
        return Encoding(self.codec.name, self.settings)

    def __str__(self) -> str:
        return "-".join([self.codec.name, *(str(value) for _, value in self.settings)]).replace(" ", "")


def of_torch(dtype: str) -> Callable[[Parts, tuple[int, int]], Tensor]:
    return lambda parts, shape: parts["values"].view(TORCH_DTYPES[dtype]).view(shape).double()


def of_gguf(kind: str) -> Callable[[Parts, tuple[int, int]], Tensor]:
    def read(parts: Parts, shape: tuple[int, int]) -> Tensor:
        data = parts["values"].view(torch.uint8).view(shape[0], -1).numpy()
        return torch.from_numpy(quants.dequantize(data, GGMLQuantizationType[kind]).astype(np.float64)).view(shape)

    return read


def of_toy(parts: Parts, shape: tuple[int, int]) -> Tensor:
    codes, scales = parts["values"].numpy().astype(np.float64), parts["scale"].numpy().astype(np.float64)
    rows = np.arange(shape[0]) // (ROWS if len(scales) > 1 else shape[0])
    return torch.from_numpy(codes.reshape(shape) * scales[rows][:, None])


def turned(values: Tensor) -> Tensor:
    """Rows seen as (g, 2, 4) → rows seen as (g, 4, 2)."""
    return values.view(-1, 2, 4, values.shape[1]).transpose(1, 2).reshape(values.shape)


def of_fp8(parts: Parts, shape: tuple[int, int]) -> Tensor:
    """Each code by the definition of E4M3: sign, four bits of exponent with bias 7, three of fraction."""
    codes = parts["values"].view(torch.uint8).numpy().reshape(shape).astype(np.int64)
    power, fraction = codes >> 3 & 15, codes & 7
    values = np.where(power == 0, fraction * 2.0**-9, (8 + fraction) * 2.0 ** (power - 10.0))
    values[codes & 127 == 127] = math.nan
    scales = spread(parts["scale"].double().numpy(), shape)
    return torch.from_numpy((np.where(codes & 128, -values, values) * scales).astype(np.float32).astype(np.float64))


def spread(grid: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A grid of blocks of 32 × 48 as one number an element."""
    return np.repeat(np.repeat(grid, FP8_BLOCK[0], 0), FP8_BLOCK[1], 1)[: shape[0], : shape[1]]


def fp8_scales(shape: tuple[int, int]) -> Parts:
    """What FP8 bases have: the largest magnitude of a block becomes 448."""
    high, wide = (-(-size // of) for size, of in zip(shape, FP8_BLOCK, strict=True))
    padded = torch.zeros(high * FP8_BLOCK[0], wide * FP8_BLOCK[1])
    padded[: shape[0], : shape[1]] = numbers(shape, seed=9)
    blocks = padded.view(high, FP8_BLOCK[0], wide, FP8_BLOCK[1])
    return {"scale": blocks.abs().amax((1, 3)) / 448}


def of_bnb4(parts: Parts, shape: tuple[int, int]) -> Tensor:
    named: Parts = {"": parts["values"], STATE: parts["quant_state"], **parts}
    named = {end: part for end, part in named.items() if end not in ("values", "quant_state")}
    return quantised_bnb.values_of(named).double()


def bnb4_base(kind: str, nested: bool) -> Callable[[tuple[int, int]], Parts]:
    def base(shape: tuple[int, int]) -> Parts:
        parts = quantised_bnb.four_bits(numbers(shape, seed=9), kind, nested)
        state = parts.pop(f"quant_state.bitsandbytes__{kind}")
        return {**{end: part for end, part in parts.items() if end}, "quant_state": _padded(state)}

    return base


def _padded(state: Tensor) -> Tensor:
    """JSON of a weight of any shape in as many bytes: the settings of a case say how many."""
    return torch.cat([state, torch.full((STATE_BYTES - len(state),), ord(" "), dtype=torch.uint8)])


def bnb4_case(kind: str, nested: bool, **settings: object) -> Case:
    given = {"kind": kind, "block": 64, "nested": 256 * nested, "dtype": "U8", "state": STATE_BYTES, **settings}
    return Case(CODECS["bnb-4bit"], of_bnb4, tuple(given.items()), base=bnb4_base(kind, nested))


def of_bnb8(parts: Parts, shape: tuple[int, int]) -> Tensor:
    return quantised_bnb.values_of_eight({"weight": parts["values"].view(shape), "SCB": parts["scale"]}).double()


def integer_case(bits: int = 4, group: int | None = 32, symmetric: bool = True, **has: bool) -> Case:
    """Integers of compressed-tensors: the parts that stay are called by their roles."""
    is_packed = not has.pop("plain", False)
    roles = {"weight_scale": "scale", "weight_zero_point": "zeros", "weight_g_idx": "order"}

    def base(shape: tuple[int, int]) -> Parts:
        order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(1)) // group if has and group else None
        parts = quantised_packs.integer_parts(
            numbers(shape, seed=9), bits, group, symmetric, order=order, is_packed=is_packed
        )
        found = {role: parts[name] for name, role in roles.items() if name in parts}
        return {role: part if role == "order" else part.view(len(part), -1) for role, part in found.items()}

    def read(parts: Parts, shape: tuple[int, int]) -> Tensor:
        named = {name: parts[role] for name, role in roles.items() if role in parts}
        codes = {"weight_packed" if is_packed else "weight": parts["values"]}
        return quantised_packs.integer_values({**named, **codes}, shape, bits).double()

    scales = "group" if group and group > 0 else "tensor" if group else "channel"
    settings = {"bits": bits, "scales": scales, **({} if symmetric else {"zeros": True}), **has}
    return Case(CODECS["packed-int" if is_packed else "plain-int"], read, tuple(settings.items()), base=base)


def fp4_case(kind: str) -> Case:
    codes = quantised_packs.FP4_CODES[kind]
    roles = {"weight_scale": "scale", "scale": "scale", "weight_scale_2": "of_all", "weight_global_scale": "of_all"}

    def base(shape: tuple[int, int]) -> Parts:
        parts = quantised_packs.fp4_parts(numbers(shape, seed=9), kind)
        found = {roles[name]: part for name, part in parts.items() if name != codes}
        if found["scale"].dtype == torch.uint8:
            found["scale"] = found["scale"].view(torch.float8_e8m0fnu)
        return {role: part.view(1, 1) if role == "of_all" else part for role, part in found.items()}

    def read(parts: Parts, shape: tuple[int, int]) -> Tensor:
        names = {"scale": "scale" if kind == "fp4-deepseek" else "weight_scale"}
        names["of_all"] = "weight_scale_2" if kind == "nvfp4-modelopt" else "weight_global_scale"
        named = {name: parts[role] for role, name in names.items() if role in parts}
        if "of_all" in parts:
            named[names["of_all"]] = parts["of_all"].view(())
        return quantised_packs.fp4_values({**named, codes: parts["values"].view(shape[0], -1)}, kind).double()

    settings: dict[str, object] = {"group": 16 if kind.startswith("nvfp4") else 32}
    settings |= {"codes": "I8" if kind == "fp4-deepseek" else "U8", "suffix": "_packed" if "packed" in codes else ""}
    if kind.startswith("nvfp4"):
        settings["of_all"] = "multiplies" if "modelopt" in kind else "divides"
    return Case(CODECS["fp4"], read, tuple(settings.items()), base=base)


def mlx_case(mode: str = "affine", bits: int = 4, group: int = 32, dtype: str = "BF16") -> Case:
    """MLX: codes in words, of the codecs' roles."""
    roles = {"scales": "scales" if mode == "affine" else "scale", "biases": "biases"}
    scales = TORCH_DTYPES[dtype] if mode == "affine" else torch.float8_e8m0fnu

    def base(shape: tuple[int, int]) -> Parts:
        parts = quantised_mlx.mlx_parts(numbers(shape, seed=9), mode, bits, group, TORCH_DTYPES[dtype])
        return {roles[end]: part.view(scales) for end, part in parts.items() if end != "weight"}

    def read(parts: Parts, shape: tuple[int, int]) -> Tensor:
        named = {end: parts[role] for end, role in roles.items() if role in parts}
        if mode != "affine":
            named["scales"] = named["scales"].view(torch.uint8)
        return quantised_mlx.mlx_values(
            {**named, "weight": parts["values"].view(shape[0], -1)}, shape[1], mode
        ).double()

    settings: dict[str, object] = {"group": group, "codes": "U32", "suffix": ""}
    if mode == "affine":
        settings = {"bits": bits}
    elif mode == "mxfp8":
        settings = {"block": (1, group), "height": 1 << 20, "codes": "U32"}
    codec = {"affine": "mlx-affine", "mxfp8": "fp8"}.get(mode, "fp4")
    return Case(CODECS[codec], read, tuple(settings.items()), base=base)


STATE, STATE_BYTES = "quant_state.bitsandbytes__of_case", 256
FP8_BLOCK = (32, 48)
FLOATS = ("F64", "F32", "F16", "BF16")
CASES = (
    *(Case(CODECS[dtype], of_torch(dtype)) for dtype in FLOATS),
    *(Case(CODECS[f"stochastic-{dtype}"], of_torch(dtype), (("seed", 5),)) for dtype in FLOATS[1:]),
    *(Case(CODECS[f"ggml-{kind}"], of_gguf(kind), (("through", "BF16"),)) for kind in BLOCKS),
    Case(CODECS["ggml-Q8_0"], of_gguf("Q8_0"), (("through", "F32"),)),
    Case(CODECS["ggml-Q4_1"], of_gguf("Q4_1"), (("through", "stochastic-BF16"), ("seed", 3))),
    Case(
        CODECS["ggml-Q5_0"],
        of_gguf("Q5_0"),
        (("through", "F16"), ("shuffle", (8, 2, 4))),
        arranged=turned,
        may_be_ragged=False,
    ),
    Case(CODECS["fp8"], of_fp8, (("block", FP8_BLOCK), ("height", 1 << 20)), base=fp8_scales),
    bnb4_case("nf4", True),
    bnb4_case("fp4", True, dtype="BF16"),
    bnb4_case("nf4", False),
    Case(CODECS["bnb-int8"], of_bnb8, base=lambda shape: {"scale": numbers(shape, seed=9).abs().amax(1)}),
    *(integer_case(bits) for bits in (1, 2, 3, 4, 5, 7, 8)),
    *(integer_case(bits, symmetric=False) for bits in (3, 4)),
    *(integer_case(group=group, symmetric=symmetric) for group in (None,) for symmetric in (True, False)),
    integer_case(order=True),
    integer_case(symmetric=False, order=True),
    *(integer_case(8, group, symmetric, plain=True) for group in (None, -1, 32) for symmetric in (True, False)),
    *(fp4_case(kind) for kind in quantised_packs.FP4_CODES),
    *(mlx_case(bits=bits) for bits in (1, 2, 3, 4, 5, 6, 8)),
    mlx_case(bits=8, dtype="F32"),
    *(mlx_case(mode, *quantised_mlx.MODES[mode]) for mode in ("mxfp4", "mxfp8")),
    *(Case(codec, of_toy) for codec in TOYS),
)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
READING = [case for case in CASES if type(case.codec).decode is not Codec.decode]
reading = pytest.mark.parametrize("case", READING, ids=str)
SHAPES = ((64, 96), (1, 32), (320, 64))


# --- a slot, as the engine has one ------------------------------------------------------------------------------------


@dataclass
class Slot:
    tensor: TensorPlan
    rows: RowRange
    memory: tuple[Tensor, Tensor]
    made_parts: Mapping[str, Tensor]
    source_parts: Mapping[str, Tensor] = field(default_factory=dict)
    is_checked: bool = False

    def halves(self) -> tuple[Tensor, Tensor]:
        return self.memory

    def part(self, role: str, rows: RowRange) -> Tensor:
        return self.source_parts[role][rows.start : rows.stop]

    def made(self, role: str) -> Tensor:
        return self.made_parts[role]


def plan_of(case: Case, shape: tuple[int, int], outputs: tuple[Output, ...]) -> TensorPlan:
    ends = itertools.accumulate((output.nbytes for output in outputs), initial=0)
    infos = [
        TensorInfo(output.dtype, output.shape, place)
        for output, place in zip(outputs, itertools.pairwise(ends), strict=True)
    ]
    made = [SmallPart(output.role, output.name, info) for output, info in zip(outputs, infos, strict=True)]
    source = TensorRef("w", "f", "F32", shape, 0, 4 * math.prod(shape))
    return TensorPlan(source, infos[0], tiles=1, decoding=case.encoding, encoding=case.encoding, made=tuple(made[1:]))


class Encoded:
    """A weight, encoded tile by tile. Bytes that nobody writes show: those of the values begin as ``fill``."""

    def __init__(self, case: Case, values: Tensor, step: int | None = None, fill: int = 0xA5) -> None:
        self.case, self.values = case, values
        self.shape = (values.shape[0], values.shape[1])
        self.outputs = case.codec.outputs("w", self.shape, case.encoding)
        self.plan = plan_of(case, self.shape, self.outputs)
        self.base = case.base(self.shape)
        self.raw = torch.full((self.outputs[0].nbytes,), fill, dtype=torch.uint8)
        self.parts: dict[str, Tensor] = {
            output.role: torch.zeros(output.shape, dtype=NUMBER_DTYPES[output.dtype]) for output in self.outputs[1:]
        }
        dtype = next(name for name, of in TORCH_DTYPES.items() if of == values.dtype)
        self.element = max(values.element_size(), case.codec.memory(self.plan, dtype).element)
        self.parts["values"] = self.raw.view(NUMBER_DTYPES.get(self.outputs[0].dtype, torch.uint8))
        rows = list(self._tiles(step))
        if case.codec.has_prepass(case.encoding):
            for part in rows:
                slot, tile = self.slot(part)
                case.codec.prepass(slot, tile)
        for part in rows:
            slot, tile = self.slot(part)
            assert case.codec.encode(slot, tile, self.target(part))

    def _tiles(self, step: int | None) -> Iterator[RowRange]:
        step = step or self.shape[0]
        return (RowRange(at, min(at + step, self.shape[0])) for at in range(0, self.shape[0], step))

    def slot(self, rows: RowRange) -> tuple[Slot, Tensor]:
        """Memory is as much as the codec has asked for, and no more."""
        size = len(rows) * self.shape[1] * self.element
        memory = (torch.empty(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8))
        tile = memory[0][: len(rows) * self.shape[1] * self.values.element_size()].view(self.values.dtype)
        tile = tile.view(len(rows), self.shape[1]).copy_(self.values[rows.start : rows.stop])
        return Slot(self.plan, rows, memory, self.parts, self.base), tile

    def target(self, rows: RowRange) -> Tensor:
        width = self.plan.write_row
        part = self.raw[rows.start * width : rows.stop * width]
        return part.view(NUMBER_DTYPES.get(self.outputs[0].dtype, torch.uint8)).view(len(rows), -1)

    def bytes(self) -> dict[str, bytes]:
        return {role: part.contiguous().view(torch.uint8).numpy().tobytes() for role, part in self.parts.items()}

    def bound(self) -> Tensor:
        """The codec's, of the weight's values."""
        rows = RowRange(0, self.shape[0])
        bound = self.case.codec.rounding_bound(self.case.encoding, self.values.double(), rows, self._part)
        return self.case.arranged(bound)

    def _part(self, role: str, rows: RowRange) -> Tensor:
        return {**self.base, **self.parts}[role][rows.start : rows.stop]

    def error(self) -> Tensor:
        """By how much what was read is off."""
        return (self.read() - self.case.arranged(self.values.double())).abs()

    def read(self) -> Tensor:
        """What somebody else reads of it."""
        return self.case.read({**self.base, **self.parts}, self.shape)


def numbers(shape: tuple[int, int], dtype: str = "F32", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(shape, generator=generator, dtype=torch.float64)
    rows = torch.logspace(-3, 1, shape[0], dtype=torch.float64)[:, None]
    return (wide * rows * 0.02).to(TORCH_DTYPES[dtype])


def unit_of(case: Case) -> int:
    return case.codec.row_unit(case.encoding)


def shapes_of(case: Case) -> list[tuple[int, int]]:
    return [shape for shape in SHAPES if case.may_be_ragged or shape[0] % unit_of(case) == 0]


# --- the contract -----------------------------------------------------------------------------------------------------


def test_every_codec_is_listed() -> None:
    assert {case.codec.name for case in CASES} >= CODECS.keys()
    assert all(CODECS[case.codec.name] is case.codec for case in CASES if case.codec not in TOYS)


@every_case
def test_what_is_read_is_within_the_rounding_bound(case: Case) -> None:
    for shape, dtype in itertools.product(shapes_of(case), case.tiles):
        values = numbers(shape, dtype)
        made = Encoded(case, values)
        error, bound = made.error(), made.bound()
        assert bool((error <= bound).all()), f"{float((error / bound).nan_to_num().max()):.3f} of the bound"
        # And the bound says something: a codec that promises nothing could not be verified.
        assert float(bound.max()) <= 2 * float(values.double().abs().max())


@every_case
def test_zeros_and_extremes_are_within_the_rounding_bound(case: Case) -> None:
    values = numbers((64, 64))
    values[:32] = 0.0
    values[40] = -values[40].abs()
    values[41, ::2] = 0.0
    values[42] *= 1e3
    made = Encoded(case, values)
    assert bool((made.error() <= made.bound()).all())


@every_case
def test_tiles_of_any_size_give_the_same_bytes(case: Case) -> None:
    unit = unit_of(case)
    for shape, dtype in itertools.product(shapes_of(case), case.tiles):
        values = numbers(shape, dtype, seed=1)
        whole = Encoded(case, values).bytes()
        for step in {unit, 3 * unit, 5 * unit}:
            assert Encoded(case, values, step).bytes() == whole


@every_case
def test_the_last_unit_may_be_short(case: Case) -> None:
    if not case.may_be_ragged:
        return
    unit = unit_of(case)
    values = numbers((2 * unit + max(1, unit // 3), 64), seed=2)
    made = Encoded(case, values)
    assert Encoded(case, values, unit).bytes() == made.bytes()
    assert bool((made.error() <= made.bound()).all())


@every_case
def test_outputs_are_what_is_written(case: Case) -> None:
    values = numbers((64, 64), seed=3)
    one, other = (Encoded(case, values, fill=fill) for fill in (0xA5, 0x5A))
    assert one.bytes() == other.bytes()  # every byte is written
    roles = [output.role for output in one.outputs]
    assert roles[0] == "values" and len(set(roles)) == len(roles)
    assert len({output.name for output in one.outputs}) == len(roles)
    for output in one.outputs:
        assert len(one.bytes()[output.role]) == output.nbytes
    # Values go by rows, each as many bytes as the next.
    assert one.outputs[0].nbytes == one.plan.write_row * 64
    assert one.plan.goes_by_rows and math.prod(one.plan.out.shape) >= 64


@every_case
def test_the_same_values_give_the_same_bytes(case: Case) -> None:
    values = numbers((64, 64), seed=4)
    assert Encoded(case, values).bytes() == Encoded(case, values).bytes()


@every_case
def test_below_the_largest_all_is_finite_and_above_it_is_refused(case: Case) -> None:
    probe = Encoded(case, numbers((64, 64), "F64"))
    largest = case.codec.largest(probe.plan)
    if largest == math.inf:
        largest = float(torch.finfo(torch.float64).max)
    else:
        for wrong in (largest, -largest, math.inf, math.nan):
            values = numbers((64, 64), "F64")
            values[5, 7] = wrong
            slot, tile = replaced(probe, values)
            if case.codec.encode(slot, tile, probe.target(slot.rows)):  # rounded stochastically, to a neighbour
                assert case.encoding.setting("seed") is not None and math.isfinite(wrong)
                assert bool(torch.isfinite(probe.read()).all())
            else:
                assert torch.equal(tile.nan_to_num(), values.nan_to_num())  # nothing was done to it
    values = numbers((64, 64), "F64")
    values[5, 7] = math.nextafter(largest, 0.0)
    assert bool(torch.isfinite(Encoded(case, values).read()).all())


def replaced(probe: Encoded, values: Tensor) -> tuple[Slot, Tensor]:
    slot, tile = probe.slot(RowRange(0, len(values)))
    return slot, tile.copy_(values)


@every_case
def test_who_is_checked_is_encoded(case: Case) -> None:
    """An infinity of the base's own stays one, where one can be stored."""
    probe = Encoded(case, numbers((64, 64), "F64"))
    values = numbers((64, 64), "F64")
    values[5, 7] = math.inf
    slot, tile = replaced(probe, values)
    assert not case.codec.encode(slot, tile, probe.target(slot.rows))
    slot.is_checked = True
    case.codec.encode(slot, tile, probe.target(slot.rows))
    if case.codec.holds_infinity:
        assert int(torch.isinf(probe.read()).sum()) == 1


@every_case
def test_stochastic_rounding_is_another_encoding_or_none(case: Case) -> None:
    other = case.codec.stochastic(case.encoding, 11)
    if other is None:
        return
    assert other.setting("seed") == 11 and other.codec in CODECS
    values = numbers((64, 64), "F64", seed=6)
    made = Encoded(dataclasses.replace(case, codec=CODECS[other.codec], settings=other.settings), values)
    assert bool((made.error() <= made.bound()).all())


@reading
def test_it_reads_what_somebody_else_reads(case: Case) -> None:
    for shape in ((64, 96), (70, 32)):
        made = Encoded(case, numbers(shape, seed=7))
        sources = {**made.base, **{role: part for role, part in made.parts.items() if role != "values"}}
        wide = torch.float64 if case.codec.values == "F64" else torch.float32
        for step in (1, 13, ROWS, 70):
            for at in range(0, shape[0], step):
                rows = RowRange(at, min(at + step, shape[0]))
                tile = torch.full((len(rows), shape[1]), math.nan, dtype=wide)
                slot = Slot(made.plan, rows, (made.raw, made.raw), {}, sources)
                case.codec.decode(slot, made.target(rows), tile)
                assert torch.equal(tile, made.read()[rows.start : rows.stop].to(wide))


@reading
def test_verify_has_a_decoder_of_its_own(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support import toy_codec

    for codec in toy_codec.TOYS:
        monkeypatch.setitem(DECODERS, codec.name, toy_codec.second_decoder)
    assert case.codec.is_plain or case.codec.name in DECODERS
