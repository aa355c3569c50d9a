"""KVM_GET_SREGS and KVM_SET_SREGS: segments, descriptor tables and control registers as KVM's struct, and the reset
state.

Setting is checked first and applied whole or not at all. Source: struct kvm_sregs; kvm_is_valid_sregs in
arch/x86/kvm/x86.c for the checks.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmapi.model.cpu import state
from kvmapi.model.cpu.msrs import APIC_BASE
from kvmapi.model.cpu.state import CS, DS, ES, F_DB, F_DPL_SHIFT, F_G, F_L, F_P, F_S, FS, GDT, GS, IDT, LDT, SS, TR, Segment

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu

_SEGMENT = struct.Struct("<QIH10B")  # base limit selector type present dpl db s l g avl unusable padding
_TABLE = struct.Struct("<QH6x")
_CONTROL = struct.Struct("<7Q")  # cr0 cr2 cr3 cr4 cr8 efer apic_base
_ORDER = (CS, DS, ES, FS, GS, SS, TR, LDT)
SIZE = 312
BITMAP_AT = 280  # interrupt_bitmap; struct kvm_sregs2 has its flags and PDPTRs there
_CR0_PE, _CR0_PG, _CR0_NW, _CR0_CD = 1, 1 << 31, 1 << 29, 1 << 30
_CR4_PAE = 1 << 5
CR4_VALID = 0x3 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 16 | 1 << 18 | 1 << 20 | 1 << 21
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10


def reset(cpu: Cpu) -> None:
    """The state after RESET: real mode at F000:FFF0."""
    registers = cpu.registers
    cpu.native.save()
    for number in range(16):
        registers.set_gpr(number, 0)
    registers.set_gpr(2, 0x600)  # EDX holds the signature of a processor without CPUID: it is set later
    registers.rip = 0xFFF0
    registers.set_flags(2)
    for number in (ES, SS, DS, FS, GS):
        registers.set_segment(number, Segment(0, 0, 0xFFFF, F_P | F_S | 3 << 8))
    registers.set_segment(CS, Segment(0xF000, 0xFFFF0000, 0xFFFF, F_P | F_S | 0xB << 8))
    registers.set_segment(LDT, Segment(0, 0, 0xFFFF, F_P | 2 << 8))
    registers.set_segment(TR, Segment(0, 0, 0xFFFF, F_P | 0xB << 8))
    for number in (GDT, IDT):
        registers.set_segment(number, Segment(0, 0, 0xFFFF, 0))
    registers.set_cr(0, 0x60000010)
    for number in (2, 3, 4):
        registers.set_cr(number, 0)
    registers.efer = 0
    registers.settle()
    cpu.changed = True


def _pack_segment(segment: Segment) -> bytes:
    flags = segment.flags
    return _SEGMENT.pack(
        segment.base,
        segment.limit,
        segment.selector,
        flags >> 8 & 15,
        flags >> 15 & 1,
        flags >> F_DPL_SHIFT & 3,
        flags >> 22 & 1,
        flags >> 12 & 1,
        flags >> 21 & 1,
        flags >> 23 & 1,
        flags >> 20 & 1,
        0 if flags & F_P else 1,
        0,
    )


def pack(cpu: Cpu) -> bytes:
    """struct kvm_sregs."""
    registers = cpu.registers
    out = b"".join(_pack_segment(registers.segment(number)) for number in _ORDER)
    for number in (GDT, IDT):
        table = registers.segment(number)
        out += _TABLE.pack(table.base, table.limit & 0xFFFF)
    control = (registers.cr(0), registers.cr(2), registers.cr(3), registers.cr(4), cpu.cr8, registers.efer)
    return out + _CONTROL.pack(*control, cpu.msrs.read(APIC_BASE)) + bytes(SIZE - BITMAP_AT)


def unpack(cpu: Cpu, data: bytes, c_mask: int) -> bool:
    """Apply struct kvm_sregs; False (nothing changed) when KVM refuses it. `c_mask`: the C-bit, where CR3 may have
    it.
    """
    rows = [_SEGMENT.unpack_from(data, _SEGMENT.size * at) for at in range(8)]
    at = _SEGMENT.size * 8
    tables = [_TABLE.unpack_from(data, at + _TABLE.size * number) for number in range(2)]
    cr0, cr2, cr3, cr4, cr8, efer, apic_base = _CONTROL.unpack_from(data, at + 2 * _TABLE.size)
    code_l = rows[0][8]
    if not _valid(cr0, cr3, cr4, cr8, efer, bool(code_l), c_mask):
        return False
    registers = cpu.registers
    for number, row in zip(_ORDER, rows):
        registers.set_segment(number, _unpack_segment(row))
    for number, (base, limit) in zip((GDT, IDT), tables):
        registers.set_segment(number, Segment(0, base, limit, 0))
    for number, value in ((0, cr0 | 0x10), (2, cr2), (3, cr3), (4, cr4)):
        registers.set_cr(number, value)
    cpu.cr8 = cr8
    registers.efer = efer
    cpu.msrs.write(APIC_BASE, apic_base, host=True)
    registers.settle()
    cpu.changed = True
    return True


def _unpack_segment(row: tuple[int, ...]) -> Segment:
    base, limit, selector, kind, present, dpl, db, s, long, granularity, avl, unusable, _ = row
    flags = (kind & 15) << 8 | (dpl & 3) << F_DPL_SHIFT | (s & 1) << 12
    flags |= (F_DB if db else 0) | (F_L if long else 0) | (F_G if granularity else 0) | (1 << 20 if avl else 0)
    if present and not unusable:
        flags |= F_P
    return Segment(selector, base, limit, flags)


def _valid(cr0: int, cr3: int, cr4: int, cr8: int, efer: int, code_l: bool, c_mask: int) -> bool:
    # EFER's reserved bits and CS.L with CS.D are not KVM's business here: the processor refuses them at entry.
    if cr4 & ~CR4_VALID or cr8 >> 4:
        return False
    if cr0 >> 32 or (cr0 & _CR0_PG and not cr0 & _CR0_PE) or (cr0 & _CR0_NW and not cr0 & _CR0_CD):
        return False
    if efer & _EFER_LME and cr0 & _CR0_PG:
        # 64-bit mode or its compatibility mode: PAE and LMA must be on, and CR3 within the physical address width.
        if not cr4 & _CR4_PAE or not efer & _EFER_LMA or cr3 & ~c_mask & ~((1 << state.MAX_PHYS_BITS) - 1):
            return False
    elif efer & _EFER_LMA or code_l:
        return False
    return True
