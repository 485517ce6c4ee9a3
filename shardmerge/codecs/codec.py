"""The seam of a stored format.

A weight is stored as *parts*: its values, which are streamed through the buffers, and maybe small parts such as
scales, of which a codec reads the rows that it needs. A merge decodes a tile with the source's codec, updates it, and
encodes it with the output's; so it changes dtypes, quantises and dequantises.

A codec has no state and does no I/O. Its module imports torch only for types, as plans are made without it; functions
that compute import it when they are called. To add a format: one file with its codecs, a line in `registry`, a row in
``tests/contracts/test_codec.py``, and a second decoder for ``verify`` (`shardmerge.verification.decoders`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from shardmerge.spec.light import light_dataclass
from shardmerge.spec.plans import TensorPlan
from shardmerge.spec.tensors import Encoding, RowRange, TensorRef, Weight

if TYPE_CHECKING:
    from torch import Tensor


@light_dataclass(frozen=True, slots=True)
class Output:
    """A tensor of the output that a weight becomes. ``role`` names the part; the values come first."""

    role: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class CodecMemory:
    """Memory to encode a weight, beside the buffers, in bytes."""

    #: For an element, in each half of the workspace; see `TileSlot.halves`.
    element: int = 0
    #: Allocated by a thread while it encodes a tile.
    between: int = 0


class StoredTensors(dict[str, TensorRef]):
    """The tensors of a checkpoint by name, and the contents of small ones that hold settings."""

    def __init__(
        self,
        tensors: Mapping[str, TensorRef],
        read: Callable[[Sequence[TensorRef]], Mapping[str, bytes]] = lambda refs: {},
        metadata: Sequence[Sequence[tuple[str, str]]] = (),
    ) -> None:
        super().__init__(tensors)
        #: Reads the bytes of tensors, by name. A caller asks for all at once, as each may be a request to a server.
        self.contents = read
        #: The metadata of each file.
        self.metadata = metadata


#: Reads rows of a small part, by its role, as stored.
ReadPart = Callable[[str, RowRange], "Tensor"]


class TileSlot(Protocol):
    """What a codec may ask about a tile."""

    @property
    def tensor(self) -> TensorPlan:
        """The weight."""

    @property
    def rows(self) -> RowRange:
        """The tile's rows, as the source counts them."""

    @property
    def is_checked(self) -> bool:
        """Whether all values may stay as they are; see `Codec.encode`."""

    def halves(self) -> tuple[Tensor, Tensor]:
        """Two pieces of memory (uint8), each of `CodecMemory.element` bytes an element; the tile begins the first."""

    def part(self, role: str, rows: RowRange) -> Tensor:
        """Rows of a small part of the source, as stored, on the tile's device."""

    def made(self, role: str) -> Tensor:
        """A small part of the output, whole, on the CPU, with zeros until `Codec.encode` fills in its rows."""


class Codec(ABC):
    """One stored format. Tensors are matrices here: (rows, elements of a row)."""

    #: Its name in plans. A weight that is stored plainly has the codec with the name of its dtype.
    name: str
    #: The dtype that holds every decoded value exactly.
    values: str = "F32"
    #: Whether an infinity can be stored.
    holds_infinity: ClassVar[bool] = False
    #: Whether it encodes on the compute device; if not, the tile is copied to the CPU first.
    on_device: ClassVar[bool] = False
    #: Of a format that bases are quantised in: what it is, for a table, and the ``quant_method`` of such bases.
    title: ClassVar[str] = ""
    methods: ClassVar[tuple[str, ...]] = ()
    #: Whether values are stored as numbers of a torch dtype.
    is_plain: ClassVar[bool] = False

    # --- planning: no torch -------------------------------------------------------------------------------------------

    def claims(self, tensors: StoredTensors, config: Mapping[str, Any]) -> Iterator[Weight | str]:
        """The weights of a checkpoint in this format, by the config and the tensors, never by a name alone.

        A weight's first part is its values, with the weight's name and shape, and `Weight.stored_as` is set. All rows
        of the values have the same size. A string is a reason to refuse the checkpoint.
        """
        return iter(())

    @abstractmethod
    def outputs(self, name: str, shape: tuple[int, ...], encoding: Encoding) -> tuple[Output, ...]:
        """The tensors that a weight becomes, in the order of their data: the values, then the rest.

        Parts that are not listed stay as in the source if that has the same codec, and are left out if not.
        """

    def row_unit(self, encoding: Encoding) -> int:
        """How many rows are stored together; a tile holds whole units, counted from the tensor's first row."""
        return 1

    def stochastic(self, encoding: Encoding, seed: int) -> Encoding | None:
        """The same encoding with stochastic rounding; None if there is none."""
        return None

    def keeps(self, tensor: TensorPlan) -> bool:
        """Whether a weight without an update is copied as bytes."""
        return tensor.encoding == tensor.decoding

    def rounds_to(self, tensor: TensorPlan) -> str:
        """The dtype that updated values are rounded to first."""
        return tensor.out.dtype

    def has_prepass(self, encoding: Encoding) -> bool:
        """Whether `prepass` must see every tile before the first is encoded."""
        return False

    @abstractmethod
    def largest(self, tensor: TensorPlan) -> float:
        """The bound below which the magnitudes of all values must be."""

    def too_large(self, tensor: TensorPlan, value: float) -> tuple[str, str]:
        """The name of what cannot hold a finite ``value``, and a sentence on what can."""
        return self.name, "Another output.dtype may hold it"

    def memory(self, tensor: TensorPlan, tile_dtype: str) -> CodecMemory:
        """Memory to encode a weight whose tiles are in ``tile_dtype``."""
        return CodecMemory()

    # --- computing ----------------------------------------------------------------------------------------------------

    def decode(self, slot: TileSlot, stored: Tensor, tile: Tensor) -> None:
        """Fill ``tile`` (float32 or float64) with the values of rows as ``stored``: (rows, elements of their dtype)."""
        raise NotImplementedError(f"{self.name} is an output format only")

    def prepass(self, slot: TileSlot, tile: Tensor) -> None:
        """See a tile as `encode` will get it, in order and in one thread."""
        raise NotImplementedError

    @abstractmethod
    def encode(self, slot: TileSlot, tile: Tensor, target: Tensor) -> bool:
        """Round ``tile`` once into ``target`` (rows, elements of the output's dtype).

        The bytes do not depend on how rows are cut into tiles. False, with the tile unchanged: there may be a
        value that cannot be stored. If all values may stay, this is called again with `TileSlot.is_checked`.
        """

    @abstractmethod
    def rounding_bound(self, encoding: Encoding, values: Tensor, rows: RowRange, part: ReadPart) -> Tensor:
        """The most that encoding may change each of ``values``, from the definition.

        These are exact (float64), of whole units of rows. ``part`` reads rows of a small part of the output.
        """
