"""Values of a SEV launch on the command line: C-bit, boot info features, nonce, firmware version.

Each parser raises `argparse.ArgumentTypeError` with a sentence that shows a right example.
"""

from __future__ import annotations

import argparse
import re

_API = re.compile(r"([0-9]{1,3})\.([0-9]{1,3})")
_HEX = re.compile(r"(?:0[xX])?([0-9a-fA-F]{1,16})")


def c_bit(text: str) -> int:
    """The position of the C-bit in a page-table entry: above all memory, within an address."""
    if not (text.isascii() and text.isdigit()) or not 36 <= int(text) <= 51:
        raise argparse.ArgumentTypeError(f"{text!r} is no C-bit (36 to 51; CPUID 0x8000001F EBX bits 5:0 of the host)")
    return int(text)


def features(text: str) -> int:
    """The features of the boot info, 64 bits in hex."""
    found = _HEX.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a set of features in hex (for example 0xb; docs/seams.md, boot info)")
    return int(found[1], 16)


def nonce(text: str) -> bytes:
    """16 bytes in hex."""
    if not re.fullmatch("[0-9a-fA-F]{32}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a nonce: 32 hex digits, as LAUNCH_MEASURE returned them")
    return bytes.fromhex(text)


def api(text: str) -> tuple[int, int]:
    """The firmware's API version: major and minor.

    >>> api("0.24")
    (0, 24)
    """
    found = _API.fullmatch(text)
    if found is None or not text.isascii() or max(int(found[1]), int(found[2])) > 255:
        raise argparse.ArgumentTypeError(f"{text!r} is not an API version (for example 0.24)")
    return int(found[1]), int(found[2])


def build(text: str) -> int:
    """The firmware's build number."""
    if not (text.isascii() and text.isdigit()) or int(text) > 255:
        raise argparse.ArgumentTypeError(f"{text!r} is not a firmware build (0 to 255)")
    return int(text)
