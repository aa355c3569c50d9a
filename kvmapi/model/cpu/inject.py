"""Deliver an exception or a software interrupt through the guest's IDT.

The engine reports exceptions and never delivers them, so the frame is built here: 64-bit gates with the IST and the
TSS stacks, and the real-mode vector table. A fault during delivery becomes a double fault, and a fault during that a
triple fault: the guest is shut down. Source: AMD64 Architecture Programmer's Manual, volume 2, chapter 8.
"""

from __future__ import annotations

import struct

from kvmapi.model.cpu.mmu import Fault, Mmu
from kvmapi.model.cpu.state import CS, F_DPL_SHIFT, F_L, F_P, F_S, IDT, SS, TR, Registers, Segment

DF, TS, NP, STACK, GP, PF = 8, 10, 11, 12, 13, 14
_WITH_ERROR = frozenset((8, 10, 11, 12, 13, 14, 17, 21, 29, 30))
_CONTRIBUTORY = frozenset((0, 10, 11, 12, 13))
_NO_FAULT = frozenset((1, 2, 3, 4, 8, 18))  # traps, interrupts and aborts
_RF, _TF, _NT, _IF, _AC, _VM = 1 << 16, 1 << 8, 1 << 14, 1 << 9, 1 << 18, 1 << 17
_EXTERNAL = 1  # EXT bit of selector error codes: the fault happened while delivering


class TripleFault(Exception):
    """The CPU shuts down."""


class UnsupportedDelivery(Exception):
    """A kind of gate or mode that the model lacks."""


def deliver(registers: Registers, mmu: Mmu, flags: int, vector: int, error: int | None, *, software: bool = False) -> None:
    """Enter the handler of `vector`: registers are changed as the CPU would. Raises TripleFault, or Refused when a
    stack or table lies outside memory.
    """
    first: int | None = None
    while True:
        try:
            _deliver_once(registers, mmu, flags, vector, error if vector in _WITH_ERROR else None, software)
            return
        except Fault as fault:
            if first == DF:
                raise TripleFault from fault
            # Two contributory faults, or a page fault followed by either kind, make a double fault; others are
            # delivered one after the other.
            doubles = (vector in _CONTRIBUTORY and fault.vector in _CONTRIBUTORY) or (vector == PF and fault.vector in _CONTRIBUTORY | {PF})
            if fault.vector == PF:
                registers.set_cr(2, fault.address)
            if vector == DF or doubles:
                first, vector, error = DF, DF, 0
            else:
                vector, error = fault.vector, fault.error
            software = False


def deliver_external(registers: Registers, mmu: Mmu, flags: int, vector: int) -> None:
    """Enter the handler of an interrupt or NMI: no error code, and no RF in the frame. A fault on the way is
    delivered as `deliver` does.
    """
    try:
        if registers.efer & (1 << 10):
            _long_mode(registers, mmu, flags, vector, None, None)
        elif not registers.cr(0) & 1:
            _real_mode(registers, mmu, flags, vector)
        else:
            raise UnsupportedDelivery("an interrupt in 32-bit protected mode")
    except Fault as fault:
        deliver(registers, mmu, flags, fault.vector, fault.error)


def _deliver_once(registers: Registers, mmu: Mmu, flags: int, vector: int, error: int | None, software: bool) -> None:
    if registers.efer & (1 << 10):
        _long_mode(registers, mmu, flags, vector, error, software)
    elif not registers.cr(0) & 1:
        _real_mode(registers, mmu, flags, vector)
    else:
        raise UnsupportedDelivery("an exception in 32-bit protected mode")


def _long_mode(registers: Registers, mmu: Mmu, flags: int, vector: int, error: int | None, software: bool | None) -> None:
    """`software` is None for interrupts from outside."""
    idt = registers.segment(IDT)
    bad_gate = vector * 8 + 2 + (0 if software else _EXTERNAL)
    if vector * 16 + 15 > idt.limit:
        raise Fault(GP, bad_gate)
    low, selector, ist, kind, middle, high, _ = struct.unpack("<HHBBHII", mmu.read(idt.base + vector * 16, 16))
    if kind & 0x1F not in (0x0E, 0x0F):
        raise Fault(GP, bad_gate)
    cpl = registers.cpl
    if software and kind >> 5 & 3 < cpl:
        raise Fault(GP, bad_gate)
    if not kind & 0x80:
        raise Fault(NP, bad_gate)
    code = _code_descriptor(registers, mmu, selector)
    new_cpl = code.flags >> F_DPL_SHIFT & 3 if not code.flags >> 8 & 4 else cpl  # conforming code keeps the level
    old_ss, old_sp = registers.segment(SS), registers.gpr(4)
    if ist & 7:
        stack = _tss_field(registers, mmu, 0x24 + 8 * ((ist & 7) - 1))
    elif new_cpl < cpl:
        stack = _tss_field(registers, mmu, 4 + 8 * new_cpl)
    else:
        stack = old_sp
    # A fault's frame has RF set, so that a breakpoint on the instruction does not strike twice.
    pushed = flags | _RF if software is False and vector not in _NO_FAULT else flags
    frame = [old_ss.selector, old_sp, pushed, registers.segment(CS).selector, registers.rip]
    if error is not None:
        frame.append(error)
    stack = (stack & -16) - 8 * len(frame)
    mmu.write(stack & 0xFFFFFFFFFFFFFFFF, struct.pack(f"<{len(frame)}Q", *reversed(frame)))
    if new_cpl != cpl:
        registers.set_segment(SS, Segment(new_cpl, 0, 0, new_cpl << F_DPL_SHIFT | F_P | F_S | 0x300))
    registers.set_segment(CS, code._replace(selector=selector & ~3 | new_cpl))
    registers.set_gpr(4, stack & 0xFFFFFFFFFFFFFFFF)
    registers.rip = low | middle << 16 | high << 32
    cleared = _TF | _NT | _RF | _VM | (0 if kind & 1 else _IF)
    registers.set_flags(flags & ~cleared)
    registers.settle()


def _code_descriptor(registers: Registers, mmu: Mmu, selector: int) -> Segment:
    """The 64-bit code segment an interrupt gate names."""
    bad = selector & 0xFFFC
    if not bad:
        raise Fault(GP, _EXTERNAL)
    table = registers.segment(8 if not selector & 4 else 6)
    if (selector | 7) > table.limit:
        raise Fault(GP, bad | _EXTERNAL)
    low, high = struct.unpack("<II", mmu.read(table.base + (selector & 0xFFF8), 8))
    if not high & F_S or not high >> 8 & 8 or high >> F_DPL_SHIFT & 3 > registers.cpl or not high & F_L:
        raise Fault(GP, bad | _EXTERNAL)
    if not high & F_P:
        raise Fault(NP, bad | _EXTERNAL)
    limit = low & 0xFFFF | high & 0xF0000
    return Segment(
        selector, low >> 16 | (high & 0xFF) << 16 | high & 0xFF000000, limit << 12 | 0xFFF if high & 1 << 23 else limit, high & 0xF0FF00
    )


def _tss_field(registers: Registers, mmu: Mmu, offset: int) -> int:
    tss = registers.segment(TR)
    if offset + 7 > tss.limit:
        raise Fault(TS, tss.selector & 0xFFFC | _EXTERNAL)
    value = int.from_bytes(mmu.read(tss.base + offset, 8), "little")
    if value >> 47 not in (0, 0x1FFFF):
        raise Fault(STACK, _EXTERNAL)
    return value


def _real_mode(registers: Registers, mmu: Mmu, flags: int, vector: int) -> None:
    idt = registers.segment(IDT)
    if vector * 4 + 3 > idt.limit:
        raise Fault(GP, 0)
    offset, selector = struct.unpack("<HH", mmu.read(idt.base + vector * 4, 4))
    stack = registers.segment(SS)
    pointer = registers.gpr(4) - 6 & 0xFFFF
    mmu.write(stack.base + pointer, struct.pack("<HHH", registers.rip & 0xFFFF, registers.segment(CS).selector, flags & 0xFFFF))
    registers.set_gpr(4, registers.gpr(4) & ~0xFFFF | pointer)
    registers.set_segment(CS, registers.segment(CS)._replace(selector=selector, base=selector << 4))
    registers.rip = offset
    registers.set_flags(flags & ~(_IF | _TF | _RF | _AC))
    registers.settle()
