"""The frame of a record in TensorBoard's files: its length and its bytes, each with a masked CRC-32C.

tensorboard's own writer computes the checksum a byte at a time in Python: most of what writing a step would cost.
"""

from __future__ import annotations

import struct
from functools import cache

import numpy as np

POLYNOMIAL = 0x82F63B78  # CRC-32C, bits reversed
MASK = 0xA282EAD8


def framed(content: bytes) -> bytes:
    """The record as it stands in a file."""
    length = struct.pack("<Q", len(content))
    return length + struct.pack("<I", masked_crc(length)) + content + struct.pack("<I", masked_crc(content))


def masked_crc(content: bytes) -> int:
    crc = crc32c(content)
    return ((crc >> 15 | crc << 17) + MASK) & 0xFFFFFFFF


def crc32c(content: bytes) -> int:
    """Of four bytes or more. It is linear over XOR: each byte adds what it alone, with zeros behind it, would give."""
    read = np.frombuffer(content, np.uint8).copy()
    read[:4] ^= 0xFF  # the same as beginning with all bits set
    behind = np.arange(len(read) - 1, -1, -1)
    return int(np.bitwise_xor.reduce(_tables(len(read))[behind, read])) ^ 0xFFFFFFFF


def _tables(length: int) -> np.ndarray:
    """uint32 [zeros behind the byte, byte], for as many as a record needs, rounded up."""
    return _tables_of(1 << (length - 1).bit_length())


@cache
def _tables_of(length: int) -> np.ndarray:
    rows = [_of_bytes()]
    while len(rows) < length:
        rows.append(rows[0][rows[-1] & 0xFF] ^ (rows[-1] >> 8))
    return np.stack(rows)


def _of_bytes() -> np.ndarray:
    row = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        row = np.where(row & 1, row >> 1 ^ POLYNOMIAL, row >> 1).astype(np.uint32)
    return row
