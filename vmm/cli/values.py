"""How values are written on the command line and shown to people: sizes in bytes with K, M, G; numbers in hex; time in seconds.

Each parser raises `argparse.ArgumentTypeError` with a sentence that shows a right example.
"""

from __future__ import annotations

import argparse
import math
import re

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_SIZE = re.compile(r"(0[xX][0-9a-fA-F]+|[0-9]+)([KMGT]?)(?:i?B)?", re.IGNORECASE)
_HEX = re.compile(r"(?:0[xX])?[0-9a-fA-F]+")
_LARGEST_SIZE = 1 << 52


def size(text: str) -> int:
    """Bytes: `64M`, `1G`, `512KiB`, `65536`, `0x10000`.

    >>> size("64M")
    67108864
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or not text.isascii():
        raise argparse.ArgumentTypeError(f"{text!r} is not a size (write it as 64M, 1G or 65536)")
    value = int(found[1], 0 if found[1][:2].lower() == "0x" else 10) << _UNITS[found[2].upper()]
    if not 0 < value <= _LARGEST_SIZE:
        raise argparse.ArgumentTypeError(f"{text!r} is out of range (1 byte to 2^52 bytes)")
    return value


def policy(text: str) -> int:
    """A 32-bit SEV policy in hex, with or without 0x."""
    if not _HEX.fullmatch(text) or int(text, 16) >> 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a 32-bit policy in hex (for example 0x3: no debugging, no key sharing)")
    return int(text, 16)


def vcpus(text: str) -> int:
    """A number of vCPUs, 1 to 64 (docs/seams.md, section 4)."""
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= 64:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of vCPUs (1 to 64)")
    return int(text)


def jobs(text: str) -> int:
    """A number of processes; 0 stands for none but this one."""
    if not (text.isascii() and text.isdigit()) or int(text) > 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes (1 to 1024; 0: in this one)")
    return int(text)


def timeout(text: str) -> float | None:
    """Seconds; 0 stands for no limit and becomes None."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time in seconds (for example 10 or 0.5; 0: no limit)")
    return value or None


def arguments(text: str) -> str:
    """The guest's argument string: at most 1023 bytes and no NUL (docs/seams.md, boot info)."""
    encoded = text.encode(errors="surrogateescape")
    if len(encoded) > 1023 or b"\0" in encoded:
        raise argparse.ArgumentTypeError(f"{len(encoded)} bytes are too many (at most 1023, no NUL)")
    return text


def show_size(count: int) -> str:
    """Bytes for people: the largest of GiB, MiB, KiB that divides it, else one decimal.

    >>> show_size(0x400000), show_size(4096), show_size(100)
    ('4 MiB', '4 KiB', '100 B')
    """
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << shift and count & ((1 << shift) - 1) == 0:
            return f"{count >> shift} {unit}"
    for unit, shift in (("GiB", 30), ("MiB", 20)):
        if count >= 10 << shift and count & 0xFFFFF:
            return f"{count / (1 << shift):.1f} {unit}"
    return f"{count / 1024:.1f} KiB" if count >= 10240 else f"{count} B"
