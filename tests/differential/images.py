"""FXSAVE images to begin with, and what of an image is compared.

Not compared: the x87 opcode and addresses of the last instruction (AMD's processors store them only with an exception
pending, Intel's always), the mask of MXCSR (a constant), and the bytes that are reserved.
"""

from __future__ import annotations

import random
import struct
from typing import Any

_FLOATS = (
    0, 0x80000000, 0x3F800000, 0xBF800000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF,
    0x4F000000,
)  # fmt: skip
_DOUBLES = (
    0, 1 << 63, 0x3FF0000000000000, 0xBFF8000000000000, 0x7FF0000000000000, 0xFFF0000000000000, 0x7FF8000000000000, 0x7FF0000000000001, 1,
    0x000FFFFFFFFFFFFF, 0x0010000000000000, 0x7FEFFFFFFFFFFFFF, 0x43E0000000000000, 0x41DFFFFFFFC00000,
)  # fmt: skip
_EXTENDED = (
    (0, 0), (0x8000, 0), (0x3FFF, 1 << 63), (0xBFFF, 3 << 62), (0x7FFF, 1 << 63), (0xFFFF, 1 << 63), (0x7FFF, 3 << 62),
    (0x7FFF, 1 << 63 | 1),
    (0, 1), (0, 1 << 63), (1, 1 << 63), (0x7FFE, (1 << 64) - 1), (0x403E, 1 << 63), (0x4000, 0xC90FDAA22168C235),
)  # fmt: skip


def _xmm(rng: random.Random) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return rng.randbytes(16)
    if kind == 1:
        return struct.pack("<4I", *(rng.choice(_FLOATS) if rng.random() < 0.5 else _float(rng) for _ in range(4)))
    if kind == 2:
        return struct.pack("<2Q", *(rng.choice(_DOUBLES) if rng.random() < 0.5 else _double(rng) for _ in range(2)))
    return bytes(rng.choice((0, 0xFF, 0x80, 0x7F, rng.randrange(256))) for _ in range(16))


def _float(rng: random.Random) -> int:
    return rng.getrandbits(1) << 31 | (127 + rng.randrange(-40, 40)) << 23 | rng.getrandbits(23)


def _double(rng: random.Random) -> int:
    return rng.getrandbits(1) << 63 | (1023 + rng.randrange(-80, 80)) << 52 | rng.getrandbits(52)


def _st(rng: random.Random) -> bytes:
    if rng.random() < 0.4:
        sign, mantissa = rng.choice(_EXTENDED)
    else:
        sign, mantissa = rng.getrandbits(1) << 15 | (0x3FFF + rng.randrange(-70, 70)), rng.getrandbits(63) | 1 << 63
    return struct.pack("<QH6x", mantissa, sign)


def random_image(rng: random.Random, *, x87: bool) -> bytes:
    """XMM registers full of numbers, all exceptions masked, any rounding; x87 registers in use if `x87`."""
    control, status, tags, stack = 0x37F, 0, 0, bytes(128)
    if x87:
        control = 0x7F | rng.choice((0, 2, 3, 3, 3)) << 8 | rng.choice((0, 0, 0, 1, 2, 3)) << 10
        status = rng.randrange(8) << 11 | (rng.getrandbits(16) & 0x4700)
        tags = rng.choice((0xFF, 0xFF, 0, rng.randrange(256)))
        stack = b"".join(_st(rng) for _ in range(8))
    mxcsr = (
        0x1F80 | rng.choice((0, 0, 0, 1, 2, 3)) << 13 | rng.choice((0, 0, 0, 0x8000, 0x40, 0x8040)) | rng.choice((0, 0, rng.getrandbits(6)))
    )
    head = struct.pack("<HHBxHQQII", control, status, tags, 0, 0, 0, mxcsr, 0)
    return head + stack + b"".join(_xmm(rng) for _ in range(16)) + bytes(96)


def fields_of_image(image: bytes) -> dict[str, Any]:
    """What is compared, by name."""
    control, status, tags = struct.unpack_from("<HHB", image)
    found: dict[str, Any] = {"fcw": control, "fsw": status, "ftw": tags, "mxcsr": struct.unpack_from("<I", image, 24)[0]}
    found["st"] = b"".join(image[32 + 16 * n : 42 + 16 * n] for n in range(8))
    found["xmm"] = image[160:416]
    return found
