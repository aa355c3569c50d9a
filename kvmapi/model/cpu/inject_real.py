"""Delivery in real mode: through the vector table that IDTR points to, with FLAGS, CS and IP on the stack.

Source: AMD64 Architecture Programmer's Manual, volume 2, section 8.6.
"""

from __future__ import annotations

import struct

from kvmapi.model.cpu.inject_common import AC, GP, IF, RF, STACK, TF, Event
from kvmapi.model.cpu.mmu import Fault, Mmu
from kvmapi.model.cpu.state import CS, IDT, SS, Registers


def deliver(registers: Registers, mmu: Mmu, event: Event) -> None:
    """Enter the handler. Raises Fault, or as Mmu.read and Mmu.write do."""
    idt = registers.segment(IDT)
    if event.vector * 4 + 3 > idt.limit:
        raise Fault(GP, event.vector * 8 + 2)
    offset, selector = struct.unpack("<HH", mmu.read(idt.base + event.vector * 4 & 0xFFFFFFFF, 4))
    stack, pointer = registers.segment(SS), registers.gpr(4)
    if pointer & 1 and 0 < pointer & 0xFFFF < 6:  # a word would lie across the segment's end
        raise Fault(STACK, 0)
    code = registers.segment(CS)
    for word in (event.flags & 0xFFFF, code.selector, registers.rip & 0xFFFF):
        pointer = pointer & ~0xFFFF | pointer - 2 & 0xFFFF
        mmu.write(stack.base + (pointer & 0xFFFF) & 0xFFFFFFFF, struct.pack("<H", word))
    registers.set_gpr(4, pointer)
    registers.set_segment(CS, code._replace(selector=selector, base=selector << 4))
    registers.rip = offset
    registers.set_flags(event.flags & ~(IF | TF | RF | AC))
    registers.settle()
