"""Delivery in long mode, from 64-bit and from compatibility code: 64-bit gates, the IST, and the TSS's stacks.

Source: AMD64 Architecture Programmer's Manual, volume 2, section 8.9.
"""

from __future__ import annotations

import struct

from kvmapi.model.cpu.inject_common import GP, IF, NP, NT, RF, STACK, TF, TS, VM, Descriptor, Event, descriptor
from kvmapi.model.cpu.mmu import Fault, Mmu
from kvmapi.model.cpu.state import CS, F_DB, F_DPL_SHIFT, F_L, F_P, F_S, IDT, SS, TR, Registers, Segment

_U64 = 0xFFFFFFFFFFFFFFFF
_INTERRUPT, _TRAP = 0x0E, 0x0F
_IST1, _RSP0 = 0x24, 4  # offsets in the TSS


def deliver(registers: Registers, mmu: Mmu, event: Event) -> None:
    """Enter the handler. Raises Fault, or as Mmu.read and Mmu.write do."""
    idt = registers.segment(IDT)
    at_gate = event.at_gate()
    if event.vector * 16 + 15 > idt.limit:
        raise Fault(GP, at_gate)
    low, selector, ist, kind, middle, high, _ = struct.unpack("<HHBBHII", mmu.read(idt.base + event.vector * 16, 16))
    if kind & 0x1F not in (_INTERRUPT, _TRAP):
        raise Fault(GP, at_gate)
    cpl = registers.cpl
    if event.software and kind >> 5 & 3 < cpl:
        raise Fault(GP, at_gate)
    if not kind & 0x80:
        raise Fault(NP, at_gate)
    code = _code_descriptor(registers, mmu, selector, event.ext)
    new_cpl = cpl if code.conforming else code.dpl
    old_ss, old_sp = registers.segment(SS), registers.gpr(4)
    if ist & 7:
        stack = _tss_field(registers, mmu, _IST1 + 8 * ((ist & 7) - 1), event.ext)
    elif new_cpl < cpl:
        stack = _tss_field(registers, mmu, _RSP0 + 8 * new_cpl, event.ext)
    else:
        stack = old_sp
    frame = [old_ss.selector, old_sp, event.pushed_flags(), registers.segment(CS).selector, registers.rip]
    if event.error is not None:
        frame.append(event.error)
    top = stack & -16 & _U64
    stack = top - 8 * len(frame) & _U64
    if not (canonical(stack) and canonical(top - 8 & _U64)):
        raise Fault(STACK, event.ext)
    rip = low | middle << 16 | high << 32
    if not canonical(rip):
        raise Fault(GP, event.ext)
    mmu.write(stack, struct.pack(f"<{len(frame)}Q", *reversed(frame)), user=new_cpl == 3)
    loaded = code.loaded(mmu, selector & ~3 | new_cpl)
    if new_cpl != cpl:  # a null selector; the level is what its RPL says
        registers.set_segment(SS, Segment(new_cpl, 0, 0, new_cpl << F_DPL_SHIFT | F_P | F_S | 0x300))
    registers.set_segment(CS, loaded)
    registers.set_gpr(4, stack)
    registers.rip = rip
    cleared = TF | NT | RF | VM | (0 if kind & 1 else IF)
    registers.set_flags(event.flags & ~cleared)
    registers.settle()


def canonical(address: int) -> bool:
    """Are bits 63 to 47 all the same?"""
    return address >> 47 in (0, 0x1FFFF)


def _code_descriptor(registers: Registers, mmu: Mmu, selector: int, ext: int) -> Descriptor:
    """The 64-bit code segment that a gate names."""
    bad = selector & 0xFFFC
    if not bad:
        raise Fault(GP, ext)
    code = descriptor(registers, mmu, selector, GP, bad | ext)
    if not code.is_code or code.dpl > registers.cpl or code.high & (F_L | F_DB) != F_L:
        raise Fault(GP, bad | ext)
    if not code.present:
        raise Fault(NP, bad | ext)
    return code


def _tss_field(registers: Registers, mmu: Mmu, offset: int, ext: int) -> int:
    """A stack pointer of the TSS."""
    tss = registers.segment(TR)
    if offset + 7 > tss.limit:
        raise Fault(TS, tss.selector & 0xFFFC | ext)
    value = int.from_bytes(mmu.read(tss.base + offset, 8), "little")
    if not canonical(value):
        raise Fault(STACK, ext)
    return value
