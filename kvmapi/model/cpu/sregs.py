"""KVM_GET_SREGS and KVM_SET_SREGS: segments, descriptor tables and control registers as KVM's struct, and the reset
state.

Setting is checked first and applied whole or not at all. Source: struct kvm_sregs; kvm_is_valid_sregs in
arch/x86/kvm/x86.c for the checks.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from kvmapi.model.cpu import state
from kvmapi.model.cpu.msrs import APIC_BASE, valid_apic_base
from kvmapi.model.cpu.state import CS, DS, ES, F_DB, F_DPL_SHIFT, F_G, F_L, F_P, F_S, FS, GDT, GS, IDT, LDT, SS, TR, Segment

if TYPE_CHECKING:
    from kvmapi.model.cpu.cpu import Cpu

_SEGMENT = struct.Struct("<QIH10B")  # base limit selector type present dpl db s l g avl unusable padding
_TABLE = struct.Struct("<QH6x")
_CONTROL = struct.Struct("<7Q")  # cr0 cr2 cr3 cr4 cr8 efer apic_base
_ORDER = (CS, DS, ES, FS, GS, SS, TR, LDT)
_DEBUG_AT_RESET = 0xFFFF0FF0, 0x400  # DR6, DR7
SIZE = 312
BITMAP_AT = 280  # interrupt_bitmap; struct kvm_sregs2 has its flags and PDPTRs there
_CR0_ET = 1 << 4
_CR0_PE, _CR0_PG, _CR0_NW, _CR0_CD = 1, 1 << 31, 1 << 29, 1 << 30
_CR4_PAE = 1 << 5
_EFER_LME, _EFER_LMA = 1 << 8, 1 << 10


def reset(cpu: Cpu) -> None:
    """The state after RESET: real mode at F000:FFF0."""
    registers = cpu.registers
    cpu.hides_et = False
    for number in range(16):
        registers.set_gpr(number, 0)
    registers.set_gpr(2, 0x600)  # EDX holds the signature of a processor without CPUID: it is set later
    registers.rip = 0xFFF0
    registers.set_flags(2)
    for number in (ES, SS, DS, FS, GS):
        registers.set_segment(number, Segment(0, 0, 0xFFFF, F_P | F_S | 2 << 8))
    registers.set_segment(CS, Segment(0xF000, 0xFFFF0000, 0xFFFF, F_P | F_S | 0xA << 8))
    registers.set_segment(LDT, Segment(0, 0, 0xFFFF, F_P | 2 << 8))
    registers.set_segment(TR, Segment(0, 0, 0xFFFF, F_P | 3 << 8))
    for number in (GDT, IDT):
        registers.set_segment(number, Segment(0, 0, 0xFFFF, 0))
    registers.set_cr(0, 0x60000010)
    for number in (2, 3, 4):
        registers.set_cr(number, 0)
    registers.efer = 0
    registers.settle()


def init(cpu: Cpu) -> None:
    """The state after INIT: as after RESET, but caching, x87, SSE and most MSRs are left alone."""
    caching = cpu.registers.cr(0) & (_CR0_NW | _CR0_CD)
    reset(cpu)
    struct.pack_into("<4Q16xQQ", cpu.native.state, cpu.where.debug, 0, 0, 0, 0, *_DEBUG_AT_RESET)
    cpu.debug.guest_changed()
    cpu.registers.set_cr(0, 0x10 | caching)
    cpu.registers.set_gpr(2, cpu.cpuid.read(1, 0)[0] or 0x600)
    cpu.native.flush_tlb()


def start_at(cpu: Cpu, vector: int) -> None:
    """A startup IPI: real mode at `vector` << 12."""
    cpu.registers.set_segment(CS, cpu.registers.segment(CS)._replace(selector=vector << 8, base=vector << 12))
    cpu.registers.rip = 0
    cpu.registers.settle()


def _pack_segment(number: int, segment: Segment) -> bytes:
    """struct kvm_segment as kvm_amd gives it: G is made from the limit, not present is unusable, a data segment that is
    there has been accessed, and the task register's is busy.
    """
    flags = segment.flags
    kind, present = flags >> 8 & 15, flags >> 15 & 1
    if number == TR:
        kind |= 2
    elif number in (DS, ES, FS, GS):
        kind |= present
    big = flags >> 22 & 1 if present or number != SS else 0
    return _SEGMENT.pack(
        segment.base,
        segment.limit,
        segment.selector,
        kind,
        present,
        flags >> F_DPL_SHIFT & 3,
        big,
        flags >> 12 & 1,
        flags >> 21 & 1,
        segment.limit > 0xFFFFF,
        flags >> 20 & 1,
        1 - present,
        0,
    )


def cr0(cpu: Cpu) -> int:
    """CR0 as KVM has it: without ET, where user space has just set it so. A processor's ET is always set, and so is the guest's."""
    return cpu.registers.cr(0) & ~(_CR0_ET if cpu.hides_et else 0)


def pack(cpu: Cpu) -> bytes:
    """struct kvm_sregs."""
    registers = cpu.registers
    out = b"".join(_pack_segment(number, registers.segment(number)) for number in _ORDER)
    for number in (GDT, IDT):
        table = registers.segment(number)
        out += _TABLE.pack(table.base, table.limit & 0xFFFF)
    control = (cr0(cpu), registers.cr(2), registers.cr(3), registers.cr(4), cpu.cr8, registers.efer)
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
    if not _valid(cpu, cr0, cr3, cr4, efer, bool(code_l), c_mask) or not valid_apic_base(apic_base, cpu.cpuid):
        return False
    registers, cpu.hides_et = cpu.registers, not cr0 & _CR0_ET
    for number, row in zip(_ORDER, rows):
        registers.set_segment(number, _unpack_segment(row))
    for number, (base, limit) in zip((GDT, IDT), tables):
        registers.set_segment(number, Segment(0, base, limit, 0))
    for number, value in ((0, cr0 | _CR0_ET), (2, cr2), (3, cr3), (4, cr4)):
        registers.set_cr(number, value)
    if not cr8 >> 4:  # KVM does not tell user space that it has not taken a wrong one
        cpu.cr8 = cr8
    cpu.refuses_entry = bool(efer & _EFER_LMA and code_l & 1 and rows[0][6] & 1)
    cpu.attention |= cpu.refuses_entry
    registers.efer = efer
    cpu.msrs.write(APIC_BASE, apic_base, host=True)
    registers.settle()
    return True


def _unpack_segment(row: tuple[int, ...]) -> Segment:
    base, limit, selector, kind, present, dpl, db, s, long, granularity, avl, unusable, _ = row
    flags = (kind & 15) << 8 | (dpl & 3) << F_DPL_SHIFT | (s & 1) << 12
    flags |= (F_DB if db & 1 else 0) | (F_L if long & 1 else 0) | (F_G if granularity & 1 else 0) | (1 << 20 if avl & 1 else 0)
    if present & 1 and not unusable:
        flags |= F_P
    return Segment(selector, base, limit, flags)


def _valid(cpu: Cpu, cr0: int, cr3: int, cr4: int, efer: int, code_l: bool, c_mask: int) -> bool:
    # CS.L with CS.D is not KVM's business: the processor refuses it at entry.
    if cr4 & ~cpu.cpuid.cr4_valid or efer & ~cpu.cpuid.efer_valid:
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
