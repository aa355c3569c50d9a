"""The engine's translator, by itself: what it makes of a piece of code as one block, without executing it.

`Translator(bits).block(code)` tells how many instructions and bytes the block has, and how many temporaries its translation
needed. They are counted in the translator's own structure, which is found once by what it must hold.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct

from unicorn import unicorn_const as uc

from kvmapi.model.cpu import layout
from kvmapi.model.cpu.native import Native, TlbEntry, TlbFill

_BASE, _SLOT, _SLOTS = 1 << 20, 8192, 256
_READ_WRITE = 3
_COUNTS = 40  # of the translator's structure: labels, globals, temporaries, ...
_ENGINE_BYTES = 4096


class _Block(ctypes.Structure):
    _fields_ = [("pc", ctypes.c_uint64), ("instructions", ctypes.c_uint16), ("size", ctypes.c_uint16)]


class Translator:
    """For code of one width, in protected mode at CPL 0."""

    def __init__(self, bits: int) -> None:
        self.native = Native()
        self._memory = mmap.mmap(-1, _BASE + _SLOT * (_SLOTS + 1))
        self.native.map(0, len(self._memory), ctypes.addressof(ctypes.c_char.from_buffer(self._memory)))
        self.native.hook_tlb_fill(TlbFill(self._fill))
        (flags,) = struct.unpack_from("<I", self.native.state, layout.HFLAGS)
        flags &= ~(layout.HF_CS32 | layout.HF_SS32 | layout.HF_CS64 | layout.HF_LMA)
        flags |= layout.HF_PE | layout.HF_OSFXSR | (layout.HF_CS32 | layout.HF_SS32 if bits != 16 else 0)
        flags |= layout.HF_CS64 | layout.HF_LMA if bits == 64 else 0
        struct.pack_into("<I", self.native.state, layout.HFLAGS, flags)
        self._block = _Block()
        self._next = 0
        self._translate(b"\xeb\xfe")
        self._counts = (ctypes.c_int * 5).from_address(self._find() + _COUNTS)

    def block(self, code: bytes) -> tuple[int, int, int]:
        """Instructions, bytes and temporaries of the block that `code` begins with; it must end in it."""
        self._translate(code)
        return self._block.instructions, self._block.size, self._counts[2]

    def close(self) -> None:
        """Free the engine."""
        self.native.close()

    @staticmethod
    def _fill(_uc: int, address: int, _kind: int, entry: int, _data: int) -> bool:
        slot = TlbEntry.from_address(entry)
        slot.paddr, slot.perms = address & -mmap.PAGESIZE, uc.UC_PROT_ALL
        return True

    def _translate(self, code: bytes) -> None:
        at = _BASE + self._next % _SLOTS * _SLOT
        self._next += 1
        if self._next % _SLOTS == 0:
            self.native.flush_code()
        self._memory[at : at + len(code)] = code
        # A command that reads and writes; `control` itself only writes.
        error = self.native.control(uc.UC_CTL_TB_REQUEST_CACHE | uc.UC_CTL_IO_READ << 30, ctypes.c_uint64(at), ctypes.byref(self._block))
        assert error == 0

    def _find(self) -> int:
        engine = ctypes.string_at(self.native.handle, _ENGINE_BYTES)
        fd = os.open("/proc/self/mem", os.O_RDONLY)
        try:
            for (pointer,) in struct.iter_unpack("<Q", engine):
                try:
                    labels, kept, used, _, operations = struct.unpack("<5i", os.pread(fd, 20, pointer + _COUNTS))
                except (OSError, OverflowError, struct.error):
                    continue
                if 0 <= labels < 100 and 10 < kept < 100 and kept < used < 512 and 0 < operations < 10_000:
                    return int(pointer)
        finally:
            os.close(fd)
        raise AssertionError("the engine hides its translator")
