"""The seam of a stored format.

A logical weight is stored as *parts*: its values, which are streamed through the buffers, and maybe small parts such as
scales, of which a codec asks for the rows that it needs. A merge decodes a tile of the weight with the source's codec,
changes it, and encodes it with the output's. Re-typing, quantising and dequantising are that and nothing else.

A codec has no state and does no I/O. A file of codecs imports torch only for types, as plans are made without it; what
computes imports it when it is called. To add a format: one file with its codecs, a line in `registry`, a row in
``tests/contracts/test_codec.py``, and a second decoder for ``verify`` (`shardmerge.verification.decoders`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from shardmerge.spec.light import light_dataclass
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import Encoding, RowRange, TensorRef, Weight

if TYPE_CHECKING:
    from torch import Tensor


@light_dataclass(frozen=True, slots=True)
class Output:
    """A tensor that writing a weight makes. ``role`` names the part; the first of them are the values."""

    role: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class CodecMemory:
    """Bytes that encoding a weight takes beside the buffers."""

    #: Of one element in each half of the workspace; see `TileSlot.halves`.
    element: int = 0
    #: What a thread allocates in between.
    between: int = 0


#: Rows of a small part, by its role, as stored.
ReadPart = Callable[[str, RowRange], "Tensor"]


class TileSlot(Protocol):
    """A tile's surroundings, as a codec sees them."""

    @property
    def tensor(self) -> TensorPlan:
        """The weight."""

    @property
    def rows(self) -> RowRange:
        """The tile's rows, as the source counts them."""

    @property
    def is_checked(self) -> bool:
        """Whether the tile's values may stay, whatever they are; see `Codec.encode`."""

    def halves(self) -> tuple[Tensor, Tensor]:
        """Two pieces of memory (uint8), each of `CodecMemory.element` bytes an element; the tile begins the first."""

    def part(self, role: str, rows: RowRange) -> Tensor:
        """Rows of a small part of the source, as stored, on the tile's device."""

    def made(self, role: str) -> Tensor:
        """A small part of the output, whole, on the CPU: `Codec.encode` fills in what belongs to its rows.

        It begins as zeros, and is written when all tiles of the weight are encoded.
        """


class Codec(ABC):
    """One stored format. Tensors of a weight are matrices here: (rows, elements of a row)."""

    #: What plans call it. A weight that is stored plainly has the codec of its dtype's name.
    name: str
    #: The dtype that holds every decoded value exactly.
    values: str = "F32"
    #: Whether an infinity can be stored.
    holds_infinity: ClassVar[bool] = False
    #: Whether it encodes on the compute device; if not, the tile is brought to the CPU first.
    on_device: ClassVar[bool] = False
    #: Of a format that bases are quantised in: what it is, for a table, and the ``quant_method`` of such bases.
    title: ClassVar[str] = ""
    methods: ClassVar[tuple[str, ...]] = ()
    #: Whether the numbers themselves are stored, in a dtype of torch: one can look at them without decoding.
    is_plain: ClassVar[bool] = False

    # --- planning: no torch -------------------------------------------------------------------------------------------

    def claims(self, tensors: Mapping[str, TensorRef], config: Mapping[str, Any]) -> Iterator[Weight | str]:
        """The weights of a checkpoint that are stored so: by the config and by the tensors, never by a name alone.

        A weight's first part are the values, with the weight's own name and shape, and `Weight.encoding` is set. Rows
        of the values are as many bytes each. A string is a reason to refuse the checkpoint.
        """
        return iter(())

    @abstractmethod
    def outputs(self, name: str, shape: tuple[int, ...], encoding: Encoding) -> tuple[Output, ...]:
        """The tensors that writing a weight makes, in the order in which they are laid out: the values, then the rest.

        The parts that are not listed stay as they are in the source if its codec is the same one, and go if not.
        """

    def row_unit(self, encoding: Encoding) -> int:
        """How many rows belong together: a tile holds whole units, counted from the tensor's first row."""
        return 1

    def stochastic(self, encoding: Encoding, seed: int) -> Encoding | None:
        """The same encoding with stochastic rounding; None if the codec cannot do it."""
        return None

    def keeps(self, tensor: TensorPlan) -> bool:
        """Whether the bytes of a weight without an update are the output's."""
        return tensor.encoding == tensor.decoding

    def rounds_to(self, tensor: TensorPlan) -> str:
        """The dtype that updated values are rounded to, before anything else is done with them."""
        return tensor.out.dtype

    def has_prepass(self, encoding: Encoding) -> bool:
        """Whether `prepass` must see every tile before the first is encoded."""
        return False

    @abstractmethod
    def largest(self, tensor: TensorPlan) -> float:
        """The bound that the magnitudes of all values must stay below."""

    def too_large(self, tensor: TensorPlan, value: float) -> tuple[str, str]:
        """What cannot hold a finite ``value``, and what can: a name and a sentence."""
        return self.name, "Another output.dtype may hold it"

    def memory(self, tensor: TensorPlan, tile_dtype: str) -> CodecMemory:
        """What encoding a weight takes, of which tiles are kept in ``tile_dtype``."""
        return CodecMemory()

    # --- computing ----------------------------------------------------------------------------------------------------

    def decode(self, slot: TileSlot, stored: Tensor, tile: Tensor) -> None:
        """Fill ``tile`` (float32 or float64) with the values of rows as ``stored``: (rows, elements of their dtype)."""
        raise NotImplementedError(f"{self.name} is an output format only")

    def prepass(self, slot: TileSlot, tile: Tensor) -> None:
        """See a tile as `encode` will be given it; in order, and by one thread."""
        raise NotImplementedError

    @abstractmethod
    def encode(self, slot: TileSlot, tile: Tensor, target: Tensor) -> bool:
        """Round ``tile`` once into ``target`` (rows, elements of the output's dtype).

        The bytes do not depend on how rows are cut into tiles. False, with the tile as it was: there may be a value
        that cannot be stored. If it turns out that all may stay, this is called again, with `TileSlot.is_checked`.
        """

    @abstractmethod
    def rounding_bound(self, encoding: Encoding, values: Tensor, rows: RowRange, part: ReadPart) -> Tensor:
        """The most that encoding may change each of ``values``, from the definition.

        These are exact (float64), of rows ``rows``, which are whole units. ``part`` reads rows of a small part of the
        output: a scale that is not of these rows alone.
        """
