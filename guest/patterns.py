"""The bytes that `convert` and `private-memory` write, computed as guest/lib/patterns.c does.

A test that looks for a leak searches host memory for `private_marker()`: the guest derives these bytes at run time, its
image does not contain them. Offsets are bytes from the start of the test area, multiples of 8.
"""

from __future__ import annotations

import struct

MASK = (1 << 64) - 1
SEED_PRIVATE = 0x7365766D6D2D5021
SEED_SHARED = 0x7365766D6D2D5321
SEED_CONVERTED = 0x7365766D6D2D5121

# private-memory announces these at the stage port (guest/programs/private_memory.c).
STAGE_SHARED, STAGE_PRIVATE, STAGE_HALF_SHARED, STAGE_ALL_PRIVATE = 1, 2, 3, 4
PRIVATE_PAGES = 16


def pattern_private(offset: int, size: int = 8) -> bytes:
    """What private pages hold at [offset, offset + size).

    >>> pattern_private(0, 16) == private_marker()
    True
    """
    return _pattern(SEED_PRIVATE, offset, size)


def pattern_shared(offset: int, size: int = 8) -> bytes:
    """What pages hold before their first conversion."""
    return _pattern(SEED_SHARED, offset, size)


def pattern_converted(offset: int, size: int = 8) -> bytes:
    """What pages hold that were converted back to shared."""
    return _pattern(SEED_CONVERTED, offset, size)


def private_marker() -> bytes:
    """The first 16 bytes of the private pattern: to be found in host memory only if private memory leaks."""
    return pattern_private(0, 16)


def _pattern(seed: int, offset: int, size: int) -> bytes:
    if offset % 8 or size % 8:
        raise ValueError(f"offset {offset:#x} and size {size:#x} must be multiples of 8")
    return struct.pack(f"<{size // 8}Q", *(_word(seed, index) for index in range(offset // 8, (offset + size) // 8)))


def _word(seed: int, index: int) -> int:
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)
