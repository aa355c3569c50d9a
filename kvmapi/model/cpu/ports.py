"""Port I/O by code that IOPL does not allow it, and the memory operand of string I/O.

The TSS has a bitmap of ports: code whose CPL is greater than IOPL, and all virtual-8086 code, may use the ports whose
bits are clear. Source: AMD64 Architecture Programmer's Manual, volume 2, sections 12.2.4 and 12.2.5, volume 1, section
3.8; for the limits of segments volume 2, section 4.12.
"""

from __future__ import annotations

from kvmapi.model.cpu import layout
from kvmapi.model.cpu.mmu import Fault, Mmu
from kvmapi.model.cpu.state import F_DB, F_P, RFLAGS_VM, SS, TR, Registers

_IOPL_SHIFT = 12
_BITMAP_BASE = 0x66  # the offset of the bitmap's offset in a 32- or 64-bit TSS
_SMALLEST_LIMIT = 103
_TYPE_32 = 8 << 8  # set in the type of a 32- or 64-bit TSS, clear in that of a 16-bit one
_CODE, _EXPAND_DOWN, _WRITABLE = 8 << 8, 4 << 8, 2 << 8
_STACK, _GP = 12, 13


def allowed(registers: Registers, mmu: Mmu, port: int, size: int) -> bool:
    """May the code that runs use ports [port, port+size)? Raises Fault, or as Mmu.read does, for a TSS that cannot be
    read.
    """
    flags = registers.u64[layout.EFLAGS >> 3]
    if not registers.cr(0) & 1 or (not flags & RFLAGS_VM and registers.cpl <= flags >> _IOPL_SHIFT & 3):
        return True
    tss = registers.segment(TR)
    if not tss.flags & F_P or not tss.flags & _TYPE_32 or tss.limit < _SMALLEST_LIMIT:
        return False
    at = int.from_bytes(mmu.read(tss.base + _BITMAP_BASE, 2), "little") + port // 8
    if at + 1 > tss.limit:  # two bytes are read always: an access may reach into the second
        return False
    bits = int.from_bytes(mmu.read(tss.base + at, 2), "little") >> (port & 7)
    return not bits & (1 << size) - 1


def room(registers: Registers, number: int, offset: int, size: int, mask: int, *, store: bool, backwards: bool) -> int:
    """How many elements of `size` bytes, from `offset` on, lie in a segment outside 64-bit mode. Fault when not even
    one does.
    """
    segment = registers.segment(number)
    kind = segment.flags
    refused = Fault(_STACK if number == SS else _GP, 0)
    protected = registers.cr(0) & 1 and not registers.u64[layout.EFLAGS >> 3] & RFLAGS_VM
    # Writable: data with W. Readable: data, or code with R, which is the same bit.
    wrong = not kind & F_P or (kind & _CODE and (store or not kind & _WRITABLE)) or (store and not kind & _WRITABLE)
    if protected and wrong:
        raise refused
    if kind & _EXPAND_DOWN and not kind & _CODE:
        first, last = segment.limit + 1, 0xFFFFFFFF if kind & F_DB else 0xFFFF
    else:
        first, last = 0, segment.limit
    last = min(last, mask)
    if offset < first or offset + size - 1 > last:
        raise refused
    return (offset - first) // size + 1 if backwards else (last - offset + 1) // size
