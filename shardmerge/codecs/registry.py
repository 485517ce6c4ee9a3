"""The codecs by name, as plans name them."""

from __future__ import annotations

from shardmerge.codecs.bitsandbytes import BITSANDBYTES_INT8
from shardmerge.codecs.bitsandbytes_4bit import BITSANDBYTES_4BIT
from shardmerge.codecs.codec import Codec
from shardmerge.codecs.floats import FLOATS
from shardmerge.codecs.fp4 import FP4
from shardmerge.codecs.fp8 import FP8
from shardmerge.codecs.ggml import GGML
from shardmerge.codecs.integers import PLAIN_INTEGERS
from shardmerge.codecs.mlx import MLX_AFFINE
from shardmerge.codecs.packed_integers import PACKED_INTEGERS
from shardmerge.spec.plans import TensorPlan

_QUANTISED: tuple[Codec, ...] = (
    BITSANDBYTES_4BIT,
    BITSANDBYTES_INT8,
    FP4,
    MLX_AFFINE,
    PACKED_INTEGERS,
    PLAIN_INTEGERS,
)
CODECS: dict[str, Codec] = {codec.name: codec for codec in (*FLOATS, *GGML, *FP8, *_QUANTISED)}


def decoder(tensor: TensorPlan) -> Codec:
    """The codec that the source is stored by."""
    return CODECS[tensor.decoding.codec if tensor.decoding else tensor.source.dtype]


def encoder(tensor: TensorPlan) -> Codec:
    """The codec that the output is stored by."""
    return CODECS[tensor.encoding.codec if tensor.encoding else tensor.out.dtype]
