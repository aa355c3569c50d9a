"""fw_cfg: how firmware and test guests ask the VMM for numbers, over two ports.

A 16-bit OUT to 0x510 selects an item, byte INs from 0x511 read it from its start; beyond its end, and for an item that is not there, bytes
are 0. Numbers are little-endian. Nothing can be written, there is no DMA interface (the ID says so) and the file directory is empty.

Enough for what kvm-unit-tests asks: the number of CPUs. The layout is docs/specs/fw_cfg.rst of QEMU.
"""

from __future__ import annotations

import struct

SELECTOR, DATA = 0x510, 0x511
SIGNATURE, ID, RAM_SIZE, NOGRAPHIC, NB_CPUS, MAX_CPUS, FILE_DIR = 0x00, 0x01, 0x03, 0x04, 0x05, 0x0F, 0x19
_TRADITIONAL = 1  # ID bit 0: the port interface; bit 1, clear, would be DMA


class FwCfg:
    """The device: `items` by key."""

    def __init__(self, memory: int, vcpus: int) -> None:
        self.items: dict[int, bytes] = {
            SIGNATURE: b"QEMU",
            ID: struct.pack("<I", _TRADITIONAL),
            RAM_SIZE: struct.pack("<Q", memory),
            NOGRAPHIC: struct.pack("<H", 1),
            NB_CPUS: struct.pack("<H", vcpus),
            MAX_CPUS: struct.pack("<H", vcpus),
            FILE_DIR: struct.pack(">I", 0),
        }
        self._item = b""
        self._at = 0

    def select(self, port: int, size: int, count: int, data: memoryview, out: bool) -> None:
        """The selector; it cannot be read. An access of another width than 16 bits selects nothing."""
        if not out:
            data[:] = bytes(len(data))
            return
        self._item = self.items.get(int.from_bytes(data[-2:], "little"), b"") if size == 2 else b""
        self._at = 0

    def data(self, port: int, size: int, count: int, data: memoryview, out: bool) -> None:
        """The data port, byte by byte; a string IN takes `count` of them. Writes are ignored."""
        if out:
            return
        piece = self._item[self._at : self._at + len(data)]
        data[:] = piece.ljust(len(data), b"\0")
        self._at = min(self._at + len(data), len(self._item))
