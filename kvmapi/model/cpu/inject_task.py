"""A hardware task switch through a task gate in the IDT, to a 32-bit TSS.

The old task is saved whole in its TSS, the new one is loaded with NT set and a link back, so that IRET (the engine's)
returns. Until the new TSS is found good a fault belongs to the old task; afterwards, when segments are loaded one by
one, to the new. Handlers of #DF are the usual reason for such a gate. A 16-bit TSS raises UnsupportedDelivery. Source:
Intel's manual, volume 3, section 8.3; AMD64 Architecture Programmer's Manual, volume 2, section 12.3.
"""

from __future__ import annotations

import struct

from kvmapi.model.cpu import layout
from kvmapi.model.cpu.inject_common import GP, NP, NT, RF, STACK, TS, VM, Descriptor, Event, Stack, UnsupportedDelivery, descriptor
from kvmapi.model.cpu.mmu import Fault, Mmu
from kvmapi.model.cpu.state import CR0_TS, CS, DS, ES, F_S, FS, GS, LDT, SS, TR, Registers, Segment

_BUSY, _BIG = 2 << 8, 8 << 8
_LINK, _CR3, _SAVED, _EIP, _SELECTORS, _LDT = 0, 0x1C, 0x20, 0x20, 0x48, 0x60
_SIZE = 104
_PG = 1 << 31
_TABLE_LDT = 2
_FLAGS = 0x3F7FD7 | 2  # the bits of EFLAGS that exist
_VM86_DATA = 0x93 << 8 | 3 << 13


def switch(registers: Registers, mmu: Mmu, event: Event, selector: int) -> None:
    """Enter the task that the gate names. Raises Fault (of the old task, or of the new one once it was entered)."""
    ext, bad, old = event.ext, selector & 0xFFFC, registers.segment(TR)
    if selector & 4 or not bad:
        raise Fault(GP if selector & 4 else TS, bad | ext)
    new = descriptor(registers, mmu, selector, GP, bad | ext)
    if new.high & F_S or new.high >> 8 & 0x7 != 1:
        raise Fault(GP, bad | ext)
    if not new.present:
        raise Fault(NP, bad | ext)
    if not new.high & _BIG or not old.flags & _BIG:
        raise UnsupportedDelivery("a task gate with a 16-bit TSS")
    if new.limit < _SIZE - 1:
        raise Fault(TS, bad | ext)
    if old.limit < _SIZE - 1:
        raise Fault(TS, old.selector & 0xFFFC | ext)
    image = mmu.read(new.base, _SIZE)
    _save(registers, mmu, event, old)
    mmu.write(new.base + _LINK, struct.pack("<H", old.selector))
    mmu.write(new.at + 5, bytes((new.high >> 8 & 0xFF | _BUSY >> 8,)))
    registers.set_segment(TR, Segment(selector, new.base, new.limit, (new.high | _BUSY) & 0xF0FF00))
    _load(registers, mmu, event, image)


def _save(registers: Registers, mmu: Mmu, event: Event, tss: Segment) -> None:
    words = [registers.rip, event.pushed_flags(), *(registers.gpr(number) for number in range(8))]
    selectors = [registers.segment(number).selector for number in (ES, CS, SS, DS, FS, GS)]
    image = b"".join((word & 0xFFFFFFFF).to_bytes(4, "little") for word in words + selectors)
    mmu.write(tss.base + _SAVED & 0xFFFFFFFF, image)


def _load(registers: Registers, mmu: Mmu, event: Event, image: bytes) -> None:
    """From here on the new task runs: faults are its own."""
    if registers.cr(0) & _PG:
        registers.set_cr(3, int.from_bytes(image[_CR3 : _CR3 + 4], "little"))
        registers.native.flush_tlb()
    eip, flags, *general = struct.unpack_from("<10I", image, _EIP)
    selectors = [word & 0xFFFF for word in struct.unpack_from("<6I", image, _SELECTORS)]
    registers.rip = eip
    for number, value in enumerate(general):
        registers.set_gpr(number, value)
    registers.set_cr(0, registers.cr(0) | CR0_TS)
    registers.u64[layout.EFLAGS >> 3] = flags & VM  # for settle: the level of virtual-8086 code
    registers.set_flags((flags | NT) & _FLAGS & ~RF)
    registers.set_segment(LDT, Segment(0, 0, 0, 0))
    names = (ES, CS, SS, DS, FS, GS)
    if flags & VM:
        for number, value in zip(names, selectors):
            registers.set_segment(number, Segment(value, value << 4, 0xFFFF, _VM86_DATA))
    else:
        cpl = selectors[1] & 3
        for number, value in zip(names, selectors):
            registers.set_segment(number, Segment(value, 0, 0, cpl << 13 if number == SS else 0))
    registers.settle()
    _load_ldt(registers, mmu, int.from_bytes(image[_LDT : _LDT + 2], "little"), event.ext)
    if not flags & VM:
        order = (SS, CS, ES, DS, FS, GS)
        for number in order:
            _load_segment(registers, mmu, number, selectors[names.index(number)], event.ext)
    registers.settle()
    if registers.rip > registers.segment(CS).limit:
        raise Fault(GP, event.ext)
    if event.error is not None:
        stack = Stack(registers.segment(SS), registers.gpr(4), 4, event.ext)
        stack.push(event.error)
        stack.store(mmu, user=registers.cpl == 3)
        registers.set_gpr(4, stack.pointer(registers.gpr(4)))


def _load_ldt(registers: Registers, mmu: Mmu, selector: int, ext: int) -> None:
    bad = selector & 0xFFFC
    if not bad:
        return
    if selector & 4:
        raise Fault(TS, bad | ext)
    table = descriptor(registers, mmu, selector, TS, bad | ext)
    if table.high & F_S or table.high >> 8 & 15 != _TABLE_LDT or not table.present:
        raise Fault(TS, bad | ext)
    registers.set_segment(LDT, table.segment(selector))


def _load_segment(registers: Registers, mmu: Mmu, number: int, selector: int, ext: int) -> None:
    bad, cpl = selector & 0xFFFC, registers.cpl
    if not bad:
        if number in (CS, SS):
            raise Fault(TS, ext)
        return
    found = descriptor(registers, mmu, selector, TS, bad | ext)
    if not _fits(found, number, selector & 3, cpl):
        raise Fault(TS, bad | ext)
    if not found.present:
        raise Fault(STACK if number == SS else NP, bad | ext)
    registers.set_segment(number, found.loaded(mmu, selector))


def _fits(found: Descriptor, number: int, rpl: int, cpl: int) -> bool:
    """May this descriptor be in that register at this level?"""
    if number == SS:
        return found.is_stack and found.dpl == cpl == rpl
    if number == CS:
        return found.is_code and (found.dpl <= rpl if found.conforming else found.dpl == rpl)
    if not found.high & F_S or (found.is_code and not found.high & 2 << 8):
        return False
    return (found.is_code and found.conforming) or (found.dpl >= cpl and found.dpl >= rpl)
