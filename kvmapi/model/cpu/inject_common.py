"""What the delivery of exceptions has in common in all modes: the event, descriptors, and the stack it is pushed on.

An event is delivered in the mode the CPU is in: through the real-mode vector table (inject_real.py), a 16- or 32-bit
gate (inject_protected.py) or a 64-bit gate (inject_long.py). Everything that can fault is read and checked before the
first register changes, so that a fault leaves the guest where it was. Source: AMD64 Architecture Programmer's Manual,
volume 2, chapter 8; Intel's manual, volume 3, chapter 6, for the order of the checks.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from kvmapi.model.cpu.mmu import Fault, Mmu
from kvmapi.model.cpu.state import F_DB, F_DPL_SHIFT, F_G, F_P, F_S, GDT, LDT, Registers, Segment

UD, DF, TS, NP, STACK, GP, PF = 6, 8, 10, 11, 12, 13, 14
TF, IF, NT, RF, VM, AC = 1 << 8, 1 << 9, 1 << 14, 1 << 16, 1 << 17, 1 << 18
IN_IDT = 2  # IDT bit of a selector error code
NO_RF = frozenset((1, 2, 3, 4, 8, 18))  # traps, interrupts and aborts: the frame's RF is as it was
_ACCESSED, _CODE, _CONFORMING, _WRITABLE, _EXPAND_DOWN = 1 << 8, 8 << 8, 4 << 8, 2 << 8, 4 << 8


class UnsupportedDelivery(Exception):
    """A kind of gate or mode that the model lacks."""


class Event(NamedTuple):
    """What is delivered. `error` None: none is pushed. `software`: INT n, INT3 or INTO; `external`: an interrupt or
    NMI. `flags` is RFLAGS before.
    """

    vector: int
    error: int | None
    software: bool
    external: bool
    flags: int

    @property
    def ext(self) -> int:
        """The EXT bit in the error code of a fault on the way: the program did not ask for this event."""
        return 0 if self.software else 1

    def at_gate(self) -> int:
        """The error code of a fault that the gate is guilty of."""
        return self.vector * 8 + IN_IDT + self.ext

    def pushed_flags(self) -> int:
        """RFLAGS in the frame: with RF for a fault, so that a breakpoint on the instruction does not strike twice."""
        return self.flags | RF if not self.software and not self.external and self.vector not in NO_RF else self.flags


class Descriptor(NamedTuple):
    """One descriptor as it stands in the GDT or LDT."""

    at: int  # linear address
    low: int
    high: int

    @property
    def dpl(self) -> int:
        return self.high >> F_DPL_SHIFT & 3

    @property
    def present(self) -> bool:
        return bool(self.high & F_P)

    @property
    def is_code(self) -> bool:
        return self.high & (F_S | _CODE) == F_S | _CODE

    @property
    def conforming(self) -> bool:
        return bool(self.high & _CONFORMING)

    @property
    def is_stack(self) -> bool:
        """A writable data segment."""
        return self.high & (F_S | _CODE | _WRITABLE) == F_S | _WRITABLE

    @property
    def limit(self) -> int:
        limit = self.low & 0xFFFF | self.high & 0xF0000
        return limit << 12 | 0xFFF if self.high & F_G else limit

    @property
    def base(self) -> int:
        return self.low >> 16 | (self.high & 0xFF) << 16 | self.high & 0xFF000000

    def segment(self, selector: int) -> Segment:
        return Segment(selector, self.base, self.limit, self.high & 0xF0FF00)

    def loaded(self, mmu: Mmu, selector: int) -> Segment:
        """The segment register after this descriptor was loaded; the table remembers that it was accessed."""
        if not self.high & _ACCESSED:
            mmu.write(self.at + 5, bytes((self.high >> 8 & 0xFF | 1,)))
        return Segment(selector, self.base, self.limit, self.high & 0xF0FF00 | _ACCESSED)


def descriptor(registers: Registers, mmu: Mmu, selector: int, vector: int, error: int) -> Descriptor:
    """The descriptor that a selector names; Fault(vector, error) when its table ends before."""
    table = registers.segment(LDT if selector & 4 else GDT)
    if selector | 7 > table.limit or (selector & 4 and not table.selector & 0xFFFC):
        raise Fault(vector, error)
    at = table.base + (selector & 0xFFF8)
    if not registers.efer >> 10 & 1:
        at &= 0xFFFFFFFF
    low, high = struct.unpack("<II", mmu.read(at, 8))
    return Descriptor(at, low, high)


class Stack:
    """Pushes words below a stack pointer, collected first and stored at once by `store`. `size` is the operand's, in
    bytes; `sp` wraps in 16 bits where the segment is small.
    """

    def __init__(self, segment: Segment, sp: int, size: int, error: int) -> None:
        self.segment, self.size, self.error = segment, size, error
        self.big = bool(segment.flags & F_DB)
        self.mask = 0xFFFFFFFF if self.big else 0xFFFF
        self.sp = sp & self.mask
        self._words: list[tuple[int, int]] = []

    def push(self, value: int) -> None:
        """One word. Raises #SS when it lies outside the segment."""
        self.sp = self.sp - self.size & self.mask
        last = self.sp + self.size - 1
        segment = self.segment
        if segment.flags & _EXPAND_DOWN and not segment.flags & _CODE:
            inside = self.sp > segment.limit and last <= self.mask
        else:
            inside = last <= segment.limit
        if not inside or last > self.mask:
            raise Fault(STACK, self.error)
        self._words.append((self.segment.base + self.sp & 0xFFFFFFFF, value & (1 << 8 * self.size) - 1))

    def store(self, mmu: Mmu, user: bool = False) -> None:
        """Write what was pushed. Raises as `Mmu.write` does."""
        for at, value in self._words:
            mmu.write(at, value.to_bytes(self.size, "little"), user)

    def pointer(self, old: int) -> int:
        """ESP afterwards: the upper half of `old` stays where the segment is small."""
        return self.sp if self.big else old & 0xFFFF0000 | self.sp
