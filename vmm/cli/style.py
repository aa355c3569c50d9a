"""Colours and width of text output: on a terminal only, and not there either when NO_COLOR is set (https://no-color.org).

Written by hand because importing rich costs more time than a whole guest: `run` uses this, tables elsewhere may use rich.
"""

from __future__ import annotations

import os
from typing import TextIO

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}


class Style:
    """Paints text for one stream, or leaves it alone."""

    def __init__(self, stream: TextIO) -> None:
        self.terminal = is_terminal(stream)
        self.colours = self.terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def paint(self, text: str, colour: str) -> str:
        """`text` in `colour` (bold, dim, red, green, yellow, cyan), or unchanged where colours do not belong."""
        return f"\x1b[{_CODES[colour]}m{text}\x1b[0m" if self.colours else text


def is_terminal(stream: TextIO) -> bool:
    """False for closed streams and replaced ones too."""
    try:
        return stream.isatty()
    except (ValueError, AttributeError):
        return False


def visible(data: bytes) -> bytes:
    """Guest output made safe for a terminal: control characters but tab, newline and return appear as \\xNN, so a guest cannot steer it."""
    if all(byte >= 0x20 or byte in b"\t\n\r" for byte in data) and b"\x7f" not in data:
        return data
    return b"".join(bytes([b]) if b in b"\t\n\r" or (b >= 0x20 and b != 0x7F) else b"\\x%02x" % b for b in data)
