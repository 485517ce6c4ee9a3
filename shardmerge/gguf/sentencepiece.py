"""Reads the pieces of a tokenizer.model, which is a protobuf message.

    ModelProto:     1: repeated SentencePiece
    SentencePiece:  1: string piece   2: float score   3: enum type, NORMAL (1) if it is missing

Source: sentencepiece_model.proto, and the wire format of protocol buffers.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True, slots=True)
class Piece:
    text: bytes
    score: float
    kind: int


def read_pieces(content: bytes) -> list[Piece]:
    """Every piece, by id. ``ValueError`` if this is not a SentencePiece model."""
    pieces = [_piece(value) for number, value in _fields(content) if number == 1 and isinstance(value, bytes)]
    if not pieces:
        raise ValueError("it has no pieces")
    return pieces


def _piece(message: bytes) -> Piece:
    text, score, kind = b"", 0.0, NORMAL
    for number, value in _fields(message):
        if number == 1 and isinstance(value, bytes):
            text = value
        elif number == 2 and isinstance(value, bytes) and len(value) == 4:
            score = float(struct.unpack("<f", value)[0])
        elif number == 3 and isinstance(value, int):
            kind = value
    text.decode()  # pieces are text
    return Piece(text, score, kind)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Fields of a message by number: integers as int, all others as bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire == _BYTES:
            length, at = _varint(message, at)
        elif wire in (_FIXED64, _FIXED32):
            length = 8 if wire == _FIXED64 else 4
        else:
            raise ValueError(f"it is not a protobuf message: wire type {wire}")
        if at + length > len(message):
            raise ValueError("it ends within a field")
        yield number, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError("it ends within a number")
