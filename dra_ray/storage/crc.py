"""CRC-32 of a whole from those of its parts, as zlib's crc32_combine has it: so that what was read
in parts, in any order and by anybody, is held against the one checksum that an archive has of it.
"""

from __future__ import annotations

import numpy as np

POLYNOMIAL = 0xEDB88320  # of zip, gzip and png, bits reversed


def combined(crcs: np.ndarray, lengths: np.ndarray) -> int:
    """CRC-32 of parts one after another, from theirs uint32 [n] and their lengths int64 [n] in
    bytes.

    A part's CRC is carried over the zeros that as many bytes as follow it would be, and all are
    added (Adler, zlib, crc32_combine): a linear map of GF(2), applied to all parts at once for
    every power of two of these bytes.
    """
    carried = np.asarray(crcs, np.uint32).copy()
    after = np.asarray(lengths, np.int64)[::-1].cumsum()[::-1] - lengths
    zeros = _one_byte()
    for bit in range(int(after.max(initial=0)).bit_length()):
        chosen = (after >> bit) & 1 == 1
        carried[chosen] = _applied(zeros, carried[chosen])
        zeros = _applied(zeros, zeros)
    return int(np.bitwise_xor.reduce(carried, initial=0))


def _one_byte() -> np.ndarray:
    """What a zero byte makes of each of the 32 bits of a CRC, uint32 [32]."""
    bits = [POLYNOMIAL, *(1 << bit for bit in range(31))]  # of one zero bit
    once = np.array(bits, np.uint32)
    for _ in range(3):
        once = _applied(once, once)
    return once


def _applied(matrix: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """The columns `matrix` uint32 [32] times each of `vectors` uint32 [n], over GF(2)."""
    result = np.zeros_like(vectors)
    for bit in range(32):
        result ^= matrix[bit] * ((vectors >> np.uint32(bit)) & np.uint32(1))
    return result
