"""What kvm-unit-tests expect beside a PC: memory reachable by MMIO alone, a port that remembers, interrupt lines by hand.

    MMIO [0xFF000000, 0xFF010000)   64 KiB that keep what is written: every access is an exit
    ports 0xE0..0xE3                one word of 32 bits that an OUT of any width begins to overwrite and an IN reads back
    ports 0x2000..0x2017            OUT of 0 or 1 lowers or raises that GSI of the host's interrupt controllers

(The exit port 0xF4 belongs to every machine.) Where the host has no interrupt controllers, lines lead nowhere.
"""

from __future__ import annotations

from collections.abc import Callable

MEMORY, MEMORY_SIZE = 0xFF000000, 0x10000
WORD_PORT, WORD_PORTS = 0xE0, 4
LINE_PORT, LINES = 0x2000, 24


class TestMemory:
    """The memory behind MMIO; it is allocated when it is first written. Accesses elsewhere are the caller's business."""

    __test__ = False  # for pytest: no test class

    def __init__(self) -> None:
        self._bytes = bytearray()

    def holds(self, gpa: int, length: int) -> bool:
        """Whether `[gpa, gpa + length)` is inside."""
        return gpa >= MEMORY and gpa + length <= MEMORY + MEMORY_SIZE

    def read(self, gpa: int, length: int) -> bytes:
        """`length` bytes at `gpa`; zeroes before anything was written."""
        at = gpa - MEMORY
        return bytes(self._bytes[at : at + length]).ljust(length, b"\0")

    def write(self, gpa: int, data: bytes) -> None:
        """Keep `data`."""
        if not self._bytes:
            self._bytes = bytearray(MEMORY_SIZE)
        at = gpa - MEMORY
        self._bytes[at : at + len(data)] = data


class TestPorts:
    """The remembering word, and the interrupt lines; `line(gsi, level)` reaches the controllers, None where there are none."""

    __test__ = False

    def __init__(self, line: Callable[[int, int], object] | None = None) -> None:
        self._line = line
        self._word = bytearray(WORD_PORTS)

    def word(self, port: int, size: int, count: int, data: memoryview, out: bool) -> None:
        """The word at 0xE0; of a string OUT the last item stays, a string IN repeats it. What hangs over the end is lost, or all ones."""
        at = port - WORD_PORT
        room = min(size, WORD_PORTS - at)
        if out:
            self._word[at : at + room] = data[len(data) - size : len(data) - size + room]
        else:
            data[:] = (bytes(self._word[at : at + room]).ljust(size, b"\xff") * count)[: len(data)]

    def line(self, port: int, size: int, count: int, data: memoryview, out: bool) -> None:
        """One interrupt line; nothing can be read."""
        if not out:
            data[:] = bytes(len(data))
        elif self._line is not None:
            self._line(port - LINE_PORT, int(data[-size] != 0))
